"""How the report's plots look in both themes.

Colours are those of Okabe and Ito. The page replaces ink, surface, grid and blue by those of the theme, so that a
plot follows it; every other colour reads on light and on dark.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go

INK, SURFACE, GRID = "#010203", "#010204", "#010205"
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, GREY = "#CC79A7", "#56B4E9", "#8C8C8C"
RUN_COLOURS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, GREY)
PHASE_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY)
DIVERGING = ((0.0, ORANGE), (0.5, SURFACE), (1.0, BLUE))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot. id: of its element, after "plot-". section: the heading it stands under. caption: what it says, in
    plain words. height: in pixels. width: of the page, where that is wide enough."""

    id: str
    section: str
    title: str
    caption: str
    figure: go.Figure
    height: int = 250
    width: Literal["third", "half", "full"] = "third"


def run_colour(index: int) -> str:
    return RUN_COLOURS[index % len(RUN_COLOURS)]


def layout(x: str, y: str, *, percent: bool = False, legend: bool = False, unified: bool = True) -> go.Layout:
    """x, y: titles of the axes. percent: y runs from 0 to 100. unified: one hover label for everything at an x."""
    axis = {"gridcolor": GRID, "linecolor": GRID, "zerolinecolor": GRID, "ticks": "", "automargin": True}
    axis |= {"title_standoff": 6, "exponentformat": "power"}
    return go.Layout(
        template="none",
        font={"family": FONT, "size": 12, "color": INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 48, "r": 12, "t": 10, "b": 40},
        xaxis=dict(title_text=x, showgrid=False, **axis),
        yaxis=dict(title_text=y, range=[-2, 102] if percent else None, **axis),
        hovermode="x unified" if unified else "closest",
        hoverlabel={"bgcolor": SURFACE, "bordercolor": GRID, "font": {"color": INK, "family": FONT}, "namelength": -1},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": INK},
        showlegend=legend,
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0, "font_size": 11},
    )


def significant(values: Iterable[float]) -> list[float]:
    """Six significant digits: what a plot shows, in half the bytes."""
    return [float(f"{value:.6g}") for value in values]


def see_through(colour: str, alpha: float) -> str:
    """#RRGGBB as rgba(…)."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
