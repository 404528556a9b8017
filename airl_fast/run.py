"""One run from its configuration to its summary: `airl-fast train`."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from airl_fast import baselines, checkpoint
from airl_fast.artifacts import POLICY, REWARD, START, keep_reader, keep_start, load_policy, save_policy, save_reward
from airl_fast.batches import Replay, rollout_stats, sample_traces, synchronise
from airl_fast.checkpoint import SignalGuard
from airl_fast.config import Config
from airl_fast.data.task import Task
from airl_fast.device import ops_backend, pick_device
from airl_fast.engines import engine_of
from airl_fast.errors import UserError
from airl_fast.evaluate.final import final_summary
from airl_fast.evaluate.plots import plot_run
from airl_fast.evaluate.summary import Summary, write_summary
from airl_fast.evaluate.watch import watch_reward
from airl_fast.lab import Lab, load_material, make_lab, make_start_model
from airl_fast.metrics import Metrics
from airl_fast.models.attention import why_not_shared
from airl_fast.models.forward import attention_kernel
from airl_fast.models.load import LanguageModel
from airl_fast.models.regimes import regimes_of
from airl_fast.overrides import plain
from airl_fast.preflight import check, what_is_trained
from airl_fast.progress import Progress
from airl_fast.rundir import RunDir
from airl_fast.saved import say_unchecked
from airl_fast.sft import SftStats
from airl_fast.state import load_state, save_state
from airl_fast.train import StepResult, fit
from airl_fast.warmup import warm_start, warm_up_discriminator

# Keys that do not change what a run computes, so that a resumed run may differ in them.
CHANGEABLE = (
    *("checkpoint_every", "keep_checkpoints", "save_rollouts_every", "tensorboard", "wandb", "output_dir"),
    "model.trust_remote_code",  # of each start anew
)

# What the live display shows of a step, under the names it shows.
SHOWN = {
    "discriminator/reward_gap": "reward gap",
    "discriminator/accuracy": "D accuracy",
    "discriminator/perturbed_accuracy": "perturbed",
    "rollout/sample_pass_at_1": "pass@1",
    "policy/entropy": "entropy",
    "policy/mismatch_kl": "mismatch KL",
    "rollout/mean_length": "length",
    "rollout/truncated": "truncated",
    "policy/loss": "loss",
    "dev/pass_at_1": "dev pass@1",
    "dev/hit_at_1": "dev Hit@1",
    "tokens_per_s": "tokens/s",
    "seconds/step": "seconds",
    "eta_s": "eta_s",
}


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


def train_run(
    config: Config, name: str, *, resume: str = "never", say: Callable[[str], None] = print
) -> Summary | None:
    """Train, save and evaluate; everything goes to `output_dir/name`. Returns the summary, None without evaluation."""
    began = time.monotonic()
    device = pick_device(config)
    start_directory = Path(config.output_dir).expanduser() / name / START
    continued = resume != "never" and _has_start(start_directory)
    material = load_material(config, say)
    if continued:
        say_unchecked(start_directory.parent)
    model = load_policy(start_directory, config.model, device) if continued else None
    model = model or make_start_model(config, material.task, device)
    check(config, material, model, device)  # what is refused leaves no directory behind
    run = RunDir.create(
        config.output_dir, name, config=plain(config), resume=resume, changeable=CHANGEABLE, device=str(device), say=say
    )
    with Progress(config.steps, name) as progress, SignalGuard() as guard:
        progress.message(f"device {device}, {torch.get_num_threads()} threads, ops on {ops_backend(device)}")
        if not continued:
            model = _warm_start(config, material.task, model, run.path / START, progress, guard)
        lab = make_lab(config, material, model, device, progress.message)
        keep_reader(config, run.path, continued=continued and run.resume_from is not None)
        _say_attention(lab, progress.message)
        for model_name, what in what_is_trained(lab).items():
            progress.message(f"{model_name}: trains {what}")
        with engine_of(lab, run.path, "test" if config.evaluate.final else None) as lab:
            progress.message(f"sampler {lab.engine.name}")
            trained = baselines.training(config, run.path) if config.evaluate.baselines else nullcontext()
            with trained as others:
                _train(lab, run, progress, guard)
                if others is not None:
                    progress.phase("baselines")
                    progress.message("wait for the baselines " + ", ".join(config.evaluate.baselines))
                    others.wait(lambda: _stop_if_asked(guard, "training is complete; continue with --resume auto"))
            if not config.evaluate.final:
                return None
            progress.phase("evaluate")

            def evaluating(text: str) -> None:
                _stop_if_asked(guard, "training is complete; evaluate with --resume auto")
                progress.message(text)

            summary = final_summary(lab, run.path, "test", lambda: time.monotonic() - began, evaluating)
            write_summary(run.path / "summary.json", summary)
            plot_run(run.path)
    return summary


def _has_start(directory: Path) -> bool:
    """UserError for a run with checkpoints whose start policy is gone: made anew it could be another one."""
    if directory.is_dir():
        return True
    if checkpoint.steps(directory.parent / "checkpoints"):
        raise UserError(
            f"{directory} is gone or leads nowhere, and the checkpoints of this run go on from it; put it back, or "
            "choose another --run-name."
        )
    return False


def _say_attention(lab: Lab, say: Callable[[str], None]) -> None:
    """Which kernel attends over the packed rows of each model, and whether its prompts are shared."""
    models = {"start policy": lab.start.model} if lab.policy is None else {"policy": lab.policy.lm.model}
    if lab.reward is not None:
        models["discriminator"] = lab.reward.model.backbone
    for name, model in models.items():
        kernel, reason = attention_kernel(model.base_model, lab.start.device), why_not_shared(model)
        if kernel is None:
            say(f"{name}: {reason}, so prompts are not shared; its own attention gets a mask of all packed rows")
        elif lab.config.model.share_prompts:
            say(f"{name}: attention by {kernel.name}; each prompt is computed once")
        else:
            say(f"{name}: attention by {kernel.name}; prompts not shared (model.share_prompts)")
        if regimes := regimes_of(model):
            say(f"{name}: other rotary factors {regimes}; a pass holds traces of one kind")


def _warm_start(
    config: Config, task: Task, lm: LanguageModel, directory: Path, progress: Progress, guard: SignalGuard
) -> LanguageModel:
    """The policy that training starts from, kept as a model directory of the run so that a resumed run finds it."""

    def report(update: int, updates: int, stats: SftStats) -> None:
        _stop_if_asked(guard, "the warm start begins again with --resume auto")
        if update % max(updates // 10, 1) == 0:
            progress.message(f"warm start {update}/{updates}: loss {stats.loss.item():.3f}")

    if config.warm_start.updates:
        progress.phase("warm start")
        lm.model.requires_grad_(True)  # the check before froze it
        warm_start(config, task, lm, lm.device, report)
    return keep_start(lm, config, directory)


def _train(lab: Lab, run: RunDir, progress: Progress, guard: SignalGuard) -> None:
    config = lab.config
    replay = Replay(config.discriminator.replay_size)
    if run.resume_from is not None:
        load_state(run.resume_from, lab, replay)
        progress.message(f"continue after step {run.start_step}")
    if lab.policy is not None:
        synchronise(lab, f"step {run.start_step}")
    if run.resume_from is None and lab.reward is not None and config.discriminator.warmup_steps:
        progress.phase("warm-up")
        warm_up_discriminator(lab, _report_warmup(progress, guard))
        save_state(run.checkpoints, 0, lab, replay)
    meter = Metrics(
        run.metrics,
        total_steps=config.steps,
        start_step=run.start_step,
        logs=run.logs if config.tensorboard else None,
        wandb=config.wandb,
        run_name=run.path.name,
        config=plain(config),
        device=lab.start.device,
    )
    bad_steps = 0

    def watch(step: int) -> dict[str, object]:
        if not config.evaluate.every or step % config.evaluate.every or not lab.material.dev:
            return {}
        progress.phase("dev")
        if lab.policy is None:
            return {"dev": watch_reward(lab)}
        traces = sample_traces(lab, lab.material.dev, 4, step, "dev")
        return {"dev": {"pass_at_1": rollout_stats(traces).sample_pass_at_1}}

    def done(step: int, result: StepResult, values: dict[str, float]) -> bool:
        nonlocal bad_steps
        bad = not all(math.isfinite(values.get(key, 0.0)) for key in ("policy/grad_norm", "discriminator/grad_norm"))
        bad_steps = bad_steps + 1 if bad else 0
        if result.traces and (bad or (config.save_rollouts_every and step % config.save_rollouts_every == 0)):
            run.write_rollouts(step, [asdict(trace) for trace in result.traces])
        if bad:
            progress.message(f"step {step}: a gradient is not finite; its update was skipped, its samples are kept")
        if bad_steps > config.max_bad_steps:
            raise UserError(f"{bad_steps} steps in a row had gradients that are not finite; lower the learning rates.")
        shown = {name: values[key] for key, name in SHOWN.items() if key in values}
        if lab.policy is None:
            shown.pop("reward gap", None)  # it compares with a policy's samples
        progress.step(step, shown)
        last = step == config.steps
        if guard.stop or last or (config.checkpoint_every and step % config.checkpoint_every == 0):
            meter.flush()
            save_state(run.checkpoints, step, lab, replay)
        return guard.stop is None

    with meter:
        step = fit(lab, run.start_step + 1, _Phases(meter, progress), replay, watch, done)
    if step < config.steps:
        _stop_if_asked(guard, f"saved after step {step}; continue with --resume auto")
    if lab.policy is not None:
        save_policy(lab.policy.lm, run.path / POLICY, listed=True)
    if lab.reward is not None:
        tokenizer = lab.reward.bridge.chat or lab.maker.chat
        save_reward(lab.reward.model, tokenizer.tokenizer, run.path / REWARD)


class _Phases:
    """A meter that also shows the phase it measures."""

    def __init__(self, meter: Metrics, progress: Progress) -> None:
        self._meter, self._progress = meter, progress
        self.log = meter.log

    def phase(self, name: str):
        self._progress.phase(name)
        return self._meter.phase(name)


def _report_warmup(progress: Progress, guard: SignalGuard):
    def report(update: int, updates: int, stats) -> None:
        _stop_if_asked(guard, "the warm-up begins again with --resume auto")
        if update % max(updates // 5, 1) == 0:
            progress.message(
                f"discriminator warm-up {update}/{updates}: loss {stats.loss.item():.3f}, "
                f"accuracy {stats.accuracy.item():.3f}"
            )

    return report


def _stop_if_asked(guard: SignalGuard, note: str) -> None:
    if guard.stop:
        raise Interrupted(f"stopped by {guard.stop}: {note}.")
