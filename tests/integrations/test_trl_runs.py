"""Twenty steps of TRL's own trainers, patched and as published: the same losses, metrics, gradients and weights."""

from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

from tests.integrations.trl_cases import (
    Record,
    assert_same_run,
    relative,
    settings,
    small_model,
    train,
)

trl = pytest.importorskip("trl", reason="TRL is not installed; `make peers` installs it.")


def adapters(lora: bool) -> dict[str, LoraConfig]:
    """The trainer's argument, a new one for each trainer: PEFT writes into it. All linear layers but the output's."""
    made = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return {"peft_config": made} if lora else {}


def both(tmp_path, trainer, config, architecture: str, *, lora: bool = False, **how: object) -> tuple[Record, Record]:
    """(as published, patched)."""
    published, patched = (
        train(
            tmp_path / str(patch), trainer, config, small_model(architecture), patched=patch,
            arguments=adapters(lora), **how,
        )
        for patch in (False, True)
    )  # fmt: skip
    assert published.calls.linear_logprob == 0
    return published, patched


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_grpo_runs_the_same(tmp_path, architecture, lora):
    published, patched = both(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, architecture, lora=lora)
    assert_same_run(patched, published)
    assert any("lora" in name for name in patched.gradients[0]) == lora
    # 20 updates; and each of the ten generations is scored by the policy before its updates and by the reference.
    assert patched.calls.linear_logprob == 40 and patched.calls.left_to_trl == 0
    assert max(abs(log["loss"]) for log in published.logs) > 0.05
    assert min(log["grad_norm"] for log in published.logs) > 1e-3


@pytest.mark.parametrize(
    ("architecture", "lora"), [("qwen2", False), ("llama", True)], ids=["qwen2-all weights", "llama-LoRA"]
)
def test_grpo_runs_the_same_with_an_entropy_bonus(tmp_path, architecture, lora):
    """The entropy has a gradient of its own, also where the head is frozen; the highest-entropy tokens alone count."""
    how = {"entropy_coef": 0.5, "top_entropy_quantile": 0.6}
    published, patched = both(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, architecture, lora=lora, **how)
    assert_same_run(patched, published)
    without = train(
        tmp_path / "without", trl.GRPOTrainer, trl.GRPOConfig, small_model(architecture), patched=True,
        arguments=adapters(lora), **{**how, "entropy_coef": 0.0},
    )  # fmt: skip
    name = next(iter(without.weights))
    assert relative(without.weights[name], patched.weights[name]) > 1e-4


@dataclass
class Sampler:
    """Stands where TRL keeps vLLM: samples from the policy as it was at the last sync, and gives its log-probabilities.

    It samples at another temperature than the trainer scores at, so that TRL's correction has something to correct.
    (A bfloat16 copy, nearer to what vLLM does, would turn the last bit of a weight into another sample.)
    """

    trainer: object
    copy: PreTrainedModel | None = None

    def sync_weights(self) -> None:
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.copy is None:
            self.copy = small_model(policy.config.model_type)
        self.copy.load_state_dict(policy.state_dict())

    def generate(self, prompts, images, num_generations, profiler):
        """TRL sends every prompt once per completion. Returns (prompts, ids, [[[log-probability]]], None)."""
        assert images is None
        completions, logprobs = [], []
        for ids in prompts:
            made = self.copy.generate(
                input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=True, temperature=0.84, top_k=0, max_new_tokens=10, return_dict_in_generate=True,
                output_scores=True,
            )  # fmt: skip
            new = made.sequences[0, len(ids) :]
            scores = torch.stack(made.scores)[:, 0].float().log_softmax(-1)
            completions.append(new.tolist())
            logprobs.append([[float(row[token])] for row, token in zip(scores, new, strict=True)])
        return prompts, completions, logprobs, None


@pytest.mark.parametrize(("architecture", "mode"), [("qwen2", "sequence_mask"), ("llama", "token_truncate")])
def test_grpo_runs_the_same_with_importance_sampling_correction(tmp_path, architecture, mode):
    """All of TRL's correction runs; only the sampler is not vLLM, which TRL 1.16 supports up to 0.31."""

    def with_sampler(trainer) -> None:
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Sampler(trainer), -1

    how = {
        "prepare": with_sampler,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.02 if mode == "token_truncate" else 3.0,
    }
    published, patched = both(tmp_path, trl.GRPOTrainer, trl.GRPOConfig, architecture, **how)
    assert_same_run(patched, published)
    ratio = "sampling/importance_sampling_ratio/"
    made = [log for log in published.logs if f"{ratio}min" in log]
    assert len(made) == 10
    assert min(log[f"{ratio}min"] for log in made) < 0.99
    assert max(log["sampling/sampling_logp_difference/max"] for log in made) > 0.01
    assert patched.calls.linear_logprob == 40


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_rloo_runs_the_same(tmp_path, architecture):
    # A lower rate: ratios of whole sequences pass the clip, and a run amplifies any rounding, sooner than tokens' do.
    published, patched = both(tmp_path, trl.RLOOTrainer, trl.RLOOConfig, architecture, learning_rate=0.01)
    assert_same_run(patched, published)
    assert patched.calls.linear_logprob > 20


def test_grpo_runs_the_same_under_checkpointing_and_autocast(tmp_path):
    """Gradient checkpointing, and bfloat16 autocast: there both round to bfloat16, in products of other shapes."""
    published, patched = both(
        tmp_path / "checkpointing", trl.GRPOTrainer, trl.GRPOConfig, "qwen2", gradient_checkpointing=True, max_steps=4
    )
    assert_same_run(patched, published, steps=4)
    published, patched = both(tmp_path / "autocast", trl.GRPOTrainer, trl.GRPOConfig, "llama", bf16=True, max_steps=1)
    assert patched.calls.linear_logprob > 0
    for name, gradient in published.gradients[0].items():
        assert relative(patched.gradients[0][name], gradient) < 0.02, name
    assert patched.logs[0]["entropy"] == pytest.approx(published.logs[0]["entropy"], rel=1e-3)


def test_adapters_on_the_head_are_refused(tmp_path):
    """By TRL itself, at the trainer's construction: its fused head would not see the adapter."""
    from airl_kernels.integrations import trl as ours

    head = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with ours.patched(), pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        trl.GRPOTrainer(
            model=small_model("llama"),
            reward_funcs=lambda **_: [],
            args=settings(trl.GRPOConfig, tmp_path),
            train_dataset=None,
            peft_config=head,
        )
