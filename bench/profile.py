"""Where an AIRL step's time goes: matrix products, attention, our operations, everything else, by phase.

    python -m bench.profile [--json OUT.json] [--prompts 8 --group 16 --prompt-tokens 64 --completion-tokens 64]

One process profiles `--steps` steps after two that are not. A phase's seconds are the host's, measured; the parts are
what torch's profiler saw inside it (on CUDA the device's time, so that "other" is what the device did not spend on any
kernel of the profile's list, waiting included).
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from airl_fast.batches import Replay
from airl_fast.metrics import Metrics
from airl_fast.train import airl_step
from bench.errors import Parser, run_command
from bench.report import table
from bench.results import commit, device_name
from bench.step import add_scenario, scenario_of
from bench.step_setup import Scenario, lab_of, save_model
from bench.step_variants import PHASES, WARM

PARTS = ("products", "attention", "our operations", "other")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_ATTENTION = ("attention", "flash")
_MARK = "phase "


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench profile", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="bench profile", description=__doc__.split("\n")[0])
    add_scenario(parser)
    parser.add_argument("--steps", type=int, default=5, help="profiled steps, after two that are not")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    document = measure(scenario_of(options), max(options.steps, 1), device)
    print(render(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


class Marked(Metrics):
    """Names every phase in the profile."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with super().phase(name), record_function(_MARK + name):
            yield


def measure(scenario: Scenario, steps: int, device: torch.device) -> dict:
    """The document that --json writes: seconds of a step by phase, and of each part in it."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(scenario, Path(folder))
        lab = lab_of(scenario, Path(folder), device)
        with Marked(Path(folder) / "m.jsonl", total_steps=WARM + steps, device=device) as meter:
            replay = Replay(0)

            def step(number: int) -> None:
                result = airl_step(lab, number, meter, replay)
                meter.log(number, tokens=result.tokens, **result.records)

            for number in range(1, WARM + 1):
                step(number)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
            with profile(activities=activities) as profiled:
                for number in range(WARM + 1, WARM + steps + 1):
                    step(number)
    return {
        "device": device_name(device),
        "commit": commit(),
        "scenario": {name: getattr(scenario, name) for name in Scenario.__dataclass_fields__},
        "phases": _by_phase(profiled.events(), steps, device),
    }


def _by_phase(events: Sequence, steps: int, device: torch.device) -> dict[str, dict[str, float]]:
    """{phase: {"seconds" and each part: seconds a step}}. An operation belongs to the phase in which it began."""
    phases = sorted(
        (e.time_range.start, e.time_range.end, e.name.removeprefix(_MARK))
        for e in events
        if e.name.startswith(_MARK) and e.device_type == torch.autograd.DeviceType.CPU
    )
    total: dict[str, Counter[str]] = {name: Counter() for name in PHASES}
    for start, end, name in phases:
        total[name]["seconds"] += end - start
    place = 0
    for event in sorted(events, key=lambda e: e.time_range.start):
        while place < len(phases) and event.time_range.start >= phases[place][1]:
            place += 1
        part = _part(event.name)
        if part is None or place == len(phases) or event.time_range.start < phases[place][0]:
            continue
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        total[phases[place][2]][part] += spent
    found = {}
    for name, counts in total.items():
        parts = {part: counts[part] for part in PARTS[:-1]}
        rest = max(counts["seconds"] - sum(parts.values()), 0.0)
        seconds = {"seconds": counts["seconds"], **parts, PARTS[-1]: rest}
        found[name] = {key: value / steps / 1e6 for key, value in seconds.items()}
    return found


def _part(name: str) -> str | None:
    if name in _PRODUCTS:
        return "products"
    if name.startswith("aten::") and any(word in name for word in _ATTENTION):
        return "attention"
    return "our operations" if name.startswith("airl_kernels::") else None


def render(document: dict) -> str:
    rows = {name: parts for name, parts in document["phases"].items() if parts["seconds"] >= 5e-4}
    whole = {key: sum(parts[key] for parts in document["phases"].values()) for key in ("seconds", *PARTS)}
    lines = [[name, *(f"{1e3 * parts[key]:.1f}" for key in ("seconds", *PARTS))] for name, parts in rows.items()]
    lines.append(["step", *(f"{1e3 * whole[key]:.1f}" for key in ("seconds", *PARTS))])
    sizes = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in document["scenario"].items())
    kernels = whole["products"] + whole["attention"]
    return "\n".join(
        [
            f"{document['device']}; {sizes}; milliseconds a step",
            table(["phase", "all", *PARTS], lines),
            f"products and attention are {100 * kernels / whole['seconds']:.0f}% of the step: with everything else "
            f"free it would be {whole['seconds'] / kernels:.1f} times as fast",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
