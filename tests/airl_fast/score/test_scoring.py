"""Files in parts and lines out: what is kept after an error, and figures that equal those of the parts they are of."""

import gzip
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from airl_fast.config import EvaluateConfig
from airl_fast.data.trace_rows import NO_ERROR
from airl_fast.errors import UserError
from airl_fast.judge.judge import open_judge
from airl_fast.judge.locate import locate
from airl_fast.measures.correlate import pooled_auroc, within_prompt_auroc
from airl_fast.measures.localise import StepScores, TokenValues
from airl_fast.score.line_writer import LineWriter, check_lines_output
from airl_fast.score.located import UNKNOWN, Labelled, measure, worst
from airl_fast.score.trace_parts import Tally, read_parts, steps_of_ends
from tests.airl_fast.run_cases import small_run

# ---------------------------------------------------------------------------------------------- lines


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with LineWriter(out) as lines:
        lines.write({"text": "é", "value": 0.5})
        lines.flush()
        assert not out.exists() and lines.partial.read_text() == '{"text":"é","value":0.5}\n'
    assert out.read_text() == '{"text":"é","value":0.5}\n' and not lines.partial.exists()


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_after_an_error_the_rows_before_it_can_be_read(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    with pytest.raises(UserError, match="bad row"), LineWriter(out) as lines:
        lines.write({"row": 1})
        lines.write({"row": 2})
        raise UserError("bad row")
    assert not out.exists()
    content = lines.partial.read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    assert [json.loads(line) for line in text.splitlines()] == [{"row": 1}, {"row": 2}]


def test_equal_rows_give_equal_gzip_files(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        with LineWriter(tmp_path / name) as lines:
            lines.write({"row": 1})
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_outputs_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    source, other = tmp_path / "in.jsonl", tmp_path / "there.jsonl"
    source.write_text("{}\n")
    other.write_text("{}\n")
    link = tmp_path / "link.jsonl"
    link.symlink_to(source)
    for name in (source, link):
        with pytest.raises(UserError, match="this is the input"):
            check_lines_output(str(name), [source], force=True)
    partial = tmp_path / "new.jsonl.partial"
    partial.write_text("{}\n")
    with pytest.raises(UserError, match="this is the input"):  # it would be overwritten on the way
        check_lines_output(str(tmp_path / "new.jsonl"), [partial], force=False)
    with pytest.raises(UserError, match="exists already"):
        check_lines_output(str(other), [source], force=False)
    with pytest.raises(UserError, match="a directory that exists"):
        check_lines_output(str(tmp_path / "none" / "x.jsonl"), [source], force=False)
    assert check_lines_output(str(other), [source], force=True) == other
    assert check_lines_output(None, [source], force=False) is None is check_lines_output("-", [source], force=False)


# ---------------------------------------------------------------------------------------------- parts


def test_step_ends_follow_a_text_that_the_tokenizer_normalises(tmp_path: Path) -> None:
    first, second = "cafe\u0301 cafe\u0301\n", "a" + "\u0308 + 1"
    row = {"prompt": "p", "completion": first + second, "step_ends": [len(first), len(first + second)]}
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(row) + "\n")
    judge = open_judge(small_run())  # its tokenizer composes accents, as Qwen2's does
    ((part, labels),) = read_parts(judge, path, Tally(), trained_on=None, drop_too_long=False, tokens=100)
    (trace,), (ends,) = part.traces, part.step_ends
    assert len(first) == 12 and trace.text == unicodedata.normalize("NFC", first + second)
    assert ends == (10, 15) and trace.text[:10] == "café café\n"
    assert steps_of_ends(judge, trace, ends) == [0, 1] and len(labels) == 1
    scored = judge.score(part.traces, part.examples, part.step_ends)
    spans = judge.maker.chat.token_char_spans(trace.text, trace.tokens)
    closing = np.flatnonzero(scored.reward.step_ends)
    assert [spans[token][1] for token in closing] == list(ends)


def test_parts_share_prompts_and_respect_the_budget(tmp_path: Path) -> None:
    judge, path = open_judge(small_run()), tmp_path / "in.jsonl"
    rows = [{"id": i, "prompt": f"p{i // 3}", "completion": "1 + 1 = 2"} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def parts(tokens: int) -> list:
        return list(read_parts(judge, path, Tally(), trained_on=None, drop_too_long=False, tokens=tokens))

    ((whole, _),) = parts(10_000)
    assert [trace.group for trace in whole.traces] == [0, 0, 0, 1, 1, 1, 2]
    assert [example.prompt for example in whole.examples] == ["p0", "p1", "p2"]
    assert {example.answer for example in whole.examples} == {""}
    prompt, completion = len(whole.traces[0].prompt_tokens), len(whole.traces[0].tokens)
    assert [len(part.rows) for part, _ in parts(prompt + 2 * completion)] == [2, 1, 2, 1, 1]
    assert [len(part.rows) for part, _ in parts(1)] == [1] * 7
    assert [row.id for part, _ in parts(1) for row in part.rows] == list("0123456")


# ---------------------------------------------------------------------------------------------- figures


def labelled(seed: int = 0, traces: int = 60) -> Labelled:
    """Random step scores of traces of 1 to 5 steps, three a prompt, in two groups."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 6, traces)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    steps = {
        name: StepScores(values=np.round(rng.normal(size=offsets[-1]), 1), offsets=offsets)
        for name in ("reward", "logprob")
    }
    return Labelled(
        steps=steps,
        truth=np.where(rng.random(traces) < 0.4, NO_ERROR, rng.integers(0, lengths)),
        right=rng.integers(0, 2, traces),
        prompts=np.arange(traces) // 3,
        groups=np.arange(traces) % 2,
        names=("one", "two"),
    )


SETTINGS = EvaluateConfig(localise="argmin", step_score="mean")
THRESHOLDS = {"reward": -0.3, "logprob": 0.1}


def test_localisation_over_a_file_is_that_of_its_traces_at_once() -> None:
    given = labelled()
    whole = measure(given, SETTINGS, THRESHOLDS)[0]

    def one_token_a_step(steps: StepScores) -> TokenValues:
        return TokenValues(values=steps.values, offsets=steps.offsets, step_ends=np.ones(len(steps.values), dtype=bool))

    class Scored:
        reward, logprob = (one_token_a_step(given.steps[name]) for name in ("reward", "logprob"))

    expected = locate(Scored, given.truth, SETTINGS, THRESHOLDS, prompts=given.prompts)
    assert set(whole.localise) == set(expected) and "reward_first_below" in expected and "logprob" in expected
    for name, each in expected.items():
        for figure in ("hit_at_1", "hit_within_1", "mrr"):
            mine, theirs = getattr(whole.localise[name], figure), getattr(each, figure)
            assert (mine.value, mine.low, mine.high) == pytest.approx((theirs.value, theirs.low, theirs.high))


def test_detection_is_the_auroc_of_the_most_suspicious_step() -> None:
    given = labelled(1)
    whole = measure(given, SETTINGS, THRESHOLDS)[0]
    wrong = given.truth != NO_ERROR
    lowest = [-min(given.steps["reward"].values[a:b]) for a, b in pairs(given.steps["reward"].offsets)]
    assert worst(given.steps["reward"], "lowest_step").tolist() == lowest
    found = whole.detect["reward_lowest_step"]
    assert found.pooled == pooled_auroc(np.array(lowest), wrong, prompts=given.prompts)
    assert found.within == within_prompt_auroc(np.array(lowest), wrong, given.prompts)
    length = whole.detect["number_of_steps"].pooled
    assert length == pooled_auroc(given.steps["reward"].lengths.astype(float), wrong, prompts=given.prompts)
    alarms = np.array([-value < -0.3 for value in lowest])
    assert whole.alarms["wrong"].value == pytest.approx(alarms[wrong].mean())
    assert whole.alarms["without"].value == pytest.approx(alarms[~wrong].mean())
    assert (whole.wrong, whole.without, whole.error) == (wrong.sum(), (~wrong).sum(), "a wrong step")


def test_groups_are_measured_as_files_of_their_own() -> None:
    given = labelled(2)
    sections = measure(given, SETTINGS, THRESHOLDS)
    assert [section.name for section in sections] == ["all", "one", "two"]
    alone = measure(given.rows(given.groups == 1), SETTINGS, THRESHOLDS)
    assert len(alone) == 1
    assert (sections[2].localise, sections[2].detect) == (alone[0].localise, alone[0].detect)
    assert sections[1].wrong + sections[2].wrong == sections[0].wrong


def test_unlabelled_steps_are_left_out_and_answers_stand_in() -> None:
    given = labelled(3)
    hidden = np.arange(60) >= 30
    some = Labelled(**fields(given) | {"truth": np.where(hidden, UNKNOWN, given.truth)})
    half = measure(some, SETTINGS, THRESHOLDS)[0]
    assert half.localise == measure(given.rows(~hidden), SETTINGS, THRESHOLDS)[0].localise and half.traces == 60
    assert half.wrong + half.without == 30
    none = Labelled(**fields(given) | {"truth": np.full(60, UNKNOWN)})
    by_answer = measure(none, SETTINGS, THRESHOLDS)[0]
    assert (by_answer.error, by_answer.wrong, by_answer.localise) == ("a wrong answer", (given.right == 0).sum(), {})
    doubt = worst(given.steps["logprob"], "largest_drop")
    assert by_answer.detect["logprob_largest_drop"].pooled == pooled_auroc(
        doubt, given.right == 0, prompts=given.prompts
    )


def pairs(offsets: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))


def fields(given: Labelled) -> dict:
    return {name: getattr(given, name) for name in ("steps", "truth", "right", "prompts", "groups", "names")}
