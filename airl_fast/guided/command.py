"""`airl-fast generate`: traces for prompts under a run's reward, and the comparison of ways to guide them."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from airl_fast.artifacts import POLICY, load_policy
from airl_fast.config import Config
from airl_fast.data.task import Split
from airl_fast.device import pick_device
from airl_fast.errors import UserError
from airl_fast.evaluate.plots import save_figure
from airl_fast.guided.compare import Solved, draw_pool, grade, run_methods
from airl_fast.guided.options import Workshop, settings_of
from airl_fast.guided.prompts import Answers, read_problems, split_problems
from airl_fast.guided.records import Outcome, Problem
from airl_fast.guided.report import as_document, figure, render
from airl_fast.guided.session import Session
from airl_fast.judge.judge import Judge, locate_reward, open_judge
from airl_fast.judge.leakage import training_prompts
from airl_fast.lab import load_material, sampling_params
from airl_fast.models.check import verify_packing
from airl_fast.models.load import LanguageModel
from airl_fast.rollout.engine import SamplingParams
from airl_fast.saved import run_config
from airl_fast.types import Example

Say = Callable[[str], None]
_PART = 128  # problems whose rows are written together


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """prompts: a file, or None for `split` of the run's task. guided: kinds of guidance; a generation has one.
    options: as typed, by name. policy: start, airl or a directory. repeats: of a comparison."""

    run: Path
    prompts: Path | None
    split: Split
    limit: int | None
    guided: tuple[str, ...]
    options: Mapping[str, str | None]
    policy: str
    seed: int
    max_new_tokens: int | None
    temperature: float | None
    repeats: int
    allow_training_prompts: bool
    trust_remote_code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opened:
    judge: Judge
    params: SamplingParams
    problems: tuple[Problem, ...]
    answers: Answers
    workshop: Workshop

    def session(self, first: int, last: int, repeat: int) -> Session:
        return Session(self.judge, self.params, self.problems[first:last], first=first, repeat=repeat)


def generate(request: Request, out: Path | None, write: Callable[[str], None], say: Say) -> None:
    """One JSON line for each prompt, into `out` or through `write`, as its part is done."""
    (setting,) = settings_of(request.guided, request.options, compare=False)
    opened = _open(request)
    method = opened.workshop.make(setting)
    began, spent = time.monotonic(), 0
    handle = None if out is None else _open_to_write(out)
    try:
        for first in range(0, len(opened.problems), _PART):
            last = min(first + _PART, len(opened.problems))
            outcomes = method.solve(opened.session(first, last, 0))
            spent += sum(outcome.generated for outcome in outcomes)
            text = "".join(_line(outcome, method.label, opened.judge) for outcome in outcomes)
            if handle is None:
                write(text)
            else:
                handle.write(text)
                handle.flush()
            seconds = time.monotonic() - began
            say(f"{last} of {len(opened.problems)} prompts, {spent / last:.0f} tokens each, {seconds:.1f} s")
    except OSError as error:
        raise UserError(f"{out} could not be written ({error.strerror}); check the directory and its space.") from None
    finally:
        if handle is not None:
            handle.close()


def compare(request: Request, out: Path | None, json_out: Path | None, plot_out: Path | None, say: Say) -> str:
    """Run the methods at several budgets and return the tables. Figures go to `json_out` and `plot_out`, by default
    RUN/eval/guided.json and guided.png; `out` takes every outcome."""
    settings = settings_of(request.guided, request.options, compare=True)
    opened = _open(request)
    missing = [p.place for p, answer in zip(opened.problems, opened.answers, strict=True) if answer is None]
    if missing:
        raise UserError(f"{missing[0]}: --compare needs an 'answer' in every row; add it, or leave --compare out.")
    if not request.allow_training_prompts:
        training_prompts(opened.judge.config).refuse((p.place, p.prompt) for p in opened.problems)
    methods = [(setting, opened.workshop.make(setting)) for setting in settings]
    total = len(opened.problems)
    solved = run_methods(methods, opened.session, total, request.repeats, say)
    drawn = draw_pool(opened.session, total, max(each.tokens for each in solved), say)
    comparison = grade(solved, drawn, opened.problems, opened.answers, opened.judge.task)
    source = f"{total} {request.split} prompts" if request.prompts is None else f"{total} prompts of {request.prompts}"
    title = f"{source}, policy {request.policy}, reward of {request.run}, seed {request.seed}"
    about = {"run": str(request.run), "source": source, "policy": request.policy, "seed": request.seed}
    folder = locate_reward(request.run)[0] / "eval"
    _write_json(json_out or folder / "guided.json", as_document(comparison, about))
    picture = plot_out or folder / "guided.png"
    _make_folder(picture)
    save_figure(figure(comparison, f"{source}, policy {request.policy}"), picture)
    if out is not None:
        _write_outcomes(out, solved, opened.judge)
    say(f"figure: {picture}")
    return render(comparison, title)


def _open(request: Request) -> _Opened:
    root, _ = locate_reward(request.run)
    config = run_config(root, trust_remote_code=request.trust_remote_code)
    problems, answers = (None, None) if request.prompts is None else read_problems(request.prompts)
    lm = _policy(request.policy, root, config)
    judge = open_judge(request.run, policy=lm, trust_remote_code=request.trust_remote_code)
    if problems is None:
        problems, answers = split_problems(judge.task, request.split, request.limit)
    elif request.limit is not None:
        problems, answers = problems[: request.limit], answers[: request.limit]
    params = sampling_params(config, judge.maker.chat, 0, "final-guided")
    changes = {"seed": request.seed, "max_new_tokens": request.max_new_tokens, "temperature": request.temperature}
    params = replace(params, **{name: value for name, value in changes.items() if value is not None})

    def demonstrations() -> Sequence[Example]:
        return load_material(config).train

    def unseen() -> Sequence[Example]:
        found = [example for example in load_material(config).dev if example.expert is not None]
        if not found:
            raise UserError(
                "--guided reject finds its floor on demonstrations of the dev split, and the run's data has none; add "
                "some to it, or take --guided steps or tokens."
            )
        return found

    return _Opened(
        judge=judge,
        params=params,
        problems=problems,
        answers=answers,
        workshop=Workshop(judge, demonstrations, unseen),
    )


def _policy(name: str, root: Path, config: Config) -> LanguageModel | None:
    """None for the start policy, which the judge brings along."""
    if name == "start":
        return None
    directory = root / POLICY if name == "airl" else Path(name)
    if not directory.is_dir():
        hint = "give start, airl or the directory of a model"
        hint = "the run has no trained policy; use --policy start" if name == "airl" else hint
        raise UserError(f"--policy {name}: there is no directory {directory}; {hint}.")
    lm = load_policy(directory, config.model, pick_device(config))
    verify_packing(lm, str(directory))
    return lm


def _line(outcome: Outcome, label: str, judge: Judge, **more: object) -> str:
    row = {
        "id": outcome.problem.id,
        "prompt": outcome.problem.prompt,
        "completion": outcome.text,
        "final_answer": judge.task.extract_answer(outcome.text),
        "reward": outcome.score if math.isfinite(outcome.score) else None,
        "finished": outcome.finished,
        "tokens": len(outcome.tokens),
        "generated_tokens": outcome.generated,
        "scored_tokens": outcome.scored,
        "method": label,
        "details": dict(outcome.details),
        **more,
    }
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_outcomes(out: Path, solved: Iterable[Solved], judge: Judge) -> None:
    with _open_to_write(out) as handle:
        for each in solved:
            for repeat, outcomes in enumerate(each.outcomes):
                handle.writelines(_line(outcome, each.label, judge, repeat=repeat) for outcome in outcomes)


def _open_to_write(path: Path):
    _make_folder(path)
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); check the directory and its space.") from None


def _write_json(path: Path, document: Mapping[str, object]) -> None:
    with _open_to_write(path) as handle:
        handle.write(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} could not be made ({error.strerror}); give another path.") from None
