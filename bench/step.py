"""Time one AIRL step against the padded, unshared way of computing the same, and against TRL's GRPOTrainer.

    python -m bench.step [--json OUT.json] [--prompts 8 --group 16 --prompt-tokens 64 --completion-tokens 64]

Every variant runs in a process of its own, one after the other, `--rounds` times over; medians are of all timed steps.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.errors import BadArgument, Parser, run_command
from bench.peers._packages import installed
from bench.report import short, table
from bench.results import commit, device_name
from bench.step_flops import gemm_tflops
from bench.step_setup import BUILDS, Scenario, save_model
from bench.step_variants import PHASES, UPDATES, VARIANTS, Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One variant. tokens_per_s: sampled tokens over the whole step. update_tokens_per_s: over discriminator update,
    scores and policy update. model_flops_utilisation: of the policy's update, against gemm_tflops, None for a peer.
    peak_mib: the process's most memory, its libraries' included (on CUDA the allocator's). ratio_to: this variant's
    tokens/s over another's; ratio_to_in_updates: its update_tokens_per_s over another's."""

    name: str
    backend: str
    seconds: float
    phase_seconds: dict[str, float]
    tokens_per_s: float
    update_tokens_per_s: float | None
    model_flops_utilisation: float | None
    peak_mib: float
    start_mib: float
    ratio_to: dict[str, float]
    ratio_to_in_updates: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench step", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    scenario = scenario_of(options)
    names = [name for name in options.variants.split(",") if name]
    if unknown := set(names) - set(VARIANTS):
        raise BadArgument(f"--variants: no variant {sorted(unknown)[0]}; choose from {', '.join(VARIANTS)}.")
    if "trl" in names and installed("trl") is None:
        names.remove("trl")
        print("trl left out: the package trl is not installed; `make peers` installs it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document = measure(scenario, names, options.steps, options.rounds, device)
    print(render(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="bench step", description=__doc__.split("\n")[0])
    add_scenario(parser)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a process, after two that are not")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant, in turns")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--json", type=Path)
    return parser


def add_scenario(parser: Parser) -> None:
    for name, value in asdict(Scenario()).items():
        choices = tuple(BUILDS) if name == "size" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, dest=name, choices=choices)


def scenario_of(options: Namespace) -> Scenario:
    return Scenario(**{name: getattr(options, name) for name in Scenario.__dataclass_fields__})


def measure(scenario: Scenario, names: Sequence[str], steps: int, rounds: int, device: torch.device) -> dict:
    """The document that --json writes."""
    found: dict[str, list[Measured]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        save_model(scenario, Path(folder))
        for number in range(rounds):
            for name in names:
                print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
                found[name].append(_run(name, folder, scenario, steps, device))
    rate = gemm_tflops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    reports = _compare([_report(scenario, runs, rate) for runs in found.values()])
    return {
        "device": device_name(device),
        "versions": {name: installed(name) for name in ("torch", "transformers", "trl")},
        "commit": commit(),
        "scenario": asdict(scenario),
        "gemm_tflops": rate,
        "rows": [asdict(report) for report in reports],
    }


def _run(name: str, folder: str, scenario: Scenario, steps: int, device: torch.device) -> Measured:
    command = [sys.executable, "-m", "bench.step_variants"]
    command += [name, folder, json.dumps(asdict(scenario)), str(steps), str(device)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise BadArgument(f"the variant {name} failed:\n{run.stderr[-3000:]}")
    return Measured(**json.loads(run.stdout.strip().splitlines()[-1]))


def _report(scenario: Scenario, runs: Sequence[Measured], rate: float) -> StepReport:
    seconds = statistics.median(s for run in runs for s in run.seconds)
    phases = [phase for run in runs for phase in run.phases]
    named = [name for name in PHASES if any(name in phase for phase in phases)]
    phase_seconds = {name: statistics.median(phase.get(name, 0.0) for phase in phases) for name in named}
    work, whole = runs[0].work, set(UPDATES) <= phase_seconds.keys()
    updates = sum(phase_seconds[name] for name in UPDATES) if whole else None
    return StepReport(
        name=runs[0].name,
        backend=runs[0].backend,
        seconds=seconds,
        phase_seconds=phase_seconds,
        tokens_per_s=scenario.tokens / seconds,
        update_tokens_per_s=scenario.tokens / updates if updates else None,
        model_flops_utilisation=work["policy"] / phase_seconds["policy"] / rate if work else None,
        peak_mib=max(run.peak_mib for run in runs),
        start_mib=statistics.median(run.start_mib for run in runs),
        ratio_to={},
        ratio_to_in_updates={},
    )


def _compare(reports: list[StepReport]) -> list[StepReport]:
    def against(mine: StepReport, field: str) -> dict[str, float]:
        own = getattr(mine, field)
        others = {r.name: getattr(r, field) for r in reports if r is not mine}
        return {name: own / value for name, value in others.items() if own and value}

    return [
        StepReport(
            **asdict(r)
            | {
                "ratio_to": against(r, "tokens_per_s"),
                "ratio_to_in_updates": against(r, "update_tokens_per_s"),
            }
        )
        for r in reports
    ]


def render(document: dict) -> str:
    scenario, rows = document["scenario"], document["rows"]
    header = ["", *(row["name"] for row in rows)]
    lines = [["seconds a step", *(short(row["seconds"]) for row in rows)]]
    lines += [[f"  {name}", *(short(row["phase_seconds"].get(name, float("nan"))) for row in rows)] for name in PHASES]
    lines.append(["tokens/s", *(short(row["tokens_per_s"]) for row in rows)])
    lines.append(["tokens/s in the updates", *(short(row["update_tokens_per_s"] or float("nan")) for row in rows)])
    lines.append(["MFU, policy update", *(_percent(row["model_flops_utilisation"]) for row in rows)])
    lines.append(["peak MiB", *(short(row["peak_mib"]) for row in rows)])
    lines.append(["  before the first step", *(short(row["start_mib"]) for row in rows)])
    first = rows[0]
    ratios = [f"{first['name']} makes {r:.1f}x the tokens/s of {name}" for name, r in first["ratio_to"].items()]
    ratios += [f"in the update phases {r:.2f}x those of {name}" for name, r in first["ratio_to_in_updates"].items()]
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in scenario.items())
    backends = [f"{row['name']}: {row['backend']}" for row in rows]
    title = f"{document['device']}; {sizes}; GEMM {document['gemm_tflops']:.3g} TFLOP/s"
    return "\n".join([title, table(header, lines), *ratios, *backends])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


if __name__ == "__main__":
    sys.exit(main())
