"""GSM8K, MMLU-Pro and the medical sets, on the published files and on damaged copies."""

import gzip
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from airl_fast.data.gsm8k import clean_steps, read_gsm8k
from airl_fast.data.medreason import read_medmcqa, strip_stated_answer
from airl_fast.data.mmlu_pro import clean_cot
from airl_fast.data.multiple_choice import parse_options, render_prompt
from airl_fast.data.steps import split_steps
from airl_fast.data.tags import extract_answer, format_trace
from airl_fast.data.task import Task, check_experts, make_task
from airl_fast.data.verify import format_signals, parse_number
from airl_fast.errors import UserError
from airl_fast.types import Example

# The published files: $AIRL_DATA, else ../shared/data beside the repository.
DATA = Path(os.environ.get("AIRL_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no published data at {DATA}; set AIRL_DATA")
FOLDERS = {"gsm8k": DATA / "gsm8k", "mmlu_pro": DATA / "mmlu_pro", "medreason": DATA / "medreason"}


def task(name, **options):
    return make_task(name, path=str(FOLDERS[name]), **options)


def write(path, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


# ---- GSM8K ----

WENG = {
    "question": "Weng earns $12 an hour. How much in 50 minutes?",
    "answer": "She earns 12/60 = $<<12/60=0.2>>0.2 a minute.\nThat is 0.2 x 50 = $<<0.2*50=10>>10.\n#### 10",
}


def test_gsm8k_row(tmp_path):
    write(tmp_path / "train.jsonl", WENG, "", WENG | {"answer": "So 0-1,500 = <<0-1500=-1500>>-1500\n#### -1,500"})
    first, second = read_gsm8k(tmp_path / "train.jsonl")
    assert (
        first.expert
        == "<think>\nShe earns 12/60 = $0.2 a minute.\nThat is 0.2 x 50 = $10.\n</think>\n<answer>10</answer>"
    )
    assert (first.prompt, first.answer) == (WENG["question"], "10")
    assert (second.id, second.answer, extract_answer(second.expert)) == ("gsm8k/train/3", "-1500", "-1500")


def test_clean_steps():
    assert clean_steps("a  <<1+1=2>>2 \r\n\n b\n") == "a 2\nb"


@needs_data
def test_all_gsm8k_demonstrations_pass_and_are_clean():
    gsm8k = task("gsm8k")
    assert isinstance(gsm8k, Task)
    train, dev, test = gsm8k.load("train"), gsm8k.load("dev"), gsm8k.load("test")
    assert (len(train) + len(dev), len(test)) == (7473, 1319)
    assert 0.04 * 7473 < len(dev) < 0.06 * 7473
    assert len({example.prompt for example in train + dev + test}) == 7473 + 1319
    for examples in (train, dev, test):
        report = check_experts(gsm8k, examples, "error")
        assert report.passed == len(examples)
    for example in train + dev + test:
        assert "<<" not in example.expert and "####" not in example.expert
        signals = format_signals(example.expert)
        assert signals.soft and signals.integer
    assert sum(parse_number(example.answer) < 0 for example in train + dev) == 3


@needs_data
def test_gsm8k_step_ends_are_its_lines_or_finer():
    for example in task("gsm8k").load("test"):
        ends = set(task("gsm8k").step_ends(example.expert))
        breaks = {i + 1 for i, c in enumerate(example.expert) if c == "\n"}
        after_tags = {len("<think>\n"), example.expert.index("</think>\n") + len("</think>\n")}
        assert breaks - after_tags <= ends


def samples():
    """The published samples of two 6B models on the test questions."""
    content = gzip.decompress((FOLDERS["gsm8k"] / "model_solutions.jsonl.gz").read_bytes())
    return [json.loads(line) for line in content.splitlines()]


@needs_data
def test_verdicts_on_real_samples_agree_with_the_published_ones():
    gsm8k, verdicts = task("gsm8k"), []
    for row in samples():
        example = Example(id="", prompt=row["question"], answer=row["gold"])
        text = format_trace(clean_steps(row["solution"]), row["pred"] or "none")
        verdicts.append((gsm8k.verify(example, text), row["is_correct"]))
    assert len(verdicts) == 2638 and all(own == published for own, published in verdicts)


@needs_data
def test_real_samples_can_be_perturbed():
    gsm8k, rng = task("gsm8k"), random.Random(0)
    for row in samples()[:600]:
        example = Example(id="", prompt=row["question"], answer=row["gold"])
        text = format_trace(clean_steps(row["solution"]), row["pred"] or "none")
        change = gsm8k.perturb(example, text, rng)
        assert change.text != text
        assert extract_answer(change.text) == extract_answer(text) or not gsm8k.verify(example, change.text)


@needs_data
def test_shares_of_the_training_file_are_disjoint_and_complete():
    gsm8k = task("gsm8k", warmstart_fraction=0.4)
    parts = [{example.prompt for example in gsm8k.load(split)} for split in ("train", "dev", "warmstart")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 7473
    assert abs(len(parts[2]) / 7473 - 0.4) < 0.02
    assert parts[1] == {example.prompt for example in task("gsm8k").load("dev")}


@needs_data
def test_a_test_set_is_refused_as_training_file(tmp_path):
    shutil.copy(FOLDERS["gsm8k"] / "test.jsonl", tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl: this is the GSM8K test set"):
        make_task("gsm8k", path=str(tmp_path)).load("train")
    shutil.copy(FOLDERS["mmlu_pro"] / "test.jsonl.gz", tmp_path / "val_cot.jsonl.gz")
    with pytest.raises(UserError, match="the MMLU-Pro test set"):
        make_task("mmlu_pro", path=str(tmp_path)).load("train")
    shutil.copy(FOLDERS["medreason"] / "medqa_test.jsonl", tmp_path / "own.jsonl")
    with pytest.raises(UserError, match="the MedQA test set"):
        make_task("jsonl", path=str(tmp_path / "own.jsonl")).load("train")


# ---- MMLU-Pro ----


def test_prompt_and_options_are_inverse():
    options = {"A": "one\n\nB. two", "B": " padded ", "C": "3. three"}
    prompt = render_prompt(" Which?\n\nA. No option. \n", options)
    assert prompt == "Which?\n\nA. No option.\n\nA. one B. two\nB. padded\nC. 3. three"
    assert parse_options(prompt) == {"A": "one B. two", "B": "padded", "C": "3. three"}


def test_clean_cot():
    cot = "A: Let's think step by step. It is 2. Hence 4. The answer is (C)."
    assert clean_cot(cot, "B") == format_trace("It is 2. Hence 4.", "C")
    assert clean_cot("Because.", "B") == format_trace("Because.", "B")


@needs_data
def test_mmlu_pro_counts_and_verdicts():
    mmlu = task("mmlu_pro")
    train, dev, test = mmlu.load("train"), mmlu.load("dev"), mmlu.load("test")
    assert (len(train) + len(dev), len(test)) == (70, 12032) and len(dev) >= 5
    assert not {example.prompt for example in train + dev} & {example.prompt for example in test}
    assert check_experts(mmlu, train + dev, "error").passed == 70
    assert check_experts(mmlu, test).without_expert == 12032
    for example in train + dev:
        assert not example.expert.startswith("<think>\nA:") and "The answer is (" not in example.expert
    for example in test:
        options = parse_options(example.prompt)
        assert mmlu.wrong_options(example) == "ABCDEFGHIJ"[: len(options)].replace(example.answer, "")
        assert mmlu.verify(example, format_trace("x", f"({example.answer})"))
        other = next(letter for letter in options if letter != example.answer)
        if options[other] != options[example.answer]:
            assert not mmlu.verify(example, format_trace("x", other))
            assert not mmlu.verify(example, format_trace("x", f"{example.answer} or {other}"))


@needs_data
def test_full_option_texts_are_accepted_for_nearly_all_of_mmlu_pro():
    mmlu, right, letter_and_text = task("mmlu_pro"), 0, 0
    test = mmlu.load("test")
    for example in test:
        text = parse_options(example.prompt)[example.answer]
        right += mmlu.verify(example, format_trace("x", text))
        letter_and_text += mmlu.verify(example, format_trace("x", f"{example.answer}. {text}"))
    # The rest are texts that look like a letter or a list of letters ("A and B"), read as such.
    assert right / len(test) > 0.99
    assert letter_and_text / len(test) > 0.999


def test_canonical_option():
    mmlu = make_task("mmlu_pro", path="unused")
    example = Example(id="", prompt=render_prompt("Q", {"A": "Paris", "B": "Rome"}), answer="A")
    answers = ["A", "(a)", "Paris", "A. Paris", "A or B", "Nowhere", "Nowhere."]
    canonical = [mmlu.canonical_answer(example, format_trace("x", answer)) for answer in answers]
    assert canonical == ["A", "A", "A", "A", "AB", "nowhere", "nowhere"]
    assert mmlu.canonical_answer(example, "A") is None


def test_options_are_swapped_and_never_repaired():
    mmlu = make_task("mmlu_pro", path="unused")
    example = Example(id="", prompt=render_prompt("Q", {"A": "Paris", "B": "Rome", "C": "Bonn"}), answer="A")
    seen = {mmlu.perturb(example, format_trace("x", "B"), random.Random(s)).text for s in range(40)}
    assert seen == {format_trace("x", "C")}


# ---- medical ----


@pytest.mark.parametrize(
    ("explanation", "thoughts", "letter"),
    [
        ("Ans. a. ACA (Ref: H 18)", "ACA (Ref: H 18)", "A"),
        ("Answer- B. Increased", "Increased", "B"),
        ("Ans: C i.e. Hypo", "Hypo", "C"),
        ("Ans. is 'd' i.e., All", "All", "D"),
        ("Ans. (B) 5An organ", "5An organ", "B"),
        ("Answer-A- History", "History", "A"),
        ("Ans-a. The", "The", "A"),
        ("Ans. BSolitary bone cyst", "Solitary bone cyst", "B"),
        ("Ans. All are true", "Ans. All are true", None),
        ("Answering needs care", "Answering needs care", None),
        ("A. Dermatitis", "A. Dermatitis", None),
        ("An answer is b.", "An answer is b.", None),
    ],
)
def test_stated_answers_are_stripped(explanation, thoughts, letter):
    assert strip_stated_answer(explanation) == (thoughts, letter)


@needs_data
def test_medical_counts():
    path = FOLDERS["medreason"] / "medmcqa_validation.jsonl"
    assert len(read_medmcqa(path, 1)) == 2205  # one explanation is nothing but its answer
    medical = task("medreason", min_words=0)
    examples = medical.load("train") + medical.load("dev")
    stated = sum(strip_stated_answer(row["explanation"])[1] is not None for row in explained(path))
    assert stated >= 1075
    report = check_experts(medical, examples)
    assert len(report.failed) <= 3, report.failed  # explanations that argue for another option than the gold
    dropped = check_experts(medical, examples, "drop")
    assert len(dropped.kept) == len(examples) - len(report.failed)
    longer = task("medreason")
    kept = longer.load("train") + longer.load("dev")
    assert 2000 < len(kept) < 2205 - 150
    assert all(len(split_steps(example.expert)) >= 2 for example in kept)


def explained(path):
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["explanation"]]


@needs_data
@pytest.mark.parametrize("choices", [4, 5])
def test_medqa(choices):
    medical = task("medreason", choices=choices)
    test = medical.load("test")
    assert len(test) == 1273 and all(example.expert is None for example in test)
    golds = [json.loads(line) for line in (FOLDERS["medreason"] / "medqa_test.jsonl").open()]
    for example, row in zip(test, golds, strict=True):
        assert len(parse_options(example.prompt)) == choices
        assert medical.verify(example, format_trace("x", row[f"answer{choices}"]))
        # Where the options are themselves letters ("A. B"), a bare letter is read as the letter.
        if len(row["answer_text"]) > 1:
            assert medical.verify(example, format_trace("x", row["answer_text"]))


# ---- mistakes ----


@pytest.mark.parametrize("name", ["gsm8k", "mmlu_pro", "medreason", "jsonl"])
def test_missing_paths(name, tmp_path):
    with pytest.raises(UserError, match="set data.path to the folder that holds"):
        make_task(name).load("train")
    with pytest.raises(UserError, match="does not exist; give the folder"):
        make_task(name, path=str(tmp_path / "nowhere")).load("train")
    with pytest.raises(UserError, match="holds no .*jsonl"):
        make_task(name, path=str(tmp_path)).load("train")


def test_a_file_where_a_folder_is_wanted(tmp_path):
    write(tmp_path / "train.jsonl", WENG)
    with pytest.raises(UserError, match="is a file; give the folder"):
        make_task("gsm8k", path=str(tmp_path / "train.jsonl")).load("train")


def test_no_warm_start_share(tmp_path):
    write(tmp_path / "train.jsonl", WENG)
    with pytest.raises(UserError, match=r"set data\.options\.warmstart_fraction"):
        make_task("gsm8k", path=str(tmp_path)).load("warmstart")
    with pytest.raises(UserError, match="sum below 1"):
        make_task("gsm8k", path=str(tmp_path), warmstart_fraction=0.97)


OPTIONS = {"question": "Q?", "options": ["x", "y"], "answer": "A"}
MEDICAL = {"question": "Q?", "options": {"A": "x", "B": "y"}, "answer": "A", "explanation": "because"}


@pytest.mark.parametrize(
    ("name", "file", "row", "message"),
    [
        ("gsm8k", "train.jsonl", '{"question": "x", ', r"train\.jsonl:2: not JSON"),
        ("gsm8k", "train.jsonl", "[1]", r"train\.jsonl:2: a list, not an object"),
        ("gsm8k", "train.jsonl", {"question": "x"}, r"train\.jsonl:2: lacks the field 'answer'"),
        ("gsm8k", "train.jsonl", {"question": 3, "answer": "#### 1"}, r":2: 'question' is a int, not a string"),
        ("gsm8k", "train.jsonl", {"question": " ", "answer": "#### 1"}, r":2: 'question' is empty"),
        ("gsm8k", "train.jsonl", {"question": "x", "answer": "so 5"}, r":2: 'answer' does not end in '#### <number>'"),
        ("gsm8k", "train.jsonl", {"question": "x", "answer": "#### five"}, r":2: 'answer' does not end"),
        ("mmlu_pro", "val_cot.jsonl", OPTIONS | {"options": "x"}, r":2: 'options' must be a list"),
        ("mmlu_pro", "val_cot.jsonl", OPTIONS | {"answer": "C"}, r":2: 'answer' is 'C', not the letter"),
        ("medreason", "medmcqa_validation.jsonl", MEDICAL | {"options": ["x"]}, r":2: 'options' must map letters"),
        ("medreason", "medmcqa_validation.jsonl", MEDICAL | {"answer": "x"}, r":2: 'answer' is 'x', not the letter"),
    ],
)
def test_damaged_rows_name_file_and_line(name, file, row, message, tmp_path):
    good = {"gsm8k": WENG, "mmlu_pro": OPTIONS, "medreason": MEDICAL}[name]
    write(tmp_path / file, good, row)
    with pytest.raises(UserError, match=message):
        make_task(name, path=str(tmp_path)).load("train")


def test_unreadable_files(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(WENG).encode())[:-9])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz: not a complete gzip file"):
        make_task("gsm8k", path=str(tmp_path)).load("train")
    (tmp_path / "train.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe\n')
    with pytest.raises(UserError, match=r"train\.jsonl:2: not UTF-8"):
        make_task("gsm8k", path=str(tmp_path)).load("train")


def test_gzip_by_extension(tmp_path):
    write(tmp_path / "train.jsonl.gz", WENG)
    gsm8k = make_task("gsm8k", path=str(tmp_path))
    assert len(gsm8k.load("train") + gsm8k.load("dev")) == 1


@pytest.mark.parametrize(
    ("options", "message"), [({"choices": 3}, "choices must be 4 or 5"), ({"min_words": -1}, "min_words")]
)
def test_bad_medical_options(options, message):
    with pytest.raises(UserError, match=message):
        make_task("medreason", path="x", **options)


def test_policies_for_failing_demonstrations(tmp_path):
    rows = [
        OPTIONS | {"question": f"Q{i}?", "cot": f"Since {i}. The answer is ({'A' if i else 'B'})."} for i in range(6)
    ]
    write(tmp_path / "val_cot.jsonl", *rows)
    mmlu = make_task("mmlu_pro", path=str(tmp_path), dev_fraction=0.01)
    examples = mmlu.load("train")
    report = check_experts(mmlu, examples)
    assert (report.passed, report.failed, len(report.kept)) == (5, ("mmlu_pro/val_cot/1",), 6)
    assert str(report) == "5 of 6 demonstrations pass their own verifier; 1 fail (mmlu_pro/val_cot/1)"
    assert [example.id for example in check_experts(mmlu, examples, "drop").kept] == [e.id for e in examples[1:]]
    with pytest.raises(UserError, match="1 of 6 demonstrations fail their own verifier"):
        check_experts(mmlu, examples, "error")
    with pytest.raises(UserError, match="use keep, drop or error"):
        check_experts(mmlu, examples, "ignore")
