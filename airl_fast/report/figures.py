"""Plots of an evaluation: pass@k, reranking, what the reward goes with, and where it sees the first wrong step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from airl_fast.evaluate.record import Curve, Record, RewardRecord
from airl_fast.evaluate.summary import LABELS
from airl_fast.measures.localise import Localisation
from airl_fast.measures.passk import Estimate
from airl_fast.report.runs import RunData
from airl_fast.report.style import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    Panel,
    layout,
    run_colour,
    see_through,
)

PASS, REWARD, STEPS = "pass@k", "Reward and correctness", "First wrong step"
BINS = 40
# Name -> colour in a report of one run, dash. Dashes tell the lines apart without colour, and when colours mean runs.
POLICY_STYLE = {
    "start": (GREY, "dot"),
    "airl": (BLUE, "solid"),
    "grpo": (GREEN, "dashdot"),
    "sft": (ORANGE, "dash"),
    "random": (PINK, "longdash"),
}
RERANK_STYLE = {
    "reward": (BLUE, "solid"),
    "random": (GREY, "dot"),
    "oracle": (INK, "longdash"),
    "majority": (ORANGE, "dash"),
    "logprob": (PINK, "dashdot"),
    "weighted_vote": (GREEN, "longdashdot"),
}
OTHER_STYLES = ((SKY, "dash"), (VERMILION, "dot"), (GREEN, "dashdot"), (PINK, "longdash"))
SHOWN_ALONE = ("reward", "random", "oracle", "majority", "logprob")
SHOWN_OVERLAID = ("reward", "random")
NAMES = {**LABELS, "random": "random", "chance": "chance", "weighted_vote": "weighted vote"}


def evaluation_panels(runs: Sequence[RunData]) -> list[Panel]:
    """All plots for which some run has recorded what they show."""
    recorded = [(i, run, run.record) for i, run in enumerate(runs) if run.record is not None]
    if not recorded:
        return []
    rewards = [(i, run, record.reward) for i, run, record in recorded if record.reward is not None]
    panels = [_pass_panel(recorded)]
    if rewards:
        panels.append(_rerank_panel(rewards))
        panels += [_distribution_panel(i, run, reward, len(runs) > 1) for i, run, reward in rewards]
        panels += [_correlation_panel(i, run, reward, len(runs) > 1) for i, run, reward in rewards]
        panels += _localisation_panels([each for each in rewards if each[2].localisation])
    return panels


def _pass_panel(recorded: Sequence[tuple[int, RunData, Record]]) -> Panel:
    figure = go.Figure(layout=layout("k samples a prompt", "%", percent=True, legend=True))
    for number, run, record in recorded:
        for policy, curve in record.pass_at_k.items():
            colour, dash = POLICY_STYLE.get(policy, (VERMILION, "dash"))
            label = "untrained reward" if policy == "random" else NAMES.get(policy, policy)
            if len(recorded) > 1:
                label, colour = f"{run.name}: {label}", run_colour(number)
            _add_band(figure, label, curve, colour, dash)
    first = recorded[0][2]
    caption = (
        "Chance that one of k samples is right, without bias; bands are 95% intervals over prompts "
        f"({first.prompts_total} {first.split} prompts, {first.samples} samples each)."
    )
    return Panel(id="pass-at-k", section=PASS, title="pass@k", caption=caption, figure=figure, height=400, width="half")


def _rerank_panel(rewards: Sequence[tuple[int, RunData, RewardRecord]]) -> Panel:
    n = max(max(reward.rerank["reward"]) for _, _, reward in rewards)
    figure = go.Figure(layout=layout("k picks", "%", percent=True, legend=True))
    shown = SHOWN_ALONE if len(rewards) == 1 else SHOWN_OVERLAID
    for number, run, reward in rewards:
        others = iter(OTHER_STYLES * len(reward.rerank))
        wanted = reward.rerank if len(rewards) == 1 else [name for name in SHOWN_ALONE if name in reward.rerank]
        ordered = sorted(wanted, key=lambda name: [*RERANK_STYLE, name].index(name))
        for name in ordered:
            colour, dash = RERANK_STYLE.get(name) or next(others)
            label = NAMES.get(name, name.replace("_", " "))
            if len(rewards) > 1:
                label, colour = f"{run.name}: {label}", run_colour(number)
            _add_band(figure, label, reward.rerank[name], colour, dash, hidden=name not in shown)
    caption = (
        "Chance that one of k picks among all samples of the start policy is right, by who picks. Random is exact; "
        "the oracle knows the answer. Click a name to show or hide it."
    )
    return Panel(
        id="rerank", section=PASS, title=f"pass@k|{n}", caption=caption, figure=figure, height=400, width="half"
    )


def _add_band(figure: go.Figure, label: str, curve: Curve, colour: str, dash: str, hidden: bool = False) -> None:
    """A line and the band of its intervals, in per cent; they show and hide together."""
    ks = sorted(curve)
    low, value, high = ([round(100 * getattr(curve[k], part), 4) for k in ks] for part in ("low", "value", "high"))
    visible = "legendonly" if hidden else True
    fill = see_through(colour if colour != INK else GREY, 0.16)
    figure.add_scatter(
        x=[*ks, *reversed(ks)], y=[*high, *reversed(low)], fill="toself", fillcolor=fill, line_width=0,
        mode="lines", hoverinfo="skip", legendgroup=label, showlegend=False, visible=visible, name=f"{label} [95%]",
    )  # fmt: skip
    figure.add_scatter(
        x=ks, y=value, name=label, legendgroup=label, mode="lines+markers", visible=visible,
        line={"color": colour, "dash": dash, "width": 2}, marker={"size": 5, "color": colour},
        customdata=[[a, b] for a, b in zip(low, high, strict=True)],
        hovertemplate="%{y:.1f} [%{customdata[0]:.1f}, %{customdata[1]:.1f}]",
    )  # fmt: skip


def _distribution_panel(number: int, run: RunData, reward: RewardRecord, several: bool) -> Panel:
    figure = go.Figure(layout=layout(f"reward of a sample ({reward.scorer})", "% of the class", legend=True))
    values, correct = np.array(reward.rewards), np.array(reward.correct)
    edges = np.histogram_bin_edges(values, bins=BINS)
    for name, side, colour in (("correct", correct, BLUE), ("wrong", ~correct, ORANGE)):
        if not side.any():
            continue
        counts = np.histogram(values[side], bins=edges)[0]
        share = 100 * counts / side.sum()
        figure.add_bar(
            x=((edges[:-1] + edges[1:]) / 2).round(6).tolist(), y=share.round(4).tolist(), width=np.diff(edges)[0],
            name=f"{name} ({int(side.sum())})", marker={"color": see_through(colour, 0.6), "line_width": 0},
            customdata=counts.tolist(), hovertemplate="%{y:.1f}% (%{customdata} samples)",
        )  # fmt: skip
        figure.add_vline(x=float(values[side].mean()), line={"color": colour, "width": 2, "dash": "dash"})
    figure.update_layout(barmode="overlay", bargap=0)
    title = f"Rewards by correctness: {run.name}" if several else "Rewards by correctness"
    return Panel(
        id=f"distribution-{number}",
        section=REWARD,
        title=title,
        caption=_separation(reward),
        figure=figure,
        height=420,
        width="half",
    )


def _separation(reward: RewardRecord) -> str:
    """Welch's t and the AUROCs in words."""
    parts = ["Dashed: the means."]
    welch = reward.welch
    if welch is not None:
        parts.append(
            f"Welch t = {welch.t:.2f} with {welch.degrees:.0f} degrees of freedom, on the means of "
            f"{welch.prompts_correct} prompts' correct and {welch.prompts_wrong} prompts' wrong samples."
        )
    for name, estimate in (("within a prompt", reward.auroc_within_prompt), ("pooled", reward.auroc_pooled)):
        if estimate is not None:
            parts.append(f"AUROC {name} {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}].")
    if welch is None and reward.auroc_pooled is None:
        parts.append("All samples are correct, or all wrong: nothing to tell apart.")
    return " ".join(parts)


