"""Optimiser, schedule and the guarded step that the policy and the discriminator share."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from airl_fast.config import OptimConfig
from airl_fast.errors import UserError
from airl_fast.models.adapters import require


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimiser:
    """parameters: what the optimizer steps. masters: (weight of the model, its float32 master among `parameters`).

    A bfloat16 weight keeps 8 bits: AdamW at lr 1e-5 moves a weight of 0.02 by less than half its rounding step, so
    most weights would never change. Such weights are stepped in float32 and rounded into the model afterwards.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    parameters: tuple[torch.nn.Parameter, ...]
    max_grad_norm: float
    masters: tuple[tuple[torch.nn.Parameter, torch.nn.Parameter], ...] = ()
    description: str = "AdamW"  # for the log

    def step(self) -> torch.Tensor:
        """Clip, step, clear. Returns the gradient norm before clipping, f32 scalar on the device.

        A non-finite norm skips the step: weights and moments stay as they were, and the caller sees the norm. torch's
        fused AdamW decides that on the device; for the 8-bit optimisers the host has to ask.
        """
        for weight, master in self.masters:
            master.grad = None if weight.grad is None else weight.grad.to(master.dtype)
            weight.grad = None
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.optimizer.defaults.get("fused"):
            finite = torch.isfinite(norm)
            excess = ((norm + 1e-6) / self.max_grad_norm).clamp_min(1.0)  # clip_grad_norm_'s factor, inverted
            self.optimizer.grad_scale = torch.where(finite, excess, 1.0)  # gradients are divided by it
            self.optimizer.found_inf = (~finite).float()
            self.optimizer.step()
        elif torch.isfinite(norm):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            self.optimizer.step()
        self.scheduler.step()
        self.clear()
        with torch.no_grad():
            for weight, master in self.masters:
                weight.copy_(master)
        return norm

    def clear(self) -> None:
        """Forget all gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        for weight, _ in self.masters:
            weight.grad = None

    def state_dict(self) -> dict:
        state = {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        if self.masters:
            state["masters"] = [master.detach() for _, master in self.masters]
        return state

    def load_state_dict(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        with torch.no_grad():
            for (_, master), saved in zip(self.masters, state.get("masters", ()), strict=True):
                master.copy_(saved)


def make_optimiser(
    groups: Iterable[tuple[Iterable[torch.nn.Parameter], float]], config: OptimConfig, updates: int
) -> Optimiser:
    """AdamW over (parameters, learning-rate multiple) groups with a schedule of `updates` steps.

    Parameters that need no gradient are left out. UserError where nothing is left.
    """
    from transformers import get_scheduler  # imports peft too: seconds, which readers of a reward need not wait

    settings, masters = [], []
    for parameters, scale in groups:
        matrices, vectors = [], []
        for weight in parameters:
            if not weight.requires_grad:
                continue
            parameter = weight
            if weight.dtype in (torch.bfloat16, torch.float16):
                parameter = torch.nn.Parameter(weight.detach().float())
                masters.append((weight, parameter))
            (matrices if parameter.ndim >= 2 else vectors).append(parameter)
        lr = config.learning_rate * scale
        settings.append({"params": matrices, "lr": lr, "weight_decay": config.weight_decay})
        settings.append({"params": vectors, "lr": lr, "weight_decay": 0.0})  # norms and biases are not decayed
    settings = [group for group in settings if group["params"]]
    if not settings:
        raise UserError("there is no weight to train; check model.lora and discriminator.lora.")
    parameters = tuple(p for group in settings for p in group["params"])
    optimizer, description = _optimizer(settings, config, parameters[0].device)
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=round(config.warmup_fraction * updates), num_training_steps=updates
    )
    return Optimiser(
        optimizer=optimizer,
        scheduler=scheduler,
        parameters=parameters,
        max_grad_norm=config.max_grad_norm,
        masters=tuple(masters),
        description=description + (", float32 masters" if masters else ""),
    )


def _optimizer(settings: list[dict], config: OptimConfig, device: torch.device) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer and its name for the log. The 8-bit ones keep moments of 4096 numbers or more in 8 bits, in
    blocks (Dettmers et al. 2022), of smaller tensors in float32."""
    options = {"lr": config.learning_rate, "betas": config.betas}
    if config.name == "adamw":
        return torch.optim.AdamW(settings, **options, fused=True), "AdamW"
    optim = require("bitsandbytes", f"optim.name={config.name}").optim
    if config.name == "adamw_8bit":
        return optim.AdamW8bit(settings, **options), "8-bit AdamW"
    if device.type == "cpu":  # pages move moments from GPU to host memory, where they are already
        return optim.AdamW8bit(settings, **options), "8-bit AdamW (paged on a GPU only)"
    return optim.PagedAdamW8bit(settings, **options), "paged 8-bit AdamW"
