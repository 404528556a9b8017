"""AIRL inside TRL: `AIRLRewardFunction` for any of its trainers, and a GRPOTrainer with our token advantages.

reward = AIRLRewardFunction("runs/demo", tokenizer=tokenizer)
GRPOTrainer(model=model, reward_funcs=reward, ...)      # one reward a completion
AIRLTrainer(model=model, reward=reward, ...)            # one advantage a token
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from airl_fast.config import OptimConfig
from airl_fast.errors import UserError
from airl_fast.integrations.reward import AIRLRewardFunction, Judged
from airl_fast.models.adapters import is_adapted
from airl_fast.models.regimes import regimes_of
from airl_fast.optim import Optimiser, make_optimiser

try:
    from trl import GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    raise UserError("airl_fast.integrations.trl needs TRL; install trl==1.16.0.") from error

log = logging.getLogger(__name__)

__all__ = ["AIRLRewardFunction", "AIRLTrainer"]

_TOKEN_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")  # the others weigh whole sequences


class AIRLTrainer(GRPOTrainer):
    """TRL's GRPO with one advantage a token, from the discriminator's token rewards, instead of one a completion.

    reward: the trained discriminator. The run's settings decide how its rewards become advantages
    (`AIRLRewardFunction.token_advantages`); TRL's `scale_rewards` is not used. A text column `expert` of the dataset,
    a demonstration `<think>…</think><answer>…</answer>`, joins the group of its prompt.
    discriminator_optim: also train the discriminator, one step a generation batch of expert against sampled
    completions before they are scored (Fanconi et al., arXiv 2510.01857, Algorithm 1); needs the column `expert`.
    None leaves it as it was trained. Other arguments are GRPOTrainer's. TRL's logs show each completion's score as its
    reward. Raises UserError for settings that have no meaning with token advantages.
    """

    def __init__(
        self,
        model: Any,
        reward: AIRLRewardFunction,
        args: GRPOConfig | None = None,
        *,
        discriminator_optim: OptimConfig | None = None,
        **others: Any,
    ) -> None:
        if args is not None and (args.loss_type not in _TOKEN_LOSSES or args.importance_sampling_level != "token"):
            raise UserError(
                f"loss_type={args.loss_type} with importance_sampling_level={args.importance_sampling_level} weighs "
                f"whole completions; use importance_sampling_level=token and one of {', '.join(_TOKEN_LOSSES)}."
            )
        if reward.config.reward.outcome_weight:
            raise UserError(
                "the run's reward.outcome_weight asks for a verifier, which TRL does not bring; set it to 0."
            )
        if others.get("tools") or others.get("rollout_func"):
            raise UserError("AIRLTrainer scores the policy's own completions; leave tools and rollout_func out.")
        super().__init__(model=model, reward_funcs=reward, args=args, **others)
        if regimes := regimes_of(self.model):
            log.warning(
                "the policy has other rotary factors %s, and TRL's padded batches give every row those of the longest; "
                "keep prompt and completion of all rows on one side of the change",
                regimes,
            )
        self.reward = reward
        self._token_advantages: tuple[torch.Tensor, ...] = ()
        self._discriminator = None if discriminator_optim is None else self._optimiser(discriminator_optim)

    def _optimiser(self, config: OptimConfig) -> Optimiser:
        model = self.reward.model
        if self.accelerator.num_processes > 1:
            raise UserError("discriminator_optim trains on one process only; run without it, or on one process.")
        if is_adapted(model.backbone):
            raise UserError("the reward model is an adapter, which discriminator_optim cannot train; export it merged.")
        model.requires_grad_(True)
        groups = [(model.backbone.parameters(), 1.0), (model.head.parameters(), model.config.head_lr_scale)]
        if self.args.max_steps <= 0:
            raise UserError("discriminator_optim needs max_steps in the trainer's arguments, for its schedule.")
        uses = self.args.steps_per_generation * self.num_iterations  # micro-batches that one generation serves
        return make_optimiser(groups, config, -(-self.args.max_steps * self.args.gradient_accumulation_steps // uses))

    def _calculate_rewards(
        self, inputs: list[dict], prompts: list, completions: list, completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        """TRL's hook: f32 [completions of all processes, 1]. Keeps the token advantages of this process's."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        if len(prompts) % size:
            raise UserError(
                f"a process got {len(prompts)} completions, which are no whole groups of {size}; "
                "make per_device_train_batch_size times steps_per_generation a multiple of num_generations."
            )
        groups = [i // size for i in range(len(prompts))]
        experts = [example.get("expert") for example in inputs]
        judged = self.reward.judge(prompts, completion_ids_list, groups=groups, experts=experts)
        if self._discriminator is not None and self.model.training:
            self._train_discriminator(judged, experts)
        rewards = self.reward.rewards(judged)
        self._token_advantages = self.reward.token_advantages(judged, rewards)
        scores = [float("nan") if s is None else s for s in self.reward.sequence_scores(judged, rewards)]
        return self.accelerator.gather(torch.tensor(scores, device=self.accelerator.device)[:, None])

    def _train_discriminator(self, judged: Judged, experts: Sequence[str | None]) -> None:
        if not any(experts):
            raise UserError("discriminator_optim needs demonstrations; give the dataset a text column `expert`.")
        stats = self.reward.model.update(judged.bridge.pack(judged.traces, judged.examples), self._discriminator)
        for name in ("loss", "accuracy", "reward_gap"):
            self._metrics["train"][f"discriminator/{name}"].append(float(getattr(stats, name)))

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        """TRL's hook. Its advantages, [B], give way to ours, [B, T] with zeros on padding."""
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        dense = torch.zeros(mask.shape, device=mask.device)
        for row, values in zip(dense, self._token_advantages, strict=True):
            row[: len(values)] = values
        output["advantages"] = dense
        return output
