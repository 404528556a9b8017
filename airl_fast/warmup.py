"""What comes before the first step: the supervised warm start of the policy and the warm-up of the discriminator."""

from collections.abc import Callable
from dataclasses import replace

import torch

from airl_fast import batches, sft
from airl_fast.config import Config, OptimConfig
from airl_fast.data.task import Task
from airl_fast.errors import UserError
from airl_fast.lab import Lab, make_maker
from airl_fast.microbatch import TokenBudget
from airl_fast.models.load import LanguageModel
from airl_fast.optim import make_optimiser
from airl_fast.pack import pack
from airl_fast.types import Kind

Report = Callable[[int, int, object], None]  # update, updates, stats


def warm_start(config: Config, task: Task, lm: LanguageModel, device: torch.device, report: Report) -> None:
    """Supervised updates on the task's `warmstart` traces: gives a fresh model the format and a little skill."""
    settings = config.warm_start
    maker = make_maker(config, task, lm)
    corpus = [maker.expert(example, 0) for example in task.load("warmstart", settings.examples) if example.expert]
    if not corpus:
        raise UserError(
            f"warm_start.updates={settings.updates}: task {task.name} has no warm-start traces; set it to 0."
        )
    optim = OptimConfig(learning_rate=settings.learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    optimiser = make_optimiser([(lm.model.parameters(), 1.0)], optim, settings.updates)
    budget = TokenBudget(config.policy.optim.tokens_per_micro_batch, "policy.optim.tokens_per_micro_batch")
    generator = torch.Generator().manual_seed(config.seed)
    for update in range(1, settings.updates + 1):
        chosen = torch.randint(len(corpus), (settings.batch_size,), generator=generator).tolist()
        batch = pack([corpus[i] for i in chosen], device, regimes=lm.regimes)
        stats = sft.update(lm, batch, optimiser, budget)
        report(update, settings.updates, stats)


def warm_up_discriminator(lab: Lab, report: Report) -> None:
    """Updates on pairs of demonstration, start-policy samples and perturbed traces of the same prompts.

    The samples are drawn once for all prompts: the start policy does not change.
    """
    settings = lab.config.discriminator
    if settings.warmup_steps == 0 or lab.reward is None:
        return
    model, bridge = lab.reward.model, lab.reward.bridge
    prompts = list(lab.material.train[: settings.warmup_prompts])
    samples = batches.sample_traces(lab, prompts, settings.warmup_samples, 0, "warmup")
    experts = batches.expert_traces(lab, prompts)
    optim = settings.optim.model_copy(
        update={"learning_rate": settings.warmup_learning_rate or settings.optim.learning_rate}
    )
    groups = [(model.backbone.parameters(), 1.0), (model.head.parameters(), settings.head_lr_scale)]
    optimiser = make_optimiser(groups, optim, settings.warmup_steps)
    for update in range(1, settings.warmup_steps + 1):
        rng = lab.rng(update, "warmup-batch")
        chosen = rng.sample(range(len(prompts)), min(settings.warmup_batch, len(prompts)))
        own = [replace(experts[i], group=g) for g, i in enumerate(chosen)]
        for g, i in enumerate(chosen):
            first = i * settings.warmup_samples
            own += [replace(trace, group=g) for trace in samples[first : first + settings.warmup_samples]]
        examples = [prompts[i] for i in chosen]
        for kind in (Kind.EXPERT, Kind.POLICY):
            own += batches.perturbed_traces(lab, examples, own, kind, -update)
        stats = model.update(bridge.pack(own, examples), optimiser)
        report(update, settings.warmup_steps, stats)
