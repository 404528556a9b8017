"""A study of reranking: every way to pick one of a prompt's samples, against chance and the majority, and by how many
samples there are to pick from.

Notation: P prompts, N samples a prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from airl_fast.evaluate.correctness import estimate_document
from airl_fast.evaluate.plots import BLUE, GREEN, GREY, ORANGE, PINK, VERMILION, figure_of
from airl_fast.evaluate.tables import Grid, as_text, in_brackets, paragraph, percent, signed_percent
from airl_fast.measures.passk import Estimate, Floats, mean_estimate, pass_at_k_per_prompt
from airl_fast.measures.rerank import Reranking, rerank, vote_weights
from airl_fast.measures.subsets import best_of_subset, sizes, vote_of_subset

VOTES = {"weighted_vote": "reward"}  # the score whose probabilities are the votes
LABELS = {
    "reward": "learned reward",
    "random": "random (exact)",
    "majority": "majority vote",
    "weighted_vote": "reward-weighted vote",
    "logprob": "mean log-probability",
}
_FIRST = ("reward", "random", "majority", "weighted_vote", "logprob")
_LINES = {
    "reward": BLUE,
    "weighted_vote": GREEN,
    "majority": ORANGE,
    "logprob": PINK,
    "random": GREY,
    "oracle": VERMILION,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """scores: f64 [P, N] by name, -inf for a sample never to be preferred. correct: bool [P, N]. classes: int [P, N],
    equal answers share a number (rerank.answer_classes)."""

    scores: Mapping[str, Floats]
    correct: NDArray[np.bool_]
    classes: NDArray[np.int64]

    @property
    def samples(self) -> int:
        return self.correct.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class BySize:
    """pass@1 when one of m samples is picked, by way of picking, for every m of `sizes`; over all subsets of m, but
    where `drawn` names the m, in which votes are over subsets drawn at random."""

    sizes: tuple[int, ...]
    estimates: Mapping[str, tuple[Estimate, ...]]
    drawn: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankStudy:
    """at: pass@k|N by k, ascending."""

    at: Mapping[int, Reranking]
    by_size: BySize


def study(pool: Pool, ks: Sequence[int]) -> RerankStudy:
    votes = {name: vote_weights(pool.scores[of]) for name, of in VOTES.items()}
    at = {k: rerank(pool.correct, pool.scores, k=k, classes=pool.classes, votes=votes) for k in sorted({1, *ks})}
    return RerankStudy(at=at, by_size=_by_size(pool))


def _by_size(pool: Pool) -> BySize:
    wanted, drawn = sizes(pool.samples), []
    found: dict[str, list[Estimate]] = {}

    def add(name: str, per_prompt: Floats) -> None:
        found.setdefault(name, []).append(mean_estimate(per_prompt))

    for m in wanted:
        for name, values in pool.scores.items():
            add(name, best_of_subset(values, pool.correct, m))
        add("random", pass_at_k_per_prompt(pool.correct, 1))
        add("oracle", pass_at_k_per_prompt(pool.correct, m))
        weights = {name: vote_weights(pool.scores[of]) for name, of in VOTES.items()}
        for name, weight in {"majority": None, **weights}.items():
            picked, exact = vote_of_subset(pool.classes, pool.correct, m, weight)
            add(name, picked)
        if not exact:
            drawn.append(m)
    return BySize(sizes=wanted, estimates={name: tuple(row) for name, row in found.items()}, drawn=tuple(drawn))


def render(found: RerankStudy) -> str:
    first = found.at[1]
    names = _ordered(first.estimates)
    tables = [
        as_text(Grid(
            headings=("picked by", f"pass@1|{first.n} [95%]", "minus random", "minus majority"),
            rows=tuple((
                _label(name),
                percent(first.estimates[name]),
                *(signed_percent(None if name == other else first.difference(name, other))
                  for other in ("random", "majority")),
            ) for name in names),
        )),
    ]  # fmt: skip
    others = [k for k in found.at if k > 1]
    if others:
        headings = ("the best k by", *(f"pass@{k}|{first.n} [95%]" for k in others))
        rows = tuple((_label(name), *(percent(found.at[k].estimates[name]) for k in others)) for name in names)
        tables.append(as_text(Grid(headings=headings, rows=rows)))
    sizes_ = found.by_size.sizes
    if len(sizes_) > 1:
        headings = ("pass@1, picked from", *(f"{m} sample{'s' if m > 1 else ''}" for m in sizes_))
        rows = tuple((_label(name), *map(_whole, found.by_size.estimates[name])) for name in names)
        tables.append(as_text(Grid(headings=headings, rows=rows)))
        note = f"Fewer samples: the exact mean over all subsets of the {first.n}"
        drawn = " and ".join(map(str, found.by_size.drawn))
        note += f"; for votes among {drawn}, over 500 subsets drawn at random." if drawn else "."
        tables.append(paragraph([note]))
    return "\n".join(tables)


def figure(found: RerankStudy) -> Figure:
    """pass@1 by the number of samples to pick from, with intervals as bands for the reward and the majority."""
    drawn = figure_of(7.5, 4.6)
    axis = drawn.subplots()
    places = range(len(found.by_size.sizes))
    for name, colour in _LINES.items():
        row = found.by_size.estimates[name]
        style = "--" if name in ("random", "oracle") else "-"
        axis.plot(places, [100 * e.value for e in row], style, color=colour, marker="o", markersize=4)
        axis.annotate(
            _label(name), (len(row) - 1, 100 * row[-1].value), xytext=(6, 0), textcoords="offset points", va="center",
            color=colour, size=8,
        )  # fmt: skip
        if name in ("reward", "majority"):
            axis.fill_between(places, [100 * e.low for e in row], [100 * e.high for e in row], color=colour, alpha=0.15)
    axis.set_xticks(places, map(str, found.by_size.sizes))
    axis.set_xlabel("samples to pick from")
    axis.set_xlim(-0.2, len(places) - 1 + 0.38 * max(len(places) - 1, 1))
    axis.set_title("pass@1 of the pick (%), bands: 95% over prompts")
    return drawn


def as_document(found: RerankStudy) -> dict[str, Any]:
    first = found.at[1]
    return {
        "samples": first.n,
        "at_k": {
            str(k): {
                name: {
                    **estimate_document(estimate),
                    "minus_random": estimate_document(each.difference(name, "random")),
                    "minus_majority": estimate_document(each.difference(name, "majority")),
                }
                for name, estimate in each.estimates.items()
            }
            for k, each in found.at.items()
        },
        "by_size": {
            "sizes": list(found.by_size.sizes),
            "pass_at_1": {name: list(map(estimate_document, row)) for name, row in found.by_size.estimates.items()},
            "votes_over_drawn_subsets": list(found.by_size.drawn),
        },
        "per_prompt": {name: values.tolist() for name, values in first.per_prompt.items()},
    }


def _ordered(names: Mapping[str, Any]) -> list[str]:
    return [*_FIRST, *(name for name in names if name not in (*_FIRST, "oracle")), "oracle"]


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _whole(estimate: Estimate) -> str:
    return in_brackets(estimate, lambda x: f"{100 * x:.0f}")
