"""What `airl-fast localize` shows of a file with labels: tables as plain text, and the same as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from airl_fast.evaluate.summary import ABSENT
from airl_fast.evaluate.tables import Grid, as_text, paragraph, percent, percent_value, plain
from airl_fast.judge.naming import GIVEN, Naming
from airl_fast.score.located import LENGTH, Section

_NAMES = {"reward": "reward", "logprob": "log-prob."}
_TOO_MANY = 0.9  # share of traces without an error below a threshold that says nothing any more
_FIRST = ("reward", "logprob", "chance", "majority_position")
_OTHERS = {"chance": "chance (exact)", "majority_position": "most frequent position"}


def render(sections: Sequence[Section], chosen: Naming, notes: Sequence[str] = ()) -> str:
    """Tables of everything and of the groups, then notes. Rates in per cent with their 95% intervals."""
    whole, groups = sections[0], sections[1:]
    parts = []
    if whole.localise:
        parts.append(as_text(_localise(whole, chosen)))
        if any(group.localise for group in groups):
            parts.append(as_text(_localise_groups([group for group in groups if group.localise])))
    if whole.detect:
        parts.append(as_text(_detect(whole)))
        if any(group.detect for group in groups):
            parts.append(as_text(_detect_groups(groups)))
    parts.append(paragraph([*_notes(whole, chosen), *notes]))
    return "\n".join(parts)


def _localise(section: Section, chosen: Naming) -> Grid:
    rows = [
        (_label(name, chosen), percent(each.hit_at_1), percent(each.hit_within_1), percent(each.mrr))
        for name, each in sorted(section.localise.items(), key=lambda item: _place(item[0]))
    ]
    heading = f"first wrong step, {section.wrong} traces"
    return Grid(headings=(heading, "Hit@1 [95%]", "Hit@±1 [95%]", "MRR [95%]"), rows=tuple(rows))


def _localise_groups(groups: Sequence[Section]) -> Grid:
    rows = []
    for group in groups:
        reward, logprob, chance = (group.localise.get(name) for name in ("reward", "logprob", "chance"))
        rows.append(
            (
                group.name,
                str(group.wrong),
                percent(reward and reward.hit_at_1),
                percent(logprob and logprob.hit_at_1),
                percent_value(chance and chance.hit_at_1),
            )
        )
    return Grid(headings=("group", "wrong", "reward Hit@1", "log-prob. Hit@1", "chance"), rows=tuple(rows))


def _detect(section: Section) -> Grid:
    rows = []
    for name, each in section.detect.items():
        signal, _, doubt = name.partition("_")
        rows.append(
            (
                name.replace("_", " ") if name == LENGTH else f"{_NAMES[signal]}, {doubt.replace('_', ' ')}",
                plain(each.pooled),
                plain(each.within.estimate),
                str(each.within.prompts),
            )
        )
    heading = f"has {section.error}: {section.wrong} of {section.wrong + section.without}"
    return Grid(headings=(heading, "AUROC [95%]", "within a prompt [95%]", "prompts"), rows=tuple(rows))


def _detect_groups(groups: Sequence[Section]) -> Grid:
    rows = []
    for group in groups:
        reward, logprob = (group.detect.get(f"{signal}_lowest_step") for signal in _NAMES)
        length = group.detect.get(LENGTH)
        cells = (plain(reward and reward.pooled), plain(logprob and logprob.pooled))
        by_length = ABSENT if length is None else f"{length.pooled.value:.3f}"
        rows.append((group.name, f"{group.wrong}/{group.wrong + group.without}", *cells, by_length))
    headings = ("AUROC of the lowest step", "wrong", "reward", "log-prob.", "steps")
    return Grid(headings=headings, rows=tuple(rows))


def _place(name: str) -> int:
    """The rule in use and its baselines come first, the other rules in their order after them."""
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _label(name: str, chosen: Naming) -> str:
    if name in _OTHERS:
        return _OTHERS[name]
    signal, _, rule = name.partition("_")
    return f"{_NAMES[signal]}, {(rule or chosen.rule).replace('_', ' ')}{'' if rule else ' *'}"


def _notes(whole: Section, chosen: Naming) -> list[str]:
    threshold = "" if chosen.threshold is None else f", threshold {chosen.threshold:.4g} from {chosen.origin}"
    notes = [
        f"{whole.traces} traces with a label: {whole.wrong} have {whole.error}, {whole.without} have none.",
        f"{'* ' if whole.localise else ''}The rule in use: {chosen.rule.replace('_', ' ')}{threshold}.",
    ]
    if whole.alarms:
        sides = [
            f"in {percent(whole.alarms[side])}% of traces {words}"
            for side, words in (("wrong", "with an error"), ("without", "without one (false alarms)"))
            if side in whole.alarms
        ]
        whose = "the threshold" if chosen.threshold is not None else "first below's calibrated threshold"
        notes.append(f"Some step lies below {whose} {' and '.join(sides)}.")
        if chosen.threshold is not None and "without" in whole.alarms and whole.alarms["without"].value > _TOO_MANY:
            notes.append(
                "Nearly every trace does, so the rule names first steps: the threshold is not made for these traces. "
                "Try --rule argmin, or another --threshold."
            )
    if chosen.origin == GIVEN:
        notes.append("The log-probability has no threshold of its own here, so its first-below row is left out.")
    if whole.localise:
        notes.append("Most frequent position is read off these labels: the most that guessing by position can score.")
    if whole.detect:
        notes.append("Number of steps: how far the length of a trace alone tells that it has an error.")
    else:
        notes.append("No AUROC: it needs traces with an error and traces without.")
    return notes


def as_document(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """Estimates as {value, low, high}, fractions of 1."""
    return [asdict(section) for section in sections]
