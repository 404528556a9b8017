"""What `airl-fast transfer` shows: tables of one cell or of a matrix, JSON, and a heat map."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from airl_fast.evaluate.correctness import estimate_document
from airl_fast.evaluate.plots import figure_of
from airl_fast.evaluate.reranking import LABELS
from airl_fast.evaluate.summary import ABSENT, LOCALISERS
from airl_fast.evaluate.tables import Grid, as_text, paragraph, percent, plain, signed_percent
from airl_fast.evaluate.transfer import Cell
from airl_fast.measures.passk import Estimate

_PICKS = ("reward", "random", "majority", "weighted_vote", "logprob", "oracle")
_STEPS = {"reward": "learned reward", "chance": "chance (exact)", "logprob": "log-probability, same rule"}


def render(cells: Sequence[Cell]) -> str:
    """One cell in full, several as matrices with policies down and tasks across."""
    parts = [_one(cells[0])] if len(cells) == 1 else _matrices(cells)
    parts.append(as_text(Grid(
        headings=("policy", "task", "prompts", "too long", "samples", "with both", "wrong steps known", "of"),
        rows=tuple((
            cell.policy, cell.task, str(cell.prompts), str(cell.left_out), str(cell.samples),
            str(cell.auroc_within.prompts), str(cell.located), cell.errors or ABSENT,
        ) for cell in cells),
        words=True,
    )))  # fmt: skip
    notes = [
        "AUROC: reward against correctness, over the prompts with both right and wrong samples; 0.5 is chance. Gain: "
        "pass@1 picked by the reward minus at random, in points, paired over prompts. Intervals: 95% over prompts."
    ]
    if any(cell.errors is None for cell in cells):
        notes.append("No wrong steps are known where prompts have no demonstrations to perturb.")
    return "\n".join([*parts, paragraph(notes)])


def _one(cell: Cell) -> str:
    picks = as_text(Grid(
        headings=(f"{cell.policy}'s samples of {cell.task}, picked by", f"pass@1|{cell.samples} [95%]"),
        rows=tuple((LABELS.get(name, name), percent(cell.picks[name])) for name in _PICKS),
    ))  # fmt: skip
    parts = [picks]
    if cell.localise:
        rows = [(_STEPS[name], each) for name in LOCALISERS if (each := cell.localise.get(name)) is not None]
        parts.append(as_text(Grid(
            headings=("first wrong step named by", "Hit@1 [95%]", "Hit@±1 [95%]"),
            rows=tuple((label, percent(each.hit_at_1), percent(each.hit_within_1)) for label, each in rows),
        )))  # fmt: skip
    rows = (
        ("pass@1 of the policy", percent(cell.pass_at_1)),
        ("gain over random", signed_percent(cell.gain)),
        ("gain over majority vote", signed_percent(cell.gain_over_majority)),
        ("AUROC within prompts", plain(cell.auroc_within.estimate)),
        ("AUROC pooled", plain(cell.auroc_pooled)),
        ("AUROC within prompts, log-probability", plain(cell.auroc_logprob.estimate)),
    )
    return "\n".join([*parts, as_text(Grid(headings=("the reward there", "[95%]"), rows=rows))])


def _matrices(cells: Sequence[Cell]) -> list[str]:
    shown: dict[str, Callable[[Cell], str]] = {
        "AUROC within prompts": lambda cell: plain(cell.auroc_within.estimate),
        "AUROC pooled": lambda cell: plain(cell.auroc_pooled),
        "rerank gain": lambda cell: signed_percent(cell.gain),
        "pass@1 of the policy": lambda cell: percent(cell.pass_at_1),
        "step Hit@1": lambda cell: percent(_hit(cell, "reward")),
        "step Hit@1, chance": lambda cell: percent(_hit(cell, "chance")),
        "step Hit@1, log-probability": lambda cell: percent(_hit(cell, "logprob")),
    }
    policies, tasks = _axes(cells)
    at = {(cell.policy, cell.task): cell for cell in cells}
    parts = []
    for title, spell in shown.items():
        if title.startswith("step") and not any(cell.localise for cell in cells):
            continue
        for some in (tasks[i : i + 3] for i in range(0, len(tasks), 3)):  # as many as fit into a line
            rows = tuple((policy, *(spell(at[policy, task]) for task in some)) for policy in policies)
            parts.append(as_text(Grid(headings=(title, *some), rows=rows)))
    return parts


def figure(cells: Sequence[Cell]) -> Figure:
    """Two heat maps, policies down and tasks across: AUROC around 0.5, and the gain around 0. Orange is worse than
    chance and purple better (PuOr, which stays apart for colour-blind readers); the values are written in."""
    policies, tasks = _axes(cells)
    at = {(cell.policy, cell.task): cell for cell in cells}
    longest = max(len(policy) for policy in policies)
    drawn = figure_of(3.0 + 0.09 * longest + 3.2 * len(tasks), 1.7 + 0.75 * len(policies))
    left, right = drawn.subplots(1, 2, sharey=True)
    auroc = [[_value(at[p, t].auroc_within.estimate) for t in tasks] for p in policies]
    gain = [[100 * at[p, t].gain.value for t in tasks] for p in policies]
    _heat(left, np.array(auroc), 0.5, 0.5, "{:.2f}", tasks, "AUROC within prompts")
    reach = max(10.0, float(np.abs(gain).max()))
    _heat(right, np.array(gain), 0.0, reach, "{:+.1f}", tasks, "rerank gain over random (points)")
    left.set_yticks(range(len(policies)), policies)
    return drawn


def as_document(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    return [
        {
            "policy": cell.policy,
            "task": cell.task,
            "prompts": cell.prompts,
            "prompts_left_out": cell.left_out,
            "samples": cell.samples,
            "pass_at_1": estimate_document(cell.pass_at_1),
            "auroc_within_prompt": estimate_document(cell.auroc_within.estimate),
            "prompts_with_both": cell.auroc_within.prompts,
            "auroc_pooled": estimate_document(cell.auroc_pooled),
            "auroc_within_prompt_logprob": estimate_document(cell.auroc_logprob.estimate),
            "rerank_pass_at_1": {name: estimate_document(estimate) for name, estimate in cell.picks.items()},
            "gain_over_random": estimate_document(cell.gain),
            "gain_over_majority": estimate_document(cell.gain_over_majority),
            "localise": {
                name: {
                    "hit_at_1": estimate_document(each.hit_at_1),
                    "hit_within_1": estimate_document(each.hit_within_1),
                    "mrr": estimate_document(each.mrr),
                }
                for name, each in cell.localise.items()
            },
            "traces_with_a_wrong_step": cell.located,
            "wrong_steps_are": cell.errors,
        }
        for cell in cells
    ]


def _heat(
    axis: Axes, values: np.ndarray, centre: float, reach: float, spell: str, tasks: Sequence[str], title: str
) -> None:
    axis.imshow(
        np.ma.masked_invalid(values), cmap="PuOr", vmin=centre - reach, vmax=centre + reach, aspect="auto", zorder=2
    )
    for (row, column), value in np.ndenumerate(values):
        dark = abs(value - centre) > 0.6 * reach
        text = ABSENT if np.isnan(value) else spell.format(value)
        axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black", size=11, zorder=3)
    axis.set_xticks(range(len(tasks)), tasks)
    axis.set_title(title)


def _axes(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    return list(dict.fromkeys(cell.policy for cell in cells)), list(dict.fromkeys(cell.task for cell in cells))


def _hit(cell: Cell, name: str) -> Estimate | None:
    found = cell.localise.get(name)
    return None if found is None else found.hit_at_1


def _value(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None else estimate.value
