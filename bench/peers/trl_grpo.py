"""TRL's GRPOTrainer, stepped and timed, with a reward function of ours."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from airl_fast.lab import Lab
from bench.step_setup import Scenario

Reward = Callable[[list[list[int]], list[int]], list[float]]


def train(scenario: Scenario, model: Path, lab: Lab, steps: int, reward: Reward) -> tuple[list[float], str]:
    """Seconds of every optimiser step, each with its own rollout, and TRL's version. ImportError without TRL.

    reward(completions as token ids, index of each one's prompt) gives a number a completion.
    """
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    chat = lab.maker.chat.tokenizer
    texts = [
        "7" * lab.maker.missing(e)
        + chat.apply_chat_template([{"role": "user", "content": e.prompt}], tokenize=False, add_generation_prompt=True)
        for e in lab.material.train
    ]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments, **keywords) -> None:
            _wait()
            self.began = time.perf_counter()

        def on_step_end(self, *arguments, **keywords) -> None:
            _wait()
            seconds.append(time.perf_counter() - self.began)

    def judge(prompts, completions, completion_ids, index, **unused) -> list[float]:
        return reward(completion_ids, index)

    cuda = next(lab.policy.lm.model.parameters()).is_cuda
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if cuda else torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=scenario.prompts * scenario.group,
            num_generations=scenario.group,
            max_completion_length=scenario.completion_tokens,
            generation_kwargs={"min_new_tokens": scenario.completion_tokens},
            temperature=1.0,
            beta=0.0,
            learning_rate=lab.config.policy.optim.learning_rate,
            gradient_checkpointing=False,
            bf16=cuda,
            use_cpu=not cuda,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=cuda,
            seed=scenario.seed,
        )
        trainer = trl.GRPOTrainer(
            model=network,
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            reward_funcs=judge,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": texts, "index": list(range(len(texts)))}),
            callbacks=[Clock()],
        )
        trainer.train()
    return seconds, trl.__version__


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