def _correlation_panel(number: int, run: RunData, reward: RewardRecord, several: bool) -> Panel:
    matrix = reward.correlations
    varying = [i for i, row in enumerate(matrix.values) if row[i] is not None]
    constant = [name for i, name in enumerate(matrix.names) if i not in varying]
    names = [NAMES.get(matrix.names[i], matrix.names[i].replace("_", " ")) for i in varying]
    values = [[round(matrix.values[i][j], 4) for j in varying] for i in varying]
    figure = go.Figure(layout=layout("", "", unified=False))
    figure.add_heatmap(
        z=values, x=names, y=names, zmin=-1, zmax=1, colorscale=[list(stop) for stop in DIVERGING], xgap=1, ygap=1,
        texttemplate="%{z:.2f}", hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "tickvals": [-1, -0.5, 0, 0.5, 1]}, textfont={"size": 10},
    )  # fmt: skip
    figure.update_xaxes(tickangle=-35)
    figure.update_yaxes(autorange="reversed")
    caption = "Pearson correlation over all samples."
    if constant:
        caption += f" Left out, because they never vary: {', '.join(constant)}."
    title = f"Correlations: {run.name}" if several else "Correlations"
    return Panel(
        id=f"correlation-{number}",
        section=REWARD,
        title=title,
        caption=caption,
        figure=figure,
        height=460,
        width="half",
    )


