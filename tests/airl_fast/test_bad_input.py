"""Every mistake of a user's is one sentence that names what to change, exit code 2, and leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from airl_fast.artifacts import START
from airl_fast.cli import main
from airl_fast.manifest import MODEL
from tests.airl_fast.run_cases import metrics, small_run

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture) -> Refuse:
    """Run a command that must be refused; returns its sentence. Training starts from the small run's start policy."""

    def run(*words: object, command: str = "train", config: object = "tiny") -> str:
        argv = [command, str(config)]
        if command == "train":
            argv += [f"model={{path: {small_run() / START}, build: null}}", f"output_dir={tmp_path / 'runs'}"]
            argv += ["warm_start.updates=0", "steps=1", "data.num_experts=12", "evaluate.baselines=[]"]
        before = listing(tmp_path)
        capsys.readouterr()
        assert main([*argv, *map(str, words)]) == 2
        said = capsys.readouterr().err
        sentence = said.removeprefix("airl-fast: ").removesuffix("\n")
        assert said == f"airl-fast: {sentence}\n" and "\n" not in sentence and sentence[-1] in ".?"
        assert listing(tmp_path) == before  # nothing lost, nothing half-written
        return sentence

    return run


def listing(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ---------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("policy.kl_coeff=1", "unknown key 'policy.kl_coeff'; did you mean 'policy.kl_coef'?"),
        ("polcy.kl_coef=1", "unknown key 'polcy'; did you mean 'policy'?"),
        ("samples_per_prompt=4", "did you mean 'rollout.samples_per_prompt'?"),
        ("steps=0", "'steps' is 0, which is out of range; it must be greater than 0."),
        ("policy.clip_low=2", "it must be greater than 0 and less than 1."),
        ("discriminator.label_smoothing=1", "it must be at least 0.0 and less than 1.0."),
        ("rollout.top_p=0", "'rollout.top_p' is 0, which is out of range; it must be greater than 0 and at most 1."),
        ("rollout.top_p=1.5", "must be greater than 0 and at most 1."),
        ("rollout.top_p=.nan", "'rollout.top_p' is nan"),
        ("rollout.top_p=high", "'rollout.top_p' must be a number, not 'high'."),
        ("rollout.temperature=0", "'rollout.temperature' is 0, which is out of range; it must be greater than 0."),
        ("rollout.temperature=-1", "must be greater than 0."),
        ("rollout.temperature=.nan", "must be finite and greater than 0."),
        ("rollout.temperature=.inf", "must be finite and greater than 0."),
        ("rollout.temperature=true", "'rollout.temperature' must be a number, not true or false."),
        ("algorithm=ppo", "'algorithm' is 'ppo', but it must be 'airl', 'sft', 'grpo' or 'reward'."),
        ("discriminator.loss=wgan", "needs discriminator.lipschitz=gradient_penalty or spectral_norm."),
        ("model.path=null", "set exactly one of model.path (a local model directory) and model.build."),
        ("baseline_overrides={grop: {}}", "did you mean 'grpo'?"),
        ("steps", "an override is written key=value"),
    ],
)
def test_a_wrong_value_names_its_key_and_what_it_may_be(refuse: Refuse, word: str, expected: str) -> None:
    sentence = refuse(word)
    assert sentence.startswith(f"command line, '{word}': ") and expected in sentence


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.task=arithmetics"], "unknown task 'arithmetics': did you mean 'arithmetic'?"),
        (["data.options={min_op: 1}"], "task 'arithmetic' has no option 'min_op': did you mean 'min_ops'?"),
        (["data.path=x"], "task 'arithmetic' generates its prompts and reads no file: remove data.path."),
        (["device=tpu"], "use auto, cpu or cuda"),
        (["--run-name", "a/b"], "--run-name 'a/b': use letters, digits, '-', '_' and '.' only."),
        (["--resume", "/no/where"], "--resume /no/where: there is no such directory; give a run"),
        (
            ["evaluate.baselines=[grpo]", "baseline_overrides={grpo: {polcy: {}}}"],
            "baseline grpo (baseline_overrides.grpo): unknown key 'polcy'; did you mean 'policy'?",
        ),
    ],
)
def test_a_wrong_choice_names_the_right_ones(refuse: Refuse, words: list[str], expected: str) -> None:
    assert expected in refuse(*words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
def test_a_gpu_that_is_not_there(refuse: Refuse) -> None:
    assert refuse("device=cuda") == "device=cuda: this machine has no usable CUDA GPU; use device=auto or device=cpu."


def test_an_unknown_preset_or_file_is_named(refuse: Refuse, tmp_path: Path) -> None:
    sentence = refuse(config="tinny")
    assert sentence.startswith("There is no preset 'tinny'; did you mean 'tiny'? The presets are: gsm8k-reward, ")
    assert "no/such.yaml: there is no such file" in refuse(config="no/such.yaml")
    wrong = tmp_path / "mine.yaml"
    wrong.write_text("extends: tiny\nrollout: {top_pp: 0.9}\n")
    sentence = refuse(config=wrong)
    assert str(wrong) in sentence and "did you mean 'rollout.top_p'?" in sentence
    wrong.write_text("steps: [1\n")
    assert refuse(config=wrong).startswith(f"{wrong}, line 2: this is not valid YAML")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: COMMAND; see `airl-fast --help`."),
        (["trian"], "invalid choice: 'trian' (choose from 'train', "),
        (["train"], "the following arguments are required: config; see `airl-fast train --help`."),
        (["train", "tiny", "--seed=1"], "unrecognized arguments: --seed=1"),
        (["eval", "/no/where"], "/no/where is no run directory (it has no config.yaml)"),
        (["eval", "/no/where", "--split", "tests"], "invalid choice: 'tests' (choose from 'train', 'dev', 'test')"),
        (["data", "preview", "gsm9k"], "unknown task 'gsm9k': did you mean 'gsm8k'?"),
        (["data", "preview", "gsm8k"], "task 'gsm8k' reads files: set data.path to the folder that holds train.jsonl."),
        (["data", "preview", "arithmetic", "min_ops"], "min_ops: options are written key=value"),
        (["data", "preview", "arithmetic", "-n", "0"], "-n 0: give a whole number from 1."),
        (["data", "prepare", "arithmetic"], "name the file to write with -o FILE."),
        (["data", "prepare", "arithmetic", "--split", "test", "-o", "x"], "the test split is for evaluation only"),
        (["data", "validate", "/no/where.jsonl"], "/no/where.jsonl: no such file"),
        (["make-model", "tiny", "-o", "/"], "make-model: / exists; choose another directory with -o."),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_one_sentence(argv: list[str], expected: str, capsys: pytest.CaptureFixture) -> None:
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("airl-fast: ") and said.count("\n") == 1 and expected in said


# ---------------------------------------------------------------------------------------------- models


def broken_copy(tmp_path: Path, **contents: bytes | None) -> Path:
    """A user's model directory in which some files have other contents, or (None) are missing."""
    folder = tmp_path / "model"
    shutil.copytree(small_run() / START, folder, ignore=shutil.ignore_patterns(MODEL))
    for name, content in contents.items():
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("key", ["model.path", "discriminator.path"])
@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("config.json", None, "has no config.json; give the directory that `save_pretrained` wrote."),
        ("model.safetensors", None, "has no *.safetensors weights; save the model as safetensors."),
        ("tokenizer.json", None, "has no tokenizer.json; save the model's fast tokenizer beside its weights."),
        ("config.json", b"{", "is not a valid JSON file"),
        ("model.safetensors", b"cut short", "does not load"),
        ("tokenizer.json", b"{}", "does not load"),
    ],
)
def test_a_model_directory_says_what_it_lacks(
    refuse: Refuse, tmp_path: Path, key: str, file: str, content: bytes | None, expected: str
) -> None:
    folder = broken_copy(tmp_path, **{file: content})
    sentence = refuse(f"{key}={folder}")
    assert sentence.startswith(f"{key}: ") and str(folder) in sentence and expected in sentence


