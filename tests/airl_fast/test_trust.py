"""A run or a model of somebody else's runs none of its Python code unless this very call allows it.

The code is real: it leaves a mark when it is imported, and with the switch the same directories load by it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers.dynamic_module_utils
import yaml

from airl_fast import manifest
from airl_fast.artifacts import POLICY, REWARD, START, load_policy
from airl_fast.baselines import train_command
from airl_fast.cli import main
from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.evaluate.command import open_run
from airl_fast.integrations.reward import AIRLRewardFunction
from airl_fast.judge.judge import open_judge
from airl_fast.overrides import load_config, read_yaml
from airl_fast.rollout import vllm
from airl_fast.saved import run_config
from tests.airl_fast.run_cases import EASY, small_run

SWITCH = "--trust-remote-code"
CODE = """
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, PreTrainedTokenizerFast
Path({mark!r}).touch()
class TheirConfig(Qwen2Config):
    model_type = "theirs"
class TheirForCausalLM(Qwen2ForCausalLM):
    config_class = TheirConfig
class TheirModel(Qwen2Model):
    config_class = TheirConfig
class TheirTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS = {
    "config.json": {
        "AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirForCausalLM",
        "AutoModel": "theirs.TheirModel",
    },
    "tokenizer_config.json": {"AutoTokenizer": ["theirs.TheirTokenizer", "theirs.TheirTokenizer"]},
}  # fmt: skip
TRACE = {"prompt": "start 7; gain 1?", "completion": "<think>\n7 + 1 = 8\n</think>\n<answer>8</answer>"}


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def bring_code(folder: Path, mark: Path, model_type: str = "theirs") -> None:
    """Make a model directory need (or, of a known type, only offer) code of its own, down to an honest manifest."""
    (folder / "theirs.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)) + "def generate(model): pass\n")
    change(folder / "config.json", auto_map=MAPS["config.json"], model_type=model_type)
    change(folder / "tokenizer_config.json", auto_map=MAPS["tokenizer_config.json"], tokenizer_class="TheirTokenizer")
    manifest.write(folder, manifest.MODEL)


def claim(run: Path) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["trust_remote_code"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """The file that their code makes. What transformers copies before it imports it stays in this test's directory."""
    cache = str(tmp_path / "modules")
    monkeypatch.setenv("HF_MODULES_CACHE", cache)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "their code ran"


def copy_of_run(target: Path) -> Path:
    shutil.copytree(small_run(), target, ignore=shutil.ignore_patterns(".lock"))
    return target


@pytest.fixture
def theirs(tmp_path, mark):
    """A whole run of theirs: every model directory brings code, and config.yaml says to run it."""
    run = copy_of_run(tmp_path / "theirs")
    for name in (START, POLICY, REWARD, "baselines/sft/final/policy", "baselines/sft/start"):
        bring_code(run / name, mark)
    claim(run)
    return run


def traces(tmp_path: Path) -> str:
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps({**TRACE, "answer": "8"}) + "\n")
    return str(file)


def mine(tmp_path: Path, **tree: object) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def grid(tmp_path: Path, **tree: object) -> str:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"preset": "tiny", "variants": [{"name": "a", "topic": "t"}], **tree}))
    return str(file)


TRUSTING = {"model": {"trust_remote_code": True}}

