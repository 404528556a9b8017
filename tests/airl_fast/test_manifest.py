"""Weights, configurations and tokenizers that changed on the disk since a run wrote them are named, never used."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from airl_fast import manifest, saved
from airl_fast.artifacts import POLICY, REWARD, START
from airl_fast.cli import main
from airl_fast.errors import UserError
from airl_fast.manifest import MODEL
from tests.airl_fast.run_cases import EASY, SMALL, small_run

SFT = "baselines/sft/" + POLICY


def flip(file: Path, place: float = 0.9) -> None:
    """One bit of one byte, most of the way into the file: of a weight, or of a digit or a letter."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 1
    file.write_bytes(data)


@pytest.fixture
def run(tmp_path) -> Path:
    shutil.copytree(small_run(), tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "run"


def traces(tmp: Path) -> str:
    file = tmp / "traces.jsonl"
    text = "<think>\n7 + 1 = 8\n</think>\n<answer>8</answer>"
    file.write_text(json.dumps({"prompt": "start 7; gain 1?", "completion": text, "answer": "8"}) + "\n")
    return str(file)


# What reads a model directory: name -> (the directories it reads, its command line of (run, a directory to write in)).
READ: dict[str, tuple[tuple[str, ...], Callable[[Path, Path], list]]] = {
    "score": ((START, REWARD), lambda run, tmp: ["score", run, traces(tmp), "--allow-training-prompts"]),
    "localize": ((START, REWARD), lambda run, tmp: ["localize", run, traces(tmp), "--rule", "argmin"]),
    "rerank": ((START, REWARD), lambda run, tmp: ["rerank", run, "--prompts", "4", "--n", "2"]),
    "rerank the policy": ((POLICY,), lambda run, tmp: ["rerank", run, "--policy", "airl"]),
    "transfer": ((START, REWARD), lambda run, tmp: ["transfer", run, "--prompts", "4", "--n", "2"]),
    "transfer of a baseline": ((SFT,), lambda run, tmp: ["transfer", run, "--policy", "sft"]),
    "transfer of another run": ((POLICY,), lambda run, tmp: ["transfer", small_run(), "--policy", run]),
    "generate": ((START, REWARD), lambda run, tmp: ["generate", run, traces(tmp), "--guided", "none"]),
    "generate by the policy": ((POLICY,), lambda run, tmp: ["generate", run, traces(tmp), "--policy", "airl"]),
    "serve": ((START, REWARD), lambda run, tmp: ["serve", run, "--port", "0"]),
    "eval": ((START, POLICY, SFT, REWARD), lambda run, tmp: ["eval", run, "--prompts", "2", "--samples", "2",
                                                             "--k", "1"]),
    "export": ((POLICY,), lambda run, tmp: ["export", run, "-o", tmp / "out"]),
    "export the reward": ((REWARD,), lambda run, tmp: ["export", run, "--what", "discriminator", "-o", tmp / "out"]),
    "resume": ((START,), lambda run, tmp: ["train", "tiny", *SMALL, f"output_dir={run.parent}", "--run-name", run.name,
                                           "--resume", "auto"]),
    "train on it": ((START,), lambda run, tmp: ["train", "tiny", *EASY, f"output_dir={tmp}",
                                                f"model={{build: null, path: {run / START}}}"]),
    "train its reader": ((START,), lambda run, tmp: ["train", "tiny", *EASY, f"output_dir={tmp}",
                                                     f"discriminator.path={run / START}"]),
}  # fmt: skip


def refused(argv: list, capsys: pytest.CaptureFixture) -> str:
    assert main([str(word) for word in argv]) == 2
    out, err = capsys.readouterr()
    (sentence,) = [line for line in err.splitlines() if line.startswith("airl-fast: ")]
    assert "Traceback" not in out + err and sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, (parts, _) in READ.items() for part in parts])
def test_a_flipped_bit_in_the_weights_stops_every_command_that_reads_them(run, tmp_path, capsys, name, part):
    flip(run / part / "model.safetensors")
    sentence = refused(READ[name][1](run, tmp_path), capsys)
    assert f"{run / part} is not as it was written: model.safetensors has changed since it was written" in sentence
    assert f"delete {run / part / MODEL}." in sentence and not (tmp_path / "out").exists()


FILES = [
    (part, file)
    for part, own in ((START, ()), (POLICY, ()), (SFT, ()), (REWARD, ("head.safetensors", "head.json")))
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                 "tokenizer_config.json", "chat_template.jinja", *own)
    if (part, file) != (REWARD, "generation_config.json")
]  # fmt: skip


@pytest.mark.parametrize(("part", "file"), FILES)
def test_every_file_of_a_model_directory_is_checked(run, part, file):
    original = (run / part / file).read_bytes()
    for place in (0, 0.5, 0.999999):
        flip(run / part / file, place)
        with pytest.raises(Exception, match=f"{part} is not as it was written: {file} has changed since"):
            manifest.check_model(run / part)
        (run / part / file).write_bytes(original)
    manifest.check_model(run / part)
    (run / part / file).write_bytes(original[:-1])
    with pytest.raises(Exception, match=f"{file} has {len(original) - 1} bytes instead of {len(original)}"):
        manifest.check_model(run / part)
    (run / part / file).unlink()
    with pytest.raises(Exception, match=f"{file} is missing; restore it from a copy"):
        manifest.check_model(run / part)


