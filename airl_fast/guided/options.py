"""What may be asked for on the command line, and the methods that it makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from airl_fast.errors import UserError
from airl_fast.guided.best_of import BestOf
from airl_fast.guided.records import Method
from airl_fast.guided.reject import Reject, floor_that_keeps, lowest_running
from airl_fast.guided.revise import Revise
from airl_fast.guided.steps import Beam
from airl_fast.guided.tokens import TOP_K, Reweigh, check_guidable
from airl_fast.judge.judge import Judge
from airl_fast.judge.locate import calibrate
from airl_fast.types import Example

Value = int | float | str

# What each kind takes: (value for one generation, ladder of values for a comparison).
KINDS: Mapping[str, Mapping[str, tuple[Value, tuple[Value, ...]]]] = {
    "none": {"n": (8, (1, 4, 16))},
    "steps": {"beam": (4, (1, 2, 4, 8)), "expand": (4, (4,))},
    "tokens": {"n": (1, (1, 2, 4)), "beta": (1.0, (1.0,)), "top_k": (TOP_K, (TOP_K,))},
    "reject": {"n": (16, (4, 8, 16, 32)), "keep": (0.95, (0.95,)), "running": ("min", ("min",))},
    "revise": {"n": (1, (1,)), "rounds": (4, (1, 2, 4, 8))},
}
_RUNNING = ("min", "mean")
_WHOLE = {"n": 1, "beam": 1, "expand": 1, "top_k": 1, "rounds": 1}


@dataclass(frozen=True, slots=True)
class Setting:
    """A kind of guidance with its values by name."""

    kind: str
    values: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Workshop:
    """What makes methods of settings; each threshold is calibrated once, and the data for it asked for only then.

    demonstrations: training prompts with a demonstration, to break. unseen: prompts with a demonstration that the
    discriminator did not learn from, for a floor that shall let new traces pass.
    """

    judge: Judge
    demonstrations: Callable[[], Sequence[Example]]
    unseen: Callable[[], Sequence[Example]]
    _found: dict[object, float] = field(default_factory=dict)

    def make(self, setting: Setting) -> Method:
        v = setting.values
        match setting.kind:
            case "none":
                return BestOf(n=v["n"])
            case "steps":
                return Beam(beam=v["beam"], expand=v["expand"])
            case "tokens":
                check_guidable(self.judge)
                return Reweigh(n=v["n"], beta=v["beta"], top_k=v["top_k"])
            case "reject":
                floor = self._once(("reject", v["keep"], v["running"]), lambda: self._floor(v["keep"], v["running"]))
                return Reject(n=v["n"], floor=floor, running=v["running"], keep=v["keep"])
            case "revise":
                return Revise(n=v["n"], rounds=v["rounds"], threshold=self._once("revise", self._threshold))
        raise UserError(f"--guided {setting.kind}: choose one of {', '.join(KINDS)}.")

    def _once(self, key: object, find: Callable[[], float]) -> float:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]

    def _floor(self, keep: float, running: str) -> float:
        examples = self.unseen()
        experts = [self.judge.maker.expert(example, group) for group, example in enumerate(examples)]
        return floor_that_keeps(lowest_running(self.judge.score(experts, examples).reward, running), keep)

    def _threshold(self) -> float:
        thresholds = calibrate(self.judge, self.demonstrations())
        if "reward" not in thresholds:
            raise UserError(
                "--guided revise needs perturbed demonstrations to find its threshold on, but none of the training "
                "demonstrations can be perturbed; use --guided reject or steps."
            )
        return thresholds["reward"]


def settings_of(kinds: Sequence[str], given: Mapping[str, str | None], *, compare: bool) -> list[Setting]:
    """Every combination of the values asked for, kind after kind.

    given: options by name as they were typed, None where they were not. A comparison takes comma-separated values
    and has a ladder where nothing was given; otherwise there is one value each. UserError for a value that makes no
    sense, and for an option that none of the kinds reads.
    """
    known = {name for kind in kinds for name in KINDS[kind]}
    for name, text in given.items():
        if text is not None and name not in known:
            users = [kind for kind, options in KINDS.items() if name in options]
            raise UserError(
                f"{_flag(name)} is not read by --guided {','.join(kinds)}; it belongs to {', '.join(users)}."
            )
    made = []
    for kind in kinds:
        columns = []
        for name, (single, ladder) in KINDS[kind].items():
            text = given.get(name)
            default = ladder if compare else (single,)
            columns.append(default if text is None else _values(name, text, compare))
        made += [Setting(kind, dict(zip(KINDS[kind], row, strict=True))) for row in product(*columns)]
    return made


def _values(name: str, text: str, several: bool) -> tuple[Value, ...]:
    values = tuple(_value(name, part.strip()) for part in text.split(","))
    if len(values) > 1 and not several:
        raise UserError(f"{_flag(name)} {text}: several values are for --compare; give one.")
    return values


def _value(name: str, text: str) -> Value:
    try:
        if name == "running":
            if text not in _RUNNING:
                raise ValueError
            return text
        if name in _WHOLE:
            if int(text) < _WHOLE[name]:
                raise ValueError
            return int(text)
        number = float(text)
        if (name == "keep" and not 0 < number <= 1) or (name == "beta" and not 0 <= number < float("inf")):
            raise ValueError
        return number
    except ValueError:
        wanted = {
            "running": "min or mean",
            "keep": "a share above 0 and up to 1, such as 0.95",
            "beta": "a number from 0, such as 1",
        }
        raise UserError(f"{_flag(name)} {text}: give {wanted.get(name, 'a whole number from 1')}.") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