# name -> the command line, of (their run, a directory to write in)
READERS = {
    "eval": lambda run, tmp: ["eval", run, "--k", "1"],
    "rerank": lambda run, tmp: ["rerank", run, "--prompts", "4", "--n", "2"],
    "rerank a file": lambda run, tmp: ["rerank", run, traces(tmp), "--allow-training-prompts"],
    "rerank their policy": lambda run, tmp: ["rerank", small_run(), "--policy", run, "--prompts", "4", "--n", "2"],
    "score": lambda run, tmp: ["score", run, traces(tmp), "--allow-training-prompts"],
    "score a reward": lambda run, tmp: ["score", run / REWARD, traces(tmp), "--allow-training-prompts"],
    "localize": lambda run, tmp: ["localize", run, traces(tmp), "--allow-training-prompts", "--rule", "argmin"],
    "transfer": lambda run, tmp: ["transfer", run, "--prompts", "4", "--n", "2", "--json", tmp / "t.json"],
    "transfer of their run": lambda run, tmp: [
        "transfer", small_run(), "--policy", run, "--prompts", "4", "--n", "2", "--json", tmp / "t.json",
    ],
    "generate": lambda run, tmp: ["generate", run, traces(tmp), "--guided", "none", "--n", "1"],
    "export a policy": lambda run, tmp: ["export", run, "-o", tmp / "out"],
    "export a discriminator": lambda run, tmp: ["export", run, "--what", "discriminator", "-o", tmp / "out"],
}  # fmt: skip
# Such a claim of a file never counts, be the file the user's own, and whatever lies behind it.
FILES = {
    "train their config": lambda run, tmp: ["train", run / "config.yaml", f"output_dir={tmp}"],
    "dry run of their config": lambda run, tmp: ["train", run / "config.yaml", "--dry-run"],
    "make-model": lambda run, tmp: ["make-model", run / "config.yaml", "-o", tmp / "out"],
    "train what extends their config": lambda run, tmp: [
        "train", mine(tmp, extends=str(run / "config.yaml"), seed=1), f"output_dir={tmp}",
    ],
    "train my own file": lambda run, tmp: [
        "train", mine(tmp, **{**TRUSTING, "extends": "tiny", "output_dir": str(tmp)}),
    ],
    "a baseline's settings": lambda run, tmp: [
        "train", mine(tmp, extends="tiny", output_dir=str(tmp), baseline_overrides={"sft": TRUSTING}), *EASY,
    ],
    "a grid's base": lambda run, tmp: ["ablate", grid(tmp, base=TRUSTING), "-o", tmp / "out"],
    "a grid's variant": lambda run, tmp: [
        "ablate", grid(tmp, variants=[{"name": "a", "topic": "t", "change": TRUSTING}]), "-o", tmp / "out",
    ],
    "a grid's start": lambda run, tmp: [
        "ablate", "-o", tmp / "out",
        grid(tmp, starts={"b": TRUSTING},
             variants=[{"name": "a", "topic": "t", "change": {"discriminator": {"path": "{start:b}"}}}]),
    ],
}  # fmt: skip
# Nothing claims anything, but the directory cannot be loaded without its code.
DIRECTORIES = {
    "model.path": lambda run, tmp: [
        "train", "tiny", *EASY, f"output_dir={tmp}", f"model={{build: null, path: {run / START}}}",
    ],
    "discriminator.path": lambda run, tmp: [
        "train", "tiny", *EASY, f"output_dir={tmp}", f"discriminator.path={run / START}",
    ],
    "resume": lambda run, tmp: [
        "train", "tiny", *EASY, "steps=9", f"output_dir={run.parent}", "--run-name", run.name, "--resume", "auto",
    ],
    "transfer of a directory": lambda run, tmp: ["transfer", small_run(), "--policy", run / POLICY],
    "generate by a directory": lambda run, tmp: ["generate", small_run(), traces(tmp), "--policy", run / POLICY],
    "rerank a directory": lambda run, tmp: ["rerank", small_run(), "--policy", run / POLICY],
}  # fmt: skip


def refused(argv: list, mark: Path, capsys: pytest.CaptureFixture) -> str:
    """The one sentence that a command line gets which would run their code."""
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    assert not mark.exists(), "their code ran"
    (sentence,) = [line for line in err.splitlines() if line.startswith("airl-fast: ")]
    assert SWITCH in sentence and sentence.endswith(".") and "Traceback" not in out + err
    return sentence


@pytest.mark.parametrize("name", READERS)
def test_a_run_that_asks_for_trust_is_refused_by_every_command_that_loads_it(theirs, tmp_path, mark, capsys, name):
    sentence = refused(READERS[name](theirs, tmp_path), mark, capsys)
    assert f"{theirs}/config.yaml: 'model.trust_remote_code' is set there" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith("export")])
