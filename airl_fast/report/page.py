"""Put a report together: one HTML file with its data, styles and scripts inside, which never asks the network.

The page's content security policy allows the report's own scripts by their hash and nothing else, so that no text of
a trace can run or fetch anything, whatever it spells.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from airl_fast.errors import UserError
from airl_fast.evaluate.summary import Summary
from airl_fast.report.runs import RunData, read_runs
from airl_fast.rundir import write_atomically

STATIC = files("airl_fast.report") / "static"
SECTIONS = {
    "Training": "What each step logged, faint, and its moving average.",
    "pass@k": "How often one of several samples is right, and how often one of several picks is.",
    "Reward and correctness": "Does the learned reward, which never saw an answer key, go with being right?",
    "First wrong step": "The step that the reward names, beside the policy's own log-probability and chance.",
    "Time": "Where the seconds of a step go.",
}


def write_report(paths: Sequence[Path], output: Path, split: str = "test") -> list[RunData]:
    """Write the report of these run directories; returns what was read of each. UserError for a bad directory."""
    if find_spec("plotly") is None:
        raise UserError("a report is drawn by plotly, which is not installed; run `pip install 'airl-fast[report]'`.")
    runs = read_runs(paths, split)
    try:
        write_atomically(output, render(runs, split))
    except OSError as error:
        raise UserError(
            f"{output} could not be written ({error.strerror}); check the directory and its space."
        ) from None
    return runs


def render(runs: Sequence[RunData], split: str = "test") -> str:
    """The whole page."""
    from plotly.offline import get_plotlyjs

    from airl_fast.report.curves import curve_panels, time_panels
    from airl_fast.report.figures import evaluation_panels
    from airl_fast.report.style import BLUE, GRID, INK, SURFACE, run_colour
    from airl_fast.report.tables import differing_settings, summary_groups
    from airl_fast.report.tokens import token_views

    panels = [*curve_panels(runs), *evaluation_panels(runs), *time_panels(runs)]
    views = token_views(runs)
    scripts = {name: _static(f"{name}.js") for name in ("theme", "trace_values", "tokens", "plots")}
    scripts["plotly"] = get_plotlyjs()
    data = {
        "views": views,
        "plots": {f"plot-{panel.id}": panel.figure.to_plotly_json() for panel in panels},
        "colours": {"ink": INK, "surface": SURFACE, "grid": GRID, "blue": BLUE},
    }
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(_static("page.html")).render(
        title="airl-fast: " + ", ".join(run.name for run in runs),
        runs=[
            {"name": run.name, "path": str(run.path), "colour": run_colour(i), "config": _yaml(run.config)}
            for i, run in enumerate(runs)
        ],
        split=split,
        policy=_content_policy(scripts.values()),
        style=Markup(_static("report.css")),
        scripts={name: Markup(text) for name, text in scripts.items()},
        data=Markup(embedded_json(data)),
        missing=[sentence for run in runs for sentence in run.missing],
        tiles=headline(runs[0].summary) if len(runs) == 1 and runs[0].summary is not None else [],
        groups=summary_groups(runs),
        differences=differing_settings(runs),
        sections=[(name, text, [p for p in panels if p.section == name]) for name, text in SECTIONS.items()],
        views=views,
    )


def embedded_json(value: Any) -> str:
    """JSON for a script element: no `<`, so that nothing inside ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain)
    return text.replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Arrays and tuples inside plotly's figures."""
    return value.tolist() if hasattr(value, "tolist") else list(value)


def headline(summary: Summary) -> list[tuple[str, str, str]]:
    """(figure, what it is, what to compare it with) of one run, in the words of its table."""
    found = []
    trained = next((n for n in ("airl", "grpo", "sft") if summary.pass_at_1.get(n) is not None), None)
    start = summary.pass_at_1.get("start")
    if trained is not None and start is not None:
        against = f"start policy {_percent(start.value)}"
        found.append((_percent(summary.pass_at_1[trained].value), "pass@1 after training", against))
    picked, drawn = (summary.rerank_pass_at_1.get(name) for name in ("reward", "random"))
    if picked is not None and drawn is not None:
        label = f"pass@1 of the reward's pick of {summary.rerank_n}"
        found.append((_percent(picked.value), label, f"random pick {_percent(drawn.value)}"))
    hit, chance = (summary.localise_hit_at_1.get(name) for name in ("reward", "chance"))
    if hit is not None and chance is not None:
        found.append((_percent(hit.value), "first wrong step found", f"chance {_percent(chance.value)}"))
    if summary.auroc_within_prompt is not None:
        found.append((f"{summary.auroc_within_prompt.value:.3f}", "AUROC within a prompt", "chance 0.500"))
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _content_policy(scripts: Sequence[str]) -> str:
    """Nothing may be loaded from anywhere. Styles may be inline: plotly makes them."""
    hashes = " ".join(
        "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'" for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