def test_a_model_that_is_not_there_or_has_no_template_is_named(refuse: Refuse, tmp_path: Path) -> None:
    expected = "no model directory at /no/where; give a local Hugging Face directory."
    assert refuse("model.path=/no/where") == f"model.path: {expected}"
    assert refuse("discriminator.path=/no/where") == f"discriminator.path: {expected}"
    folder = broken_copy(tmp_path, **{"chat_template.jinja": None})
    assert refuse(f"model.path={folder}").endswith("has no chat template; set model.chat_template.")


# ---------------------------------------------------------------------------------------------- data


def fruit(folder: Path, *extra: object, name: str = "fruit.jsonl", rows: int = 40) -> str:
    """The override for a file of good rows followed by others, which may be text that is no JSON."""
    good = [{"prompt": f"{i}+1?", "expert": f"{i} + 1 = {i + 1}", "answer": i + 1} for i in range(rows)]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in (*good, *extra)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return f"data={{task: jsonl, path: {folder / name}, options: {{}}}}"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{'prompt': 1}", "not JSON (Expecting property name enclosed in double quotes)"),
        ('{"prompt": "a"', "not JSON"),
        ([1, 2], "a list, not an object"),
        ({"prompt": "a", "answer": 1}, "lacks the field 'expert'; add it."),
        ({"expert": "a", "answer": 1}, "lacks the field 'prompt'; add it."),
        ({"prompt": "a", "expert": "b"}, "lacks the field 'answer'; add it."),
        ({"prompt": "a", "expert": " ", "answer": 1}, "'expert' is empty; fill it in or delete the line."),
        ({"prompt": "a", "expert": ["b"], "answer": 1}, "'expert' is a list, not a string"),
        ({"prompt": "a", "expert": "<think></think><answer>1</answer>", "answer": 1}, "with both filled in"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(
    refuse: Refuse, tmp_path: Path, row: object, expected: str
) -> None:
    sentence = refuse(fruit(tmp_path, row, rows=4))
    assert sentence.startswith(f"{tmp_path}/fruit.jsonl:5: ") and expected in sentence


def test_demonstrations_that_fail_their_verifier_are_counted(
    refuse: Refuse, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    wrong = [
        {"prompt": f"{i}+9?", "expert": f"<think>\n?\n</think>\n<answer>{i}</answer>", "answer": 0} for i in (5, 6, 7)
    ]
    data = fruit(tmp_path, *wrong)
    sentence = refuse(data, "data.failing_experts=error")
    assert "; 3 fail (fruit.jsonl:41, fruit.jsonl:42, fruit.jsonl:43); correct them" in sentence
    assert sentence.endswith("or leave them out with data.failing_experts=drop.")
    argv = ["train", "tiny", data, f"model={{path: {small_run() / START}, build: null}}", "--dry-run"]
    shown = {}
    for choice, done in (("keep", "kept"), ("drop", "dropped")):
        assert main([*argv, "warm_start.updates=0", f"data.failing_experts={choice}"]) == 0
        shown[choice] = capsys.readouterr().out
        assert f"3 fail (fruit.jsonl:41, fruit.jsonl:42, fruit.jsonl:43); {done}" in shown[choice]
    used = {choice: int(text.split("jsonl: ")[1].split()[0]) for choice, text in shown.items()}
    assert used["keep"] == used["drop"] + 3


def test_prompts_longer_than_the_context_are_refused_or_left_out_with_their_number(
    refuse: Refuse, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    long = [{"prompt": "9 + 1, " * 60, "expert": "9 + 1 = 10", "answer": 10}]
    longer = [{"prompt": "How many?", "expert": "9 + 1 = 10\n" * 40, "answer": 10}]
    data = fruit(tmp_path, *long, *longer, rows=60)
    fixed = (data, "data.num_experts=null", "rollout.max_new_tokens=64")
    sentence = refuse(*fixed)
    assert sentence.startswith("the policy's context is 256 tokens, but training prompt fruit.jsonl:6")
    assert "(rollout.max_new_tokens=64 or the demonstration) need " in sentence and "(2 of " in sentence
    assert sentence.endswith("lower rollout.max_new_tokens, or leave such prompts out with data.too_long=drop.")
    argv = ["train", "tiny", *fixed, f"model={{path: {small_run() / START}, build: null}}", "warm_start.updates=0"]
    assert main([*argv, "data.too_long=drop", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "2 of " in shown and "training prompts left out (data.too_long=drop)" in shown
    assert "and none of the 12 fits" in refuse("rollout.max_new_tokens=999")
    assert "and none of the 12 fits" in refuse("rollout.max_new_tokens=999", "data.too_long=drop")


def test_test_prompts_must_fit_before_training_begins(refuse: Refuse, tmp_path: Path) -> None:
    fruit(tmp_path, name="train.jsonl")
    fruit(tmp_path, {"prompt": "9 + 1, " * 60, "expert": None, "answer": 10}, name="test.jsonl", rows=0)
    data = f"data={{task: jsonl, path: {tmp_path}, options: {{}}}}"
    assert "but test prompt test.jsonl:1 and its completion" in refuse(data)


@pytest.mark.parametrize("nothing", ["no demonstration", "no test prompt", "no file", "no path", "no warm start"])
def test_data_without_what_a_run_needs(refuse: Refuse, tmp_path: Path, nothing: str) -> None:
    if nothing == "no demonstration":
        fruit(tmp_path, {"prompt": "a", "expert": None, "answer": 1}, rows=0)
        expected = "data.task=jsonl: no training prompt has a usable demonstration; check data.path."
    elif nothing == "no test prompt":
        fruit(tmp_path, rows=1)
        expected = "the test split holds no prompt to evaluate on"
    elif nothing == "no file":
        assert "/no/where.jsonl does not exist" in refuse("data={task: jsonl, path: /no/where.jsonl, options: {}}")
        return
    elif nothing == "no path":
        assert "task 'jsonl' reads files: set data.path" in refuse("data={task: jsonl, path: null, options: {}}")
        return
    else:
        data = fruit(tmp_path)
        assert "set data.options.warmstart_fraction" in refuse(data, "warm_start.updates=5")
        return
    assert expected in refuse(f"data={{task: jsonl, path: {tmp_path}/fruit.jsonl, options: {{}}}}")


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["algorithm=grpo", "rollout.samples_per_prompt=1"], "set rollout.samples_per_prompt to 2 or more."),
        (["algorithm=grpo", "grpo.correct=0"], "set one, such as grpo.correct=1."),
        (
            ["evaluate.baselines=[grpo]", "baseline_overrides={grpo: {rollout: {samples_per_prompt: 1}}}"],
            "set rollout.samples_per_prompt to 2 or more.",
        ),
    ],
)
def test_a_run_in_which_no_group_could_ever_be_compared(refuse: Refuse, words: list[str], remedy: str) -> None:
    sentence = refuse(*words)
    assert "zero usable groups" in sentence and sentence.endswith(remedy)


# ---------------------------------------------------------------------------------------------- run directories


def test_a_run_that_exists_is_kept(refuse: Refuse, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "mine"
    kept.mkdir(parents=True)
    (kept / "metrics.jsonl").write_text('{"step": 1}\n')
    sentence = refuse("--run-name", "mine")
    assert sentence.startswith(f"{kept} exists and is not empty; ")
    assert "--run-name" in sentence and sentence.endswith("--resume auto.")
    assert metrics(kept) == [{"step": 1}]


@pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/file/deeper", "/proc/airl-fast-runs"])
def test_a_run_directory_that_cannot_be_written(refuse: Refuse, tmp_path: Path, place: str) -> None:
    if place.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no /proc on this system, where root too cannot write")
    (tmp_path / "file").write_text("in the way")
    output = place.format(tmp=tmp_path)
    sentence = refuse(f"output_dir={output}", "--run-name", "x")
    assert sentence.startswith(f"{output}/x: cannot be written: ") and sentence.endswith("choose another output_dir.")


def test_an_evaluation_that_cannot_be(refuse: Refuse, capsys: pytest.CaptureFixture) -> None:
    run = small_run()
    before = listing(run / "eval")
    assert refuse("--k", "0", command="eval", config=run).startswith("--k 0: give whole numbers from 1")
    assert refuse("--k", "1,x", command="eval", config=run).startswith("--k 1,x: give whole numbers from 1")
    sentence = refuse("--k", "9", command="eval", config=run)
    assert sentence == "--k 9: more than the 5 samples per prompt; raise --samples."
    assert "'evaluate.samples' is 0" in refuse("--samples", "0", command="eval", config=run)
    assert "it has no config.yaml" in refuse(command="eval", config=run / START)
    assert listing(run / "eval") == before


# ---------------------------------------------------------------------------------------------- as a process


def test_a_process_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "airl_fast",
        "train",
        "tiny",
        "policy.kl_coeff=1",
        f"output_dir={tmp_path / 'runs'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "airl-fast: command line, 'policy.kl_coeff=1': unknown key 'policy.kl_coeff'; "
        "did you mean 'policy.kl_coef'?\n"
    )  # fmt: skip
    assert not (tmp_path / "runs").exists()
