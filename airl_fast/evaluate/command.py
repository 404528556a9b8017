"""`airl-fast eval RUN`: the comparison of a finished run on any split and any k."""

import time
from pathlib import Path

from airl_fast.artifacts import START, load_policy
from airl_fast.device import pick_device
from airl_fast.engines import engine_of
from airl_fast.errors import UserError
from airl_fast.evaluate.final import pass_table, sample_policies, summarise
from airl_fast.evaluate.summary import render_table, write_summary
from airl_fast.lab import Lab, load_material, make_lab
from airl_fast.saved import run_config


def evaluate_command(
    run: Path,
    split: str,
    ks: tuple[int, ...],
    prompts: int | None,
    samples: int | None,
    *,
    trust_remote_code: bool = False,
) -> str:
    """Write RUN/eval/SPLIT.json and return its table, followed by pass@k for every k asked for."""
    began = time.monotonic()
    lab = open_run(run, prompts, samples, trust_remote_code=trust_remote_code)
    if max(ks) > lab.config.evaluate.samples:
        raise UserError(
            f"--k {max(ks)}: more than the {lab.config.evaluate.samples} samples per prompt; raise --samples."
        )
    with engine_of(lab, run, split) as sampling:
        measured = sample_policies(sampling, run, split, print)
    summary = summarise(lab, run, measured, split, lambda: time.monotonic() - began, print)
    write_summary(run / "eval" / f"{split}.json", summary)
    lines = [render_table(summary), f"pass@k on {split}, 95% intervals over prompts"]
    for name, row in pass_table(measured, ks).items():
        cells = [f"{k}: {100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]" for k, e in row.items()]
        lines.append(f"  {name:8} " + "   ".join(cells))
    return "\n".join(lines) + "\n"


def open_run(
    run: Path, prompts: int | None = None, samples: int | None = None, *, trust_remote_code: bool = False
) -> Lab:
    """The lab of a finished run, around its start policy; its other models are loaded where they are needed.

    trust_remote_code: whether the run's model directories may run Python files of their own.
    """
    words = []
    words += [] if prompts is None else [f"evaluate.prompts={prompts}"]
    words += [] if samples is None else [f"evaluate.samples={samples}"]
    config = run_config(run, words, trust_remote_code=trust_remote_code)
    if not (run / START).is_dir():
        raise UserError(f"{run} has no start policy; continue the run with --resume auto.")
    device = pick_device(config)
    material = load_material(config)
    return make_lab(config, material, load_policy(run / START, config.model, device), device)
