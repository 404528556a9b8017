"""Plots of what a run logs while it trains: its curves, runs overlaid, and the seconds of its phases, stacked."""

from collections.abc import Sequence

import plotly.graph_objects as go

from airl_fast.evaluate.plots import ALIASES, SHARES, Series, find_series, phases_of, smoothed
from airl_fast.report.runs import RunData
from airl_fast.report.style import GREY, PHASE_COLOURS, Panel, layout, run_colour, see_through, significant

TRAINING, TIME = "Training", "Time"
MAX_POINTS = 2000  # of a drawn line; longer runs are thinned out

# Key of metrics.jsonl -> title, axis, what it says.
CURVES = {
    "reward_gap": ("Reward gap", "logits", "Mean reward of the demonstrations minus that of the samples."),
    "d_accuracy": (
        "Discriminator accuracy",
        "%",
        "Share of tokens told apart; 50% is chance. It falls towards chance as the policy comes to sound like the "
        "expert.",
    ),
    "sample_pass_at_1": ("pass@1 of the samples", "%", "Watched only: training with AIRL never sees it."),
    "dev/pass_at_1": ("pass@1 on dev prompts", "%", "Prompts that are not trained on."),
    "mean_length": ("Length of a sample", "tokens", "Mean completion length, end of turn included."),
    "entropy": ("Entropy of the policy", "nats per token", "Near zero the policy repeats itself."),
    "mismatch_kl": ("Sampler–trainer mismatch", "KL, nats per token", "How far the sampler's numbers are off."),
    "kl_to_start": ("KL to the start policy", "nats per token", "How far the policy has moved."),
    "clip_fraction": ("Clipped tokens", "%", "Share of tokens whose ratio PPO clips."),
}
PERCENT = {*SHARES, "dev/pass_at_1", "clip_fraction"}


def curve_panels(runs: Sequence[RunData]) -> list[Panel]:
    """One panel for each curve that any run logged."""
    found = []
    for key, (title, unit, caption) in CURVES.items():
        figure = go.Figure(layout=layout("step", unit, percent=key in PERCENT and key != "clip_fraction"))
        for number, run in enumerate(runs):
            logged = find_series(run.metrics, key)
            if logged is not None:
                _add_curve(figure, run.name, run_colour(number), logged, 100.0 if key in PERCENT else 1.0)
        if not figure.data:
            continue
        if SHARES.get(key) is not None:
            figure.add_hline(
                y=100 * SHARES[key], line={"color": GREY, "dash": "dash", "width": 1},
                annotation_text="chance", annotation_font_size=10,
            )  # fmt: skip
        identity = "curve-" + ALIASES.get(key, key).replace("/", "-").replace("_", "-")
        found.append(Panel(id=identity, section=TRAINING, title=title, caption=caption, figure=figure))
    return found


def time_panels(runs: Sequence[RunData]) -> list[Panel]:
    """Seconds of every phase of each run, stacked to a step's, and the throughput of all runs."""
    found = []
    for number, run in enumerate(runs):
        phases = phases_of(run.metrics)
        if phases:
            found.append(_phase_panel(run, number, phases, len(runs) > 1))
    figure = go.Figure(layout=layout("step", "tokens per second"))
    for number, run in enumerate(runs):
        if "tokens_per_s" in run.metrics:
            _add_curve(figure, run.name, run_colour(number), run.metrics["tokens_per_s"], 1.0)
    if figure.data:
        caption = "Tokens of all traces of a step, by its seconds."
        found.append(
            Panel(
                id="throughput",
                section=TIME,
                title="Throughput",
                caption=caption,
                figure=figure,
                width="half",
                height=330,
            )
        )
    return found


def _add_curve(figure: go.Figure, name: str, colour: str, logged: Series, scale: float) -> None:
    """The logged values, faint, and a centred moving average over them."""
    steps, values = logged
    every = -(-len(steps) // MAX_POINTS)
    drawn = significant(scale * value for value in values[::every])
    mean = significant(scale * value for value in smoothed(values)[::every])
    mode = "lines" if len(steps) > 30 else "lines+markers"
    common = {"x": steps[::every], "name": name, "legendgroup": name, "mode": mode}
    faint = {"color": see_through(colour, 0.35), "width": 1}
    figure.add_scatter(y=drawn, line=faint, hovertemplate="%{y:.4~g}", **common)
    figure.add_scatter(y=mean, line={"color": colour, "width": 2.2}, hoverinfo="skip", showlegend=False, **common)


def _phase_panel(run: RunData, number: int, phases: dict[str, Series], several: bool) -> Panel:
    steps = sorted({step for recorded, _ in phases.values() for step in recorded})
    every = -(-len(steps) // MAX_POINTS)
    figure = go.Figure(layout=layout("step", "seconds per step", legend=True))
    for place, (phase, series) in enumerate(phases.items()):
        logged = dict(zip(*series, strict=True))
        seconds = smoothed([logged.get(step, 0.0) for step in steps])[::every]
        colour = PHASE_COLOURS[place % len(PHASE_COLOURS)]
        figure.add_scatter(
            x=steps[::every], y=significant(seconds), name=phase, stackgroup="phases", mode="lines",
            line={"width": 0.5, "color": colour}, fillcolor=see_through(colour, 0.75), hovertemplate="%{y:.4~g} s",
        )  # fmt: skip
    figure.update_yaxes(rangemode="tozero")
    title = f"Seconds per step: {run.name}" if several else "Seconds per step"
    caption = "Where a step's time goes, smoothed; a phase that is not logged at a step took no time there."
    return Panel(
        id=f"phases-{number}",
        section=TIME,
        title=title,
        caption=caption,
        figure=figure,
        height=330,
        width="half" if several else "full",
    )
