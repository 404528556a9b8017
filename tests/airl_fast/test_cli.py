"""The commands around training: data, make-model, doctor, version and help."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from airl_fast import doctor
from airl_fast.cli import main
from airl_fast.data.task import make_task
from tests.airl_fast.run_cases import DATA, weights

# A task and its options, by name; published data where it lies.
TASKS = {
    "arithmetic": ("arithmetic", "train_size=20", "warmstart_size=50"),
    "countdown": ("countdown",),
    "gsm8k": ("gsm8k", f"path={DATA / 'gsm8k'}", "warmstart_fraction=0.2"),
    "mmlu_pro": ("mmlu_pro", f"path={DATA / 'mmlu_pro'}"),
    "medreason": ("medreason", f"path={DATA / 'medreason'}"),
}


def words(task: str) -> tuple[str, ...]:
    for word in TASKS[task]:
        if word.startswith("path=") and not Path(word.removeprefix("path=")).is_dir():
            pytest.skip(f"no {word.removeprefix('path=')}; set AIRL_DATA to the folder with the published data")
    return TASKS[task]


def output(capsys: pytest.CaptureFixture, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_data_preview_shows_prompts_and_steps(task: str, capsys: pytest.CaptureFixture) -> None:
    said = output(capsys, "data", "preview", *words(task), "-n", "2")
    assert said.count("== ") == 2 and said.count("   answer: ") == 2
    assert "  0 | <think>" in said and "</answer>" in said
    assert output(capsys, "data", "preview", *words(task)).count("   answer: ") == 3


@pytest.mark.parametrize("task", TASKS)
def test_data_perturb_shows_what_changed(task: str, capsys: pytest.CaptureFixture) -> None:
    said = output(capsys, "data", "perturb", *words(task), "-n", "4")
    assert said.count("== ") == 4
    changed = said.count("first changed character")
    assert changed >= 3  # a demonstration in which nothing can be changed says so
    removed = sum(line.startswith("-") for line in said.splitlines())
    added = sum(line.startswith("+") for line in said.splitlines())
    assert removed == added >= changed


@pytest.mark.parametrize("task", TASKS)
def test_data_validate_goes_through_every_split(task: str, capsys: pytest.CaptureFixture) -> None:
    said = output(capsys, "data", "validate", *words(task))
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert set(lines) == {"train", "dev", "test", "warmstart"}
    assert "demonstrations pass their own verifier" in lines["train"]


@pytest.mark.parametrize("task", TASKS)
def test_data_prepare_writes_a_file_that_the_jsonl_task_reads(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    said = output(capsys, "data", "prepare", *words(task), "--split", "dev", "-n", "5", "-o", str(out))
    assert said == f"5 rows written to {out}\n"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 5 and all(set(row) == {"prompt", "expert", "answer"} for row in rows)
    assert main(["data", "prepare", *words(task), "-o", str(out)]) == 2  # never over a file
    assert "exists already" in capsys.readouterr().err
    again = make_task("jsonl", path=str(out), dev_fraction=0.0, test_fraction=0.0).load("train")
    assert [(e.prompt, e.expert) for e in again] == [(row["prompt"], row["expert"]) for row in rows]


def test_data_prepare_writes_the_whole_split_by_default(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "all.jsonl"
    output(capsys, "data", "prepare", "arithmetic", "train_size=17", "-o", str(out))
    assert len(out.read_text().splitlines()) == 17


def test_a_users_file_is_validated_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "mine.jsonl"
    good = {"prompt": "1 + 1?", "expert": "1 + 1 = 2", "answer": 2}
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "prompt": "2?"}) + "\n")
    assert "2 rows, 2 usable, 0 with a problem" in output(capsys, "data", "validate", str(file))
    assert output(capsys, "data", "preview", str(file), "-n", "1").startswith("== mine.jsonl:")
    file.write_text(json.dumps(good) + "\n{\n" + json.dumps({"prompt": "3?"}) + "\n")
    assert main(["data", "validate", str(file)]) == 2
    said = capsys.readouterr().out
    assert "3 rows, 1 usable, 2 with a problem" in said and f"{file}:2: not JSON" in said and f"{file}:3: " in said


def test_make_model_writes_a_directory_that_transformers_loads(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "model"
    small = ("warm_start.examples=300", "data.num_experts=5", "model.build.hidden_size=32", "model.build.layers=1")
    said = output(capsys, "make-model", "tiny", *small, "seed=3", "-o", str(out))
    assert said.startswith("Qwen2ForCausalLM of 0.0") and said.endswith(f" tokens written to {out}\n")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.hidden_size == 32 and model.config.vocab_size == len(tokenizer)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "start 4; lose 3?"}], add_generation_prompt=True)
    assert tokenizer.decode(ids["input_ids"]) == "<|user|>start 4; lose 3?<|assistant|>"
    for number, same in ((3, True), (4, False)):  # the weights are the seed's
        other = tmp_path / f"seed{number}"
        output(capsys, "make-model", "tiny", *small, f"seed={number}", "-o", str(other))
        pairs = zip(weights(out).values(), weights(other).values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same


def test_doctor_says_whether_training_can_run_here(capsys: pytest.CaptureFixture) -> None:
    code = main(["doctor"])
    said = capsys.readouterr().out
    assert code == doctor.collect().exit_status
    assert torch.__version__.split("+")[0] in said


def test_overrides_may_stand_on_either_side_of_options(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    small = ("data.num_experts=10", "warm_start.examples=300")
    one = output(capsys, "train", "tiny", *small, "seed=5", "steps=7", "--dry-run", "--run-name", "x")
    two = output(capsys, "train", "--run-name", "x", "tiny", small[0], "--dry-run", small[1], "seed=5", "steps=7")
    assert one == two and "7 steps, seed 5" in one


def test_help_and_version_answer_without_loading_torch() -> None:
    code = (
        "import sys; from airl_fast.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    for argv, expected in ((["--help"], "COMMAND"), (["train", "--help"], "--resume"), (["--version"], "airl-fast ")):
        done = subprocess.run(
            [sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60, check=True
        )
        assert expected in done.stdout
    assert done.stdout == f"airl-fast {version('airl-fast')}\n"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    command = f"{sys.executable} -m airl_fast data preview arithmetic -n 400 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("== arithmetic/")
