"""Adapters, and the weights of the user's under them, whose list is the run's: what changed or was added is named."""

import functools
import shutil
from pathlib import Path

import pytest
import torch

from airl_fast import manifest
from airl_fast.artifacts import POLICY, REWARD, START, keep_reader, load_policy
from airl_fast.cli import main
from airl_fast.errors import UserError
from airl_fast.evaluate.command import open_run
from airl_fast.manifest import MODEL
from tests.airl_fast.adapter_cases import LORA, configuration, model_directory, over
from tests.airl_fast.run_cases import train
from tests.airl_fast.test_manifest import READ, flip, refused


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


@pytest.mark.parametrize("key", ["model.path", "discriminator.path"])
def test_training_on_a_link_to_changed_weights_is_refused(adapted, tmp_path, capsys, key):
    """The list lies beside the link; the directory that it leads to knows nothing of it."""
    (tmp_path / "alias").symlink_to("run/start")
    flip(base() / "model.safetensors")
    try:
        for link in (adapted / START, tmp_path / "alias"):
            words = over(model_directory(), *LORA, f"{key}={link}", f"output_dir={tmp_path}")
            sentence = refused(["train", "tiny", *words, "--run-name", "new"], capsys)
            assert f"{link} is not as it was written: model.safetensors has changed since it was written" in sentence
            assert f"delete {adapted / START}.{MODEL}." in sentence and not (tmp_path / "new").exists()
    finally:
        flip(base() / "model.safetensors")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_run_without_its_start_never_goes_on_with_other_weights(adapted, tmp_path, capsys, checkpoint):
    listed = adapted / f"{START}.{MODEL}"
    words, before = (
        over(base(), *LORA, "steps=1", "evaluate.final=false", f"output_dir={tmp_path}"),
        listed.read_bytes(),
    )
    resume = ["train", "tiny", *words, "--run-name", "run", "--resume", "auto"]
    (adapted / START).unlink()
    if not checkpoint:  # stopped before the first one
        shutil.rmtree(adapted / "checkpoints")
    flip(base() / "model.safetensors")
    try:
        sentence = refused(resume, capsys)
    finally:
        flip(base() / "model.safetensors")
    assert listed.read_bytes() == before and not (adapted / START).exists()
    if checkpoint:
        assert f"{adapted / START} is gone or leads nowhere, and the checkpoints of this run go on from it" in sentence
        (adapted / START).symlink_to(tmp_path / "nowhere")
        assert refused(resume, capsys) == sentence
    else:
        assert f"{base()} is not as it was written: model.safetensors has changed since it was written" in sentence
        train(*words, "--run-name", "run", "--resume", "auto")
        assert (adapted / START).is_symlink() and listed.read_bytes() == before


def test_the_list_of_a_discriminators_weights_is_not_written_again(tmp_path):
    shutil.copytree(model_directory(), tmp_path / "reader")
    config = configuration(model_directory(), *LORA, f"discriminator.path={tmp_path / 'reader'}")
    listed = tmp_path / "discriminator.airl_manifest.json"
    keep_reader(config, tmp_path, continued=True)  # whose list somebody deleted
    assert not listed.exists()
    keep_reader(config, tmp_path, continued=False)
    before = listed.read_bytes()
    flip(tmp_path / "reader" / "model.safetensors")
    for continued in (True, False):
        with pytest.raises(UserError, match="reader is not as it was written: model.safetensors has changed"):
            keep_reader(config, tmp_path, continued=continued)
    assert listed.read_bytes() == before


READ_OF_THE_USERS = (
    "chat_template.jinja", "additional_chat_templates/default.jinja", "generation_config.json", "added_tokens.json",
    "special_tokens_map.json", "adapter_config.json", "adapter_model.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "config.5.0.json", "tokenizer.model", "vocab.json", "merges.txt",
    "custom_generate/generate.py",
)  # fmt: skip
OTHERS_OF_THE_USERS = (
    "trainer_state.json", "training_config.json", "notes.txt", "train.py", "consolidated.pth", "pytorch_model.bin",
    "._model.safetensors", "checkpoint-5/model.safetensors", "additional_chat_templates/notes.txt",
)  # fmt: skip


@pytest.fixture
def linked(tmp_path) -> Path:
    """A link to a small directory of the user's, whose weights are a link again, with its list."""
    own = tmp_path / "own"
    for folder in (own / "additional_chat_templates", own / "custom_generate", own / "checkpoint-5"):
        folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "modeling_own.py", "custom_generate/old.py"):
        (own / name).write_text(name)
    (tmp_path / "blob").write_text("weights")
    (own / "model.safetensors").symlink_to(tmp_path / "blob")
    (own / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (tmp_path / "start").symlink_to(own)
    manifest.keep_list(manifest.beside(tmp_path / "start"), own)
    return tmp_path / "start"


@pytest.mark.parametrize("name", READ_OF_THE_USERS)
def test_what_is_read_of_the_users_directory_may_not_be_added(linked, name):
    manifest.check_model(linked)
    (linked / name).write_text("{}")
    with pytest.raises(UserError, match=f"start is not as it was written: {name} was added to it; restore it"):
        manifest.check_model(linked)


def test_a_linked_folder_of_templates_may_not_be_added_either(linked, tmp_path):
    shutil.rmtree(linked / "additional_chat_templates")
    (linked / "additional_chat_templates").symlink_to(tmp_path)
    (tmp_path / "tool.jinja").write_text("tool")
    manifest.check_model(linked)
    (tmp_path / "default.jinja").write_text("{{ messages }}")
    with pytest.raises(UserError, match=r"additional_chat_templates/default\.jinja was added to it"):
        manifest.check_model(linked)


@pytest.mark.parametrize(
    "name", ["config.json", "modeling_own.py", "custom_generate/old.py", "additional_chat_templates/tool.jinja",
             "model.safetensors"]
)  # fmt: skip
def test_every_file_that_is_read_of_the_users_is_listed(linked, name):
    flip(linked / name)
    with pytest.raises(UserError, match=f"start is not as it was written: {name} has changed since"):
        manifest.check_model(linked)


def test_other_files_of_the_users_come_and_go(linked):
    for name in OTHERS_OF_THE_USERS:
        (linked / name).write_text("{}")
    manifest.check_model(linked)
    own = manifest.beside(linked)
    own.unlink()
    (linked / "train.py").unlink()  # those of Python are listed, as any of them may be imported
    manifest.keep_list(own, linked.resolve())
    for name in set(OTHERS_OF_THE_USERS) - {"train.py"}:
        (linked / name).unlink()
    manifest.check_model(linked)


def test_a_template_added_to_the_users_directory_stops_the_run(adapted, tmp_path, capsys):
    file = base() / "additional_chat_templates" / "default.jinja"
    file.parent.mkdir()
    file.write_text("{{ messages[0].content }}")
    try:
        sentence = refused(READ["score"][1](adapted, tmp_path), capsys)
    finally:
        shutil.rmtree(file.parent)
    assert f"{adapted / START} is not as it was written: additional_chat_templates/default.jinja was added" in sentence


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
