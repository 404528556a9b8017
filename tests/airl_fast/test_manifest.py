"""Weights, configurations and tokenizers that changed on the disk since a run wrote them are named, never used."""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from airl_fast import manifest, saved
from airl_fast.artifacts import POLICY, REWARD, START, load_policy
from airl_fast.cli import main
from airl_fast.evaluate.command import open_run
from airl_fast.manifest import MODEL
from tests.airl_fast.adapter_cases import LORA, model_directory, over
from tests.airl_fast.run_cases import EASY, SMALL, small_run, train

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


def test_odd_paths_have_no_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("/"), Path(), Path(".."), tmp_path / "gone"):
        manifest.check_model(path)


def test_what_nothing_reads_may_be_added(run, tmp_path):
    for name in ("README.md", ".gitattributes", ".DS_Store", "Thumbs.db"):
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


# ---- adapters, and the weights of the user's under them ----


@functools.cache
def base() -> Path:
    """A user's model directory that the run below links to: a copy, because tests change it."""
    folder = model_directory().with_name("linked")
    shutil.copytree(model_directory(), folder)
    return folder


@functools.cache
def adapted_run() -> Path:
    root = base().parent
    train(*over(base(), *LORA, "steps=1", "evaluate.final=false", f"output_dir={root}"), "--run-name", "adapted")
    return root / "adapted"


@pytest.fixture
def adapted(tmp_path) -> Path:
    shutil.copytree(adapted_run(), tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns(".lock"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("part", "file", "command"),
    [
        (REWARD, "adapter_model.safetensors", "score"), (REWARD, "adapter_config.json", "score"),
        (REWARD, "head.safetensors", "score"), (REWARD, "tokenizer.json", "score"),
        (POLICY, "adapter_model.safetensors", "export"), (POLICY, "adapter_config.json", "generate by the policy"),
        (REWARD, "adapter_model.safetensors", "export the reward"),
    ],
)  # fmt: skip
def test_a_flipped_bit_in_an_adapter_is_named(adapted, tmp_path, capsys, part, file, command):
    flip(adapted / part / file)
    sentence = refused(READ[command][1](adapted, tmp_path), capsys)
    assert f"{part} is not as it was written: {file} has changed since it was written" in sentence
    (adapted / part / file).unlink()
    assert f"{file} is missing" in refused(READ[command][1](adapted, tmp_path), capsys)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_linked_weights_under_the_adapters_are_checked_too(adapted, tmp_path, capsys, file):
    """They are the user's, so their list is the run's; what else lies there is nobody's business."""
    assert (adapted / START).is_symlink() and not (base() / MODEL).exists()
    listed = adapted / f"{START}.{MODEL}"
    state = open_run(adapted).start.model.state_dict()
    expected = {name: tensor.clone() for name, tensor in state.items()}  # those are mapped from the file
    (base() / "consolidated.pth").write_text("of another library")
    original = (base() / file).read_bytes()
    flip(base() / file)
    try:
        sentence = refused(READ["score"][1](adapted, tmp_path), capsys)
        assert f"{adapted / START} is not as it was written: {file} has changed since it was written" in sentence
        assert f"delete {listed}." in sentence
        if file == "model.safetensors":
            listed.unlink()  # the change is the user's own
            found = open_run(adapted).start.model.state_dict()
            assert sum(not torch.equal(found[name], expected[name]) for name in expected) == 1
    finally:
        (base() / file).write_bytes(original)


@pytest.mark.parametrize("name", ["export", "export the reward", "transfer of another run"])
def test_the_linked_weights_are_checked_where_only_an_adapter_is_read(adapted, tmp_path, capsys, name):
    original = (base() / "model.safetensors").read_bytes()
    flip(base() / "model.safetensors")
    try:
        sentence = refused(READ[name][1](adapted, tmp_path), capsys)
        assert f"{START} is not as it was written: model.safetensors has changed since it was written" in sentence
    finally:
        (base() / "model.safetensors").write_bytes(original)
    assert main([str(word) for word in READ["export"][1](adapted, tmp_path)]) == 0


def test_a_copy_in_place_of_the_link_is_checked_by_the_same_list(adapted):
    config = open_run(adapted).config.model
    (adapted / START).unlink()
    shutil.copytree(base(), adapted / START)
    load_policy(adapted / START, config, torch.device("cpu"))
    flip(adapted / START / "model.safetensors")
    with pytest.raises(Exception, match="start is not as it was written: model.safetensors has changed"):
        load_policy(adapted / START, config, torch.device("cpu"))


def test_the_users_weights_under_a_discriminator_are_checked(tmp_path, capsys):
    """They are another directory than the policy's, which no other list has; without adapters final/ holds them all."""
    reader = tmp_path / "reader"
    shutil.copytree(model_directory(), reader)
    words = over(model_directory(), *LORA, "steps=1", "checkpoint_every=1", "evaluate.final=false",
                 f"discriminator.path={reader}", f"output_dir={tmp_path}")  # fmt: skip
    train(*words, "--run-name", "run")
    run, resume = tmp_path / "run", ["train", "tiny", *words, "--run-name", "run", "--resume", "auto"]
    commands = [READ["score"][1](run, tmp_path), READ["export the reward"][1](run, tmp_path), resume]
    flip(reader / "model.safetensors")
    for command in commands:
        sentence = refused(command, capsys)
        assert f"{reader} is not as it was written: model.safetensors has changed since it was written" in sentence
        assert sentence.endswith(f"delete {run / 'discriminator.airl_manifest.json'}.")
    flip(reader / "model.safetensors")
    assert main([str(word) for word in commands[0]]) == 0