MEASURES: Mapping[str, tuple[str, Callable[[Localisation], Estimate], str]] = {
    "hit-at-1": ("Hit@1", lambda found: found.hit_at_1, "The named step is the first wrong one."),
    "hit-within-1": ("Hit@±1", lambda found: found.hit_within_1, "It is the first wrong step or a neighbour of it."),
    "mrr": ("Mean reciprocal rank", lambda found: found.mrr, "100% when the first wrong step always ranks first."),
}


def _localisation_panels(rewards: Sequence[tuple[int, RunData, RewardRecord]]) -> list[Panel]:
    """Bars by rule for each measure. Dashed: chance. Dotted: the most that guessing by position can score."""
    if not rewards:
        return []
    rules = [name for name in rewards[0][2].localisation if name not in ("chance", "majority_position")]
    rules.sort(key=lambda name: (name not in ("reward", "logprob"), name.startswith("logprob")))
    labels = [_rule_label(name, rewards[0][2].localise) for name in rules]
    panels = []
    for identity, (title, measure, meaning) in MEASURES.items():
        figure = go.Figure(layout=layout("%", "", legend=len(rewards) > 1, unified=False))
        for number, run, reward in rewards:
            known = [(label, reward.localisation.get(name)) for label, name in zip(labels, rules, strict=True)]
            alone = [PINK if name.startswith("logprob") else BLUE for name in rules]
            _add_bars(figure, run.name, known, measure, alone if len(rewards) == 1 else run_colour(number))
            chance = reward.localisation["chance"]
            named = len(rewards) == 1
            _add_baseline(figure, measure(chance).value, "dash", "chance", "right" if named else None)
            position = reward.localisation.get("majority_position")
            if position is not None:
                _add_baseline(figure, measure(position).value, "dot", "position", "left" if named else None)
        figure.update_layout(barmode="group", bargap=0.35, margin_t=24)
        figure.update_xaxes(range=[0, 105], showgrid=True)
        figure.update_yaxes(autorange="reversed", showgrid=False)
        traces = ", ".join(str(reward.localisation["chance"].traces) for _, _, reward in rewards)
        caption = (
            f"{meaning} Dashed: chance. Dotted: the most that guessing by position can score. "
            f"{traces} traces with a known first wrong step; 95% intervals over prompts."
        )
        height = 70 + 28 * len(rules) * max(len(rewards), 1) + 30 * (len(rewards) > 1)
        panels.append(
            Panel(
                id=f"localise-{identity}",
                section=STEPS,
                title=title,
                caption=caption,
                figure=figure,
                height=max(height, 240),
            )
        )
    return panels


def _rule_label(name: str, own: str) -> str:
    signal, _, rule = name.partition("_")
    return f"{ {'reward': 'reward', 'logprob': 'log-prob.'}[signal] }, {(rule or own).replace('_', ' ')}"


def _add_bars(figure: go.Figure, name: str, known: Sequence[tuple[str, Localisation | None]], measure, colour) -> None:
    present = [(label, measure(found)) for label, found in known if found is not None]
    if isinstance(colour, list):
        colour = [c for c, (_, found) in zip(colour, known, strict=True) if found is not None]
    value, low, high = ([round(100 * getattr(e, part), 4) for _, e in present] for part in ("value", "low", "high"))
    figure.add_bar(
        y=[label for label, _ in present], x=value, orientation="h", name=name, marker={"color": colour},
        error_x={
            "type": "data", "symmetric": False, "color": INK, "thickness": 1.2, "width": 3,
            # An exact expectation can lie a rounding error outside its own interval.
            "array": [max(h - v, 0.0) for h, v in zip(high, value, strict=True)],
            "arrayminus": [max(v - b, 0.0) for b, v in zip(low, value, strict=True)],
        },
        customdata=[[a, b] for a, b in zip(low, high, strict=True)],
        hovertemplate="%{y}: %{x:.1f} [%{customdata[0]:.1f}, %{customdata[1]:.1f}]<extra></extra>",
    )  # fmt: skip


def _add_baseline(
    figure: go.Figure, value: float, dash: str, label: str, anchor: Literal["left", "right"] | None
) -> None:
    """anchor: which end of its name stands at the line; None leaves the name out."""
    place = {"yref": "paper", "y": 1.0, "yanchor": "bottom", "xanchor": anchor, "xshift": 0, "font_size": 10}
    figure.add_vline(
        x=round(100 * value, 4),
        line={"color": INK, "dash": dash, "width": 1.5},
        annotation={"text": f" {label} {100 * value:.0f} ", **place} if anchor else None,
    )
