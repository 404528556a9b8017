"""A comparison to look at: tables, a figure of accuracy against generated tokens, and the same as JSON."""

from collections.abc import Mapping
from dataclasses import asdict

from matplotlib.figure import Figure

from airl_fast.evaluate.plots import BLUE, GREEN, GREY, ORANGE, PINK, VERMILION, figure_of
from airl_fast.evaluate.tables import Grid, as_text, paragraph, percent, signed_percent
from airl_fast.guided.compare import Baseline, Comparison, Row
from airl_fast.guided.pool import VOTE_SUBSETS

_COLOURS = {"steps": BLUE, "tokens": VERMILION, "reject": GREEN, "revise": PINK, "none": "black"}
_MARKERS = {"steps": "o", "tokens": "s", "reject": "^", "revise": "D", "none": "x"}
_NAMES = {
    "steps": "beam over steps",
    "tokens": "re-weighted tokens",
    "reject": "early rejection",
    "revise": "self-revision",
    "none": "best of N, one draw",
}


def render(comparison: Comparison, title: str) -> str:
    """Plain text of at most 100 columns; rates in per cent with 95% intervals over prompts."""
    rows = comparison.rows
    parts = [paragraph([title]), as_text(_spent(comparison)), as_text(_at_equal_tokens(rows))]
    rejected = [row for row in rows if row.loss is not None]
    if rejected:
        parts.append(as_text(_rejected(rejected)))
    parts.append(paragraph(_notes(comparison)))
    return "\n".join(parts)


def _spent(comparison: Comparison) -> Grid:
    def line(label: str, accuracy: str, one: Row | Baseline) -> tuple[str, ...]:
        return (label, accuracy, f"{one.tokens:.1f}", f"{one.scored:.1f}", f"{one.seconds:.1f}")

    baselines = [line(f"best of {one.n}", percent(one.best_of), one) for one in comparison.baselines]
    methods = [line(row.label, percent(row.accuracy), row) for row in comparison.rows]
    return Grid(
        headings=("method", "accuracy [95%]", "tokens", "scored", "s"),
        rows=(("random pick (exact)", percent(comparison.random), "", "", ""), *baselines, *methods),
    )


def _at_equal_tokens(rows: tuple[Row, ...]) -> Grid:
    return Grid(
        headings=("at equal tokens", "N", "best of N", "majority of N", "method − best of N"),
        rows=tuple(
            (row.label, f"{row.equal_n:.1f}", percent(row.best_of), percent(row.vote), signed_percent(row.difference))
            for row in rows
        ),
    )


def _rejected(rows: list[Row]) -> Grid:
    return Grid(
        headings=("early rejection", "tokens saved", "accuracy lost to all samples finished"),
        rows=tuple((row.label, f"{100 * row.saved:.1f}%", signed_percent(row.loss)) for row in rows),
    )


def _notes(comparison: Comparison) -> list[str]:
    return [
        "tokens: sampled for a prompt, discarded ones too. scored: completion tokens that the discriminator read. "
        "s: seconds for all prompts.",
        "N: how many plain samples cost as many tokens; a fraction is the two neighbouring N, mixed. Best of N is its "
        f"exact expectation over subsets of {comparison.pool} samples a prompt, the vote a mean over {VOTE_SUBSETS} "
        "subsets.",
        "Accuracies in per cent; intervals resample prompts"
        + (f", of which each was solved {comparison.repeats} times." if comparison.repeats > 1 else "."),
    ]


def figure(comparison: Comparison, title: str) -> Figure:
    """Accuracy against generated tokens: best-of-N and its vote as lines, every method with its intervals."""
    drawn = figure_of(8.4, 5.2)
    axis = drawn.subplots()
    axis.set_title(title)
    baselines = comparison.baselines
    tokens = [one.tokens for one in baselines]
    for name, colour, style in (("best_of", "black", "-"), ("vote", ORANGE, "--")):
        found = [getattr(one, name) for one in baselines]
        label = {"best_of": "best of N (exact)", "vote": "majority of N"}[name]
        axis.plot(tokens, [100 * e.value for e in found], style, color=colour, linewidth=1.6, label=label)
        axis.fill_between(
            tokens, [100 * e.low for e in found], [100 * e.high for e in found], color=colour, alpha=0.10, linewidth=0
        )
    for one in baselines:
        axis.annotate(f"{one.n}", (one.tokens, 100 * one.best_of.value), (0, -12), textcoords="offset points", size=7)
    axis.axhline(100 * comparison.random.value, color=GREY, linestyle=":", linewidth=1.2, label="random pick")
    for kind in dict.fromkeys(row.kind for row in comparison.rows):
        own = sorted((row for row in comparison.rows if row.kind == kind), key=lambda row: row.tokens)
        values = [100 * row.accuracy.value for row in own]
        # An exact expectation can lie a rounding error outside its own interval.
        low = [max(v - 100 * row.accuracy.low, 0.0) for v, row in zip(values, own, strict=True)]
        high = [max(100 * row.accuracy.high - v, 0.0) for v, row in zip(values, own, strict=True)]
        axis.errorbar(
            [row.tokens for row in own],
            values,
            yerr=[low, high],
            color=_COLOURS[kind],
            marker=_MARKERS[kind],
            markersize=6,
            capsize=3,
            linewidth=1.2,
            elinewidth=0.8,
            label=_NAMES[kind],
        )
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlabel("generated tokens a prompt, discarded ones included")
    axis.set_ylabel("accuracy (%), 95% intervals over prompts")
    axis.set_ylim(top=102)
    drawn.legend(fontsize=8, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def as_document(comparison: Comparison, about: Mapping[str, object]) -> dict[str, object]:
    """For JSON: fractions in 0..1, every estimate as value, low and high."""
    return {**about, **asdict(comparison)}