def test_the_lists_of_a_run_name_all_of_its_model_files():
    for part in (START, POLICY, REWARD, SFT, f"baselines/sft/{START}", f"baselines/grpo/{POLICY}"):
        folder = small_run() / part
        listed = json.loads((folder / MODEL).read_text())["files"]
        assert {MODEL, *listed} == {file.name for file in folder.iterdir()} and "model.safetensors" in listed
        manifest.check_model(folder)


ADDED = {
    "code": "theirs.py",
    "code below": "custom_generate/generate.py",
    "a second shard": "model-00002-of-00002.safetensors",
    "an index of shards": "model.safetensors.index.json",
    "an adapter": "adapter_config.json",
    "an adapter's weights": "adapter_model.safetensors",
    "tokens": "added_tokens.json",
    "pickled weights": "pytorch_model.bin",
}


@pytest.mark.parametrize("what", ADDED)
@pytest.mark.parametrize("part", [START, REWARD])
def test_a_file_that_was_added_is_not_picked_up(run, tmp_path, capsys, part, what):
    file = run / part / ADDED[what]
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    sentence = refused(READ["score"][1](run, tmp_path), capsys)
    assert f"{run / part} is not as it was written: {ADDED[what]} was added to it" in sentence


def test_a_linked_directory_that_was_added_is_not_picked_up(run, tmp_path, capsys):
    """transformers reads the templates in it, and one of that name is every prompt's."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "default.jinja").write_text("{{ messages[0].content }}")
    (run / START / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    sentence = refused(READ["score"][1](run, tmp_path), capsys)
    assert f"{run / START} is not as it was written: additional_chat_templates was added to it" in sentence


@pytest.mark.parametrize(
    ("name", "add"),
    [
        ("sub/below", lambda path: path.symlink_to("/")),
        ("dangling.json", lambda path: path.symlink_to("nowhere")),
        ("more.safetensors", lambda path: path.symlink_to("model.safetensors")),
        ("pipe", os.mkfifo),
        ("additional_chat_templates/.jinja", Path.touch),
        ("sub/airl_manifest.json", Path.touch),
    ],
)
def test_whatever_is_added_is_named(run, name, add):
    (run / START / name).parent.mkdir(exist_ok=True)
    add(run / START / name)
    with pytest.raises(UserError, match=f"start is not as it was written: {name} was added to it"):
        manifest.check_model(run / START)


def test_odd_paths_have_no_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for path in (Path("/"), Path(), Path(".."), tmp_path / "gone", tmp_path / "loop"):
        manifest.check_model(path)


def test_what_nothing_reads_may_be_added(run, tmp_path):
    (run / START / "sub").mkdir()
    (run / START / ".cache").symlink_to(tmp_path)
    for name in ("README.md", ".gitattributes", ".DS_Store", "Thumbs.db", "sub/.DS_Store", "sub/Thumbs.db"):
        (run / START / name).write_text("mine")
    assert main([str(word) for word in READ["score"][1](run, tmp_path)]) == 0


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", f"{MODEL} cannot be used"), ("[]", f"{MODEL} cannot be used"), ("{}", f"{MODEL} cannot be used"),
        ('{"format": 2, "files": {}}', f"{MODEL} has format 2 instead of 1"),
        ('{"format": 1, "files": {}}', "chat_template.jinja was added to it"),
    ],
)  # fmt: skip
def test_a_damaged_list_is_damage_too(run, tmp_path, capsys, content, problem):
    (run / START / MODEL).write_text(content)
    assert problem in refused(READ["score"][1](run, tmp_path), capsys)


def test_a_run_of_an_older_version_loads_and_that_is_said_once(run, tmp_path, capsys, caplog):
    argv = [str(word) for word in READ["score"][1](run, tmp_path)]
    saved._say_unchecked.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert main(argv) == 0 and not caplog.records  # a new one has nothing to say
        expected = capsys.readouterr().out
        for part in (START, REWARD):
            (run / part / MODEL).unlink()
        saved._say_unchecked.cache_clear()
        assert main(argv) == 0 and main(argv) == 0
    (record,) = caplog.records
    assert f"{run}: no {MODEL} in start and final/discriminator" in record.getMessage()
    assert capsys.readouterr().out == 2 * expected


def test_an_export_is_the_users_to_change(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), "-o", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {f.name for f in (run / POLICY).iterdir()} - {MODEL}
    flip(out / "model.safetensors")
    (out / "notes.txt").write_text("mine")
    AutoModelForCausalLM.from_pretrained(out)
    assert main(["transfer", str(run), "--policy", str(out), "--prompts", "2", "--n", "2", "--json",
                 str(tmp_path / "t.json")]) == 0, capsys.readouterr().err  # fmt: skip
    assert main(["make-model", "tiny", *EASY, "warm_start.examples=500", "-o", str(tmp_path / "made")]) == 0
    assert not (tmp_path / "made" / MODEL).exists()
