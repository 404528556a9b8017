"""Optimiser, schedule and the guarded step that the policy and the discriminator share."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import get_scheduler

from airl_fast.config import OptimConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimiser:
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: tuple[torch.nn.Parameter, ...]
    max_grad_norm: float

    def step(self) -> torch.Tensor:
        """Clip, step, clear. Returns the gradient norm before clipping, f32 scalar.

        A non-finite norm skips the step: weights and moments stay as they were, and the caller sees the norm.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not torch.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            return norm
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def make_optimiser(
    groups: Iterable[tuple[Iterable[torch.nn.Parameter], float]], config: OptimConfig, updates: int
) -> Optimiser:
    """AdamW over (parameters, learning-rate multiple) groups with a schedule of `updates` steps."""
    settings = []
    for parameters, scale in groups:
        matrices, vectors = [], []
        for parameter in parameters:
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
        lr = config.learning_rate * scale
        settings.append({"params": matrices, "lr": lr, "weight_decay": config.weight_decay})
        settings.append({"params": vectors, "lr": lr, "weight_decay": 0.0})  # norms and biases are not decayed
    settings = [group for group in settings if group["params"]]
    optimizer = torch.optim.AdamW(settings, lr=config.learning_rate, betas=config.betas)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(config.warmup_fraction * updates), num_training_steps=updates
    )
    parameters = tuple(p for group in settings for p in group["params"])
    return Optimiser(
        optimizer=optimizer, scheduler=scheduler, parameters=parameters, max_grad_norm=config.max_grad_norm
    )
