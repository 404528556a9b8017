"""The policy update of TRL's GRPOTrainer on given tokens: its loss, micro-batch by micro-batch, and one AdamW step."""

import tempfile
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from airl_fast.config import BuildConfig
from airl_fast.models.build import build_tokenizer

SEQUENCES = 8  # of a micro-batch; TRL's own default


def update_of(
    model: PreTrainedModel, prompts: int, group: int, prompt_tokens: int, completion_tokens: int
) -> tuple[Callable[[], None], str]:
    """(one update on random tokens, TRL's version). ImportError without TRL."""
    import trl
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.GRPOTrainer(
            model=model,
            processing_class=build_tokenizer(["any text"], BuildConfig(vocab_size=300)),
            reward_funcs=lambda completions, **unused: [0.0] * len(completions),
            args=trl.GRPOConfig(
                output_dir=folder,
                per_device_train_batch_size=SEQUENCES,
                gradient_accumulation_steps=max(1, prompts * group // SEQUENCES),
                num_generations=group,
                max_completion_length=completion_tokens,
                beta=0.0,
                gradient_checkpointing=False,
                bf16=model.dtype == torch.bfloat16,
                use_cpu=model.device.type == "cpu",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict({"prompt": ["any text"] * prompts}),
        )
    trainer.model.train()
    # What Trainer.train sets before it asks for a loss.
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    generator, vocabulary = torch.Generator().manual_seed(0), model.config.vocab_size
    total = prompts * group * completion_tokens
    batches = []
    for start in range(0, prompts * group, SEQUENCES):
        count = min(SEQUENCES, prompts * group - start)
        ids = torch.randint(vocabulary, (count, prompt_tokens + completion_tokens), generator=generator)
        ids = ids.to(model.device)
        batches.append(
            {
                "prompt_ids": ids[:, :prompt_tokens],
                "prompt_mask": torch.ones_like(ids[:, :prompt_tokens]),
                "completion_ids": ids[:, prompt_tokens:],
                "completion_mask": torch.ones_like(ids[:, prompt_tokens:]),
                "advantages": torch.randn(count, generator=generator).to(model.device),
                "num_items_in_batch": torch.tensor(total, device=model.device),
            }
        )

    def update() -> None:
        for batch in batches:
            trainer.compute_loss(trainer.model, batch).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update, trl.__version__
