"""The class that a directory names for its tokenizer may be any of transformers; only a tokenizer's is followed."""

import json
import shutil
from pathlib import Path

import pytest
import transformers.dynamic_module_utils

from airl_fast.artifacts import START
from airl_fast.errors import UserError
from airl_fast.models import load
from airl_fast.models.load import load_tokenizer
from tests.airl_fast.run_cases import small_run


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CLASSES = {
    "several": {"tokenizer_config.json": {"tokenizer_class": "RagTokenizer"}},
    "several, by another name": {"tokenizer_config.json": {"tokenizer_class": "RagTokenizerFastFast"}},
    "a model": {"tokenizer_config.json": {"tokenizer_class": "AutoModelForCausalLM"}},
    "a config": {"tokenizer_config.json": {"tokenizer_class": "LlamaConfig"}},
    "a function": {"tokenizer_config.json": {"tokenizer_class": "pipeline"}},
    "of config.json": {"config.json": {"tokenizer_class": "AutoModel"}},
    "of its type": {"config.json": {"model_type": "rag"}},
    "of a type inside": {"config.json": {"model_type": "encoder-decoder", "encoder": {"model_type": "rag"}}},
}


def never_ask(*_: object) -> str:
    raise AssertionError("asked on the terminal")


@pytest.mark.parametrize("name", CLASSES)
def test_a_tokenizer_is_loaded_by_no_class_but_a_tokenizer_s(tmp_path, monkeypatch, name):
    """RagTokenizer forgets trust_remote_code=False, a model's class reads pickled weights."""
    monkeypatch.setattr("builtins.input", never_ask)
    monkeypatch.setattr("torch.load", never_ask)
    folder = tmp_path / "mine"
    shutil.copytree(small_run() / START, folder)
    ((file, values),) = CLASSES[name].items()
    change(folder / file, **values)
    with pytest.raises(
        UserError, match=rf"^model.path: {folder / file} asks for \w+ as its tokenizer's class"
    ) as caught:
        load_tokenizer(folder, "model.path")
    assert "\n" not in str(caught.value)


def test_transformers_asks_nothing_on_a_terminal(tmp_path, monkeypatch):
    """What would make it ask is refused before; should there be another way, it ends in our sentence."""
    monkeypatch.setattr("builtins.input", never_ask)
    monkeypatch.setattr(load, "_check_tokenizer_class", lambda *_: None)
    folder, mark = tmp_path / "mine", tmp_path / "ran"
    shutil.copytree(small_run() / START, folder)
    part = folder / "question_encoder_tokenizer"
    part.mkdir()
    shutil.copy(folder / "tokenizer.json", part)
    (part / "theirs.py").write_text(f"open({str(mark)!r}, 'w')")
    (part / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["theirs.T", "theirs.T"]}}))
    parts = {"question_encoder": {"model_type": "vit"}, "generator": {"model_type": "vit"}}
    change(folder / "config.json", model_type="rag", **parts)
    change(folder / "tokenizer_config.json", tokenizer_class="RagTokenizer")
    patience = transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with pytest.raises(UserError, match="--trust-remote-code"):
        load_tokenizer(folder, "model.path")
    assert not mark.exists() and patience == transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE


def test_what_is_no_fast_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", lambda *_, **__: object())
    with pytest.raises(UserError, match="is not a fast tokenizer"):
        load_tokenizer(small_run() / START, "model.path")