def test_a_run_that_asks_for_nothing_but_needs_its_code_is_refused_too(theirs, tmp_path, mark, capsys, name):
    shutil.copy(small_run() / "config.yaml", theirs / "config.yaml")
    sentence = refused(READERS[name](theirs, tmp_path), mark, capsys)
    assert str(theirs) in sentence and "loads by Python code that it brings" in sentence


@pytest.mark.parametrize("name", FILES)
def test_no_file_gives_trust(theirs, tmp_path, mark, capsys, name):
    sentence = refused(FILES[name](theirs, tmp_path), mark, capsys)
    assert "'model.trust_remote_code' is set there" in sentence and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_directory_that_needs_its_code_is_refused(theirs, tmp_path, mark, capsys, name):
    sentence = refused(DIRECTORIES[name](theirs, tmp_path), mark, capsys)
    assert str(theirs) in sentence and "loads by Python code that it brings" in sentence


def test_serve_refuses_their_run_before_it_answers(theirs, mark):
    command = [sys.executable, "-m", "airl_fast", "serve", str(theirs), "--port", "0"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 2 and SWITCH in run.stderr and "Traceback" not in run.stderr
    assert "serving" not in run.stdout and not mark.exists()


@pytest.mark.parametrize("argv", [["report", "RUN", "-o", "OUT/r.html"], ["compare", "RUN", small_run]])
def test_what_loads_no_model_reads_their_run_and_runs_nothing(theirs, tmp_path, mark, capsys, argv):
    words = {"RUN": str(theirs), "OUT/r.html": str(tmp_path / "r.html"), small_run: str(small_run())}
    assert main([words.get(word, word) for word in argv]) == 0
    assert not mark.exists() and "Traceback" not in capsys.readouterr().err


CONTROLS = ("score a reward", "transfer of their run", "generate", "export a policy")  # a load through each door


@pytest.mark.parametrize("name", CONTROLS)
def test_with_the_switch_the_same_command_runs_their_code(theirs, tmp_path, mark, capsys, name):
    """The positive control: what the tests above refuse is real, and the switch is all it takes."""
    argv = [str(word) for word in READERS[name](theirs, tmp_path)]
    assert main([*argv, SWITCH]) == 0, capsys.readouterr().err
    assert mark.exists() or name.startswith("export")  # a copy runs nothing


def test_code_that_is_not_needed_is_not_run_without_trust(tmp_path, mark, capsys):
    """A known type has a class in transformers, which is taken; auto_map, custom_generate and the rest stay data."""
    run = copy_of_run(tmp_path / "theirs")
    for name in (START, POLICY, REWARD):
        bring_code(run / name, mark, "qwen2")
        change(run / name / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        manifest.write(run / name, manifest.MODEL)
    outputs = {}
    for each in (run, small_run()):
        assert main(["score", str(each), traces(tmp_path), "--allow-training-prompts"]) == 0
        outputs[each] = json.loads(capsys.readouterr().out)
    assert not mark.exists()
    assert outputs[run]["token_rewards"] == outputs[small_run()]["token_rewards"]


# ---- Python ----


@pytest.mark.parametrize("open_it", [open_judge, open_run, AIRLRewardFunction, run_config])
def test_in_python_trust_is_a_keyword_argument(theirs, mark, open_it):
    with pytest.raises(UserError, match=SWITCH):
        open_it(theirs)
    assert not mark.exists()
    opened = open_it(theirs, trust_remote_code=True)
    assert getattr(opened, "config", opened).model.trust_remote_code and (mark.exists() or open_it is run_config)


def test_a_file_cannot_say_it_in_other_words():
    for value in (True, 1, "true", "yes", "on"):
        with pytest.raises(UserError, match=r"x\.yaml: 'model\.trust_remote_code' is set there"):
            load_config(Config, {"model": {"build": {}, "trust_remote_code": value}}, [], origin="x.yaml")
        with pytest.raises(UserError, match="is set there"):
            load_config(Config, {"model": {"trust_remote_code": value}}, ["model.build={}"], origin="x.yaml")
    for tree, words, expected in (
        ({}, ["model.trust_remote_code=true"], True),
        ({}, ["model={trust_remote_code: true}"], True),
        ({"trust_remote_code": True}, ["model.trust_remote_code=true"], True),
        ({"trust_remote_code": True}, ["model.trust_remote_code=false"], False),
        ({"trust_remote_code": False}, [], False),
    ):
        config = load_config(Config, {"model": {"build": {}, **tree}}, words, origin="x.yaml")
        assert config.model.trust_remote_code is expected


# ---- a trusted run ----


def test_trust_reaches_the_run_its_baselines_and_no_later_call(tmp_path, mark, capsys):
    model = tmp_path / "model"
    shutil.copytree(small_run() / START, model)
    (model / manifest.MODEL).unlink()
    bring_code(model, mark)
    words = [
        *EASY, "steps=1", f"output_dir={tmp_path}", f"model={{build: null, path: {model}}}", "warm_start.updates=0",
        "evaluate.baselines=[sft]", "evaluate.prompts=2", "evaluate.samples=2", "discriminator.warmup_steps=0",
    ]  # fmt: skip
    assert main(["train", "tiny", *words, "--run-name", "run", SWITCH]) == 0, capsys.readouterr().err
    run = tmp_path / "run"
    assert (run / "baselines" / "sft" / POLICY).is_dir()
    assert type(load_policy(run / POLICY, open_run(run, trust_remote_code=True).config.model, torch.device("cpu")).model
                ).__name__ == "TheirForCausalLM"  # fmt: skip
    mark.unlink()
    resumed = ["train", "tiny", *words, "--run-name", "run", "--resume", "auto"]
    for argv in (["eval", run], ["score", run, traces(tmp_path)], resumed):
        refused(argv, mark, capsys)
    assert read_yaml(run / "config.yaml")["model"]["trust_remote_code"] is True
    assert main(["score", str(run), traces(tmp_path), "--allow-training-prompts", SWITCH]) == 0
    assert main([*resumed, "model.trust_remote_code=true"]) == 0, capsys.readouterr().err


# ---- neighbours ----


def test_a_hostile_chat_template_stays_in_its_sandbox(tmp_path, mark, capsys):
    run = copy_of_run(tmp_path / "theirs")
    template = "{{ cycler.__init__.__globals__.os.mknod('" + str(mark) + "') }}"
    (run / START / "chat_template.jinja").write_text(template)
    manifest.write(run / START, manifest.MODEL)
    assert main(["score", str(run), traces(tmp_path), "--allow-training-prompts"]) == 2
    err = capsys.readouterr().err
    assert not mark.exists() and "Traceback" not in err and "template" in err


def test_a_task_is_one_of_ours_and_never_a_path_to_code(theirs, tmp_path, capsys):
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    for task in ("evil:Task", "os:system", str(tmp_path / "evil.py")):
        assert main(["train", "tiny", f"data.task={task}", f"output_dir={tmp_path}"]) == 2
        assert "unknown task" in capsys.readouterr().err


def test_a_child_process_imports_nothing_from_a_directory_that_its_parent_does_not(tmp_path, monkeypatch):
    """A run that came with a yaml.py of its own, and a user who trains in it by the script airl-fast."""
    (tmp_path / "yaml.py").write_text("raise SystemExit('their code ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    command = train_command(tmp_path / "none.yaml", "x", trusted=False)
    assert "model.trust_remote_code=true" not in command
    paths = os.pathsep.join(sys.path)
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert run.returncode == 2 and "none.yaml: there is no such file" in run.stderr
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    command = train_command(tmp_path / "none.yaml", "x", trusted=True)  # such a parent has imported from there itself
    assert "-P" not in command and command[-1] == "model.trust_remote_code=true"


@pytest.mark.parametrize("trusted", [False, True])
def test_vllm_trusts_what_this_call_does(tmp_path, trusted):
    config = load_config(
        Config, {"model": {"build": {}}}, ["model.trust_remote_code=true"] if trusted else [], origin="x"
    )
    lm = open_run(small_run()).start
    needs = vllm.Needs(longest=64, sequences=2, probes=(), scratch=tmp_path)
    assert vllm._options(config, lm, needs)["trust_remote_code"] is trusted
