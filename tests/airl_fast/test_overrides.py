"""Configuration loading: values, and one sentence per mistake."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from airl_fast.errors import UserError
from airl_fast.overrides import dotted_keys, dump_yaml, find_preset, load_config, parse_yaml, plain


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class Adam(Section):
    name: Literal["adam"] = "adam"
    lr: float = Field(1e-4, gt=0, le=1)


class Sgd(Section):
    name: Literal["sgd"]
    momentum: float = Field(0.9, ge=0, lt=1)


class Head(Section):
    head: Literal["linear", "action", "logprob"] = "linear"
    smoothing: float = Field(0.1, ge=0, lt=0.5)
    layers: tuple[int, ...] = (1, 2)
    clip: float | None = None
    pair: tuple[float, float] = (0.0, 1.0)


class Config(Section):
    seed: int = Field(0, ge=0)
    run: str = "x"
    path: Path | None = None
    fast: bool = False
    tau: float = float("inf")
    discriminator: Head = Head()
    optimizer: Annotated[Adam | Sgd, Field(discriminator="name")] = Adam()
    weights: dict[str, float] = {}
    options: dict[str, int | float | bool | None] = {}
    even: int = 0
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd; give an even number.")
        return value

    @model_validator(mode="after")
    def _check(self) -> "Config":
        if self.seed == 13:
            raise ValueError("seed 13 is not allowed with this head; choose another seed")
        return self


def load(*overrides: str, source: dict | None = None) -> Config:
    return load_config(Config, source or {}, list(overrides), origin="base.yaml")


def message(*overrides: str, source: dict | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides, source=source)
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


def test_override_values_are_typed() -> None:
    config = load(
        "optimizer.name=adam",
        "optimizer.lr=1e-4",
        "discriminator.layers=[3,4]",
        "discriminator.clip=5",
        "fast=true",
        "path=some/dir",
        "run=7",
        "weights.step=.5",
        source={"seed": 3, "discriminator": {"head": "action"}},
    )
    assert config.optimizer.lr == 1e-4
    assert config.discriminator == Head(head="action", layers=(3, 4), clip=5.0)
    assert (config.seed, config.fast, config.path, config.run) == (3, True, Path("some/dir"), "7")
    assert config.weights == {"step": 0.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-1E+3", -1000.0), ("2.5e6", 2.5e6), (".5e1", 5.0), ("1", 1), ("1.5", 1.5), ("e4", "e4")],
)
def test_scientific_notation(text: str, value: object) -> None:
    parsed = parse_yaml(text, origin="t")
    assert parsed == value and type(parsed) is type(value)


def test_later_override_wins_and_source_is_untouched() -> None:
    source = {"discriminator": {"head": "action"}}
    assert load("seed=1", "discriminator.clip=2", "seed=2", source=source).seed == 2
    assert source == {"discriminator": {"head": "action"}}


def test_null_clears_and_empty_value_is_text() -> None:
    assert load("discriminator.clip=null", source={"discriminator": {"clip": 3.0}}).discriminator.clip is None
    assert load("run=").run == ""


def test_value_with_equals_sign() -> None:
    assert load("run=a=b").run == "a=b"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("discriminator.heed=linear", "unknown key 'discriminator.heed'; did you mean 'discriminator.head'?"),
        ("smoothing=0.1", "unknown key 'smoothing'; did you mean 'discriminator.smoothing'?"),
        ("sead=1", "unknown key 'sead'; did you mean 'seed'?"),
        ("discriminator.seed=1", "unknown key 'discriminator.seed'; did you mean 'seed'?"),
        ("discriminater.clip=1", "unknown key 'discriminater'; did you mean 'discriminator'?"),
        ("zzz=1", "unknown key 'zzz'; the keys of the configuration are: seed, run, path, fast,"),
        ("discriminator.q=1", "unknown key 'discriminator.q'; the keys of 'discriminator' are: head, smoothing,"),
        ("discriminator.pair=[1.0]", "'discriminator.pair' needs more than 1 item."),
        ("discriminator.smoothing=0.7", ("'discriminator.smoothing' is 0.7, which is out of range; it must be"
         " at least 0 and less than 0.5.")),
        ("optimizer.lr=0", "'optimizer.lr' is 0, which is out of range; it must be greater than 0"),
        ("discriminator.smoothing=.nan", "is nan, which is out of range; it must be at least 0 and less than 0.5."),
        ("temperature=.inf", "'temperature' is inf, which is out of range; it must be finite and greater than 0."),
        ("seed=-1", "'seed' is -1, which is out of range; it must be at least 0."),
        ("seed=many", "'seed' must be a whole number, not 'many'."),
        ("seed=1.5", "'seed' must be a whole number, not 1.5."),
        ("seed.x=1", "'seed' must be a whole number, not {'x': 1}."),
        ("seed=true", "'seed' must be a whole number, not true or false."),
        ("discriminator.clip=yes", "'discriminator.clip' must be a number, not true or false."),
        ("fast=maybe", "'fast' must be true or false, not 'maybe'."),
        ("optimizer.lr=big", "'optimizer.lr' must be a number, not 'big'."),
        ("discriminator.layers=3", "'discriminator.layers' must be a list, as in [1, 2], not 3."),
        ("discriminator.head=lineal", ("'discriminator.head' is 'lineal'; did you mean 'linear'? It must be 'linear',"
         " 'action' or 'logprob'.")),
        ("discriminator.head=9", "'discriminator.head' is 9, but it must be 'linear', 'action' or 'logprob'."),
        ("discriminator=5", "'discriminator' is a section of keys, not the single value 5"),
        ("seed=13", "seed 13 is not allowed with this head; choose another seed."),
        ("run=[1", "this is not valid YAML"),
    ],
)  # fmt: skip
def test_one_sentence_per_mistake_on_the_command_line(override: str, expected: str) -> None:
    text = message(*(["optimizer.name=adam"] if override.startswith("optimizer") else []), override)
    assert expected in text
    if override != "seed=13":  # a check across keys cannot say which word is at fault
        assert text.startswith(f"command line, '{override}'")


@pytest.mark.parametrize("word", ["seed", "=1", "a..b=1", ".a=1", "--resume"])
def test_malformed_override(word: str) -> None:
    assert "an override is written key=value" in message(word)


def test_mistake_in_the_file_names_the_file() -> None:
    assert message(source={"sead": 1}) == "base.yaml: unknown key 'sead'; did you mean 'seed'?"
    assert message("fast=true", source={"seed": -1}).startswith("base.yaml: 'seed' is -1")


def test_several_mistakes_give_the_first_and_a_count() -> None:
    text = message(source={"seed": -1, "discriminator": {"heed": 1, "smoothing": 9}})
    assert text.startswith("base.yaml: unknown key 'discriminator.heed'")
    assert text.endswith("(and 2 more problems).")


def test_a_value_that_fits_no_member_of_a_union_is_one_mistake() -> None:
    text = message("options.a=[1]", "options.b=true")
    assert text == "command line, 'options.a=[1]': 'options.a' must be a whole number, not [1]."
    assert load("options.b=true", "options.c=3").options == {"b": True, "c": 3}


def test_checks_of_the_model_speak_for_themselves() -> None:
    assert message(source={"seed": 13}) == "base.yaml: seed 13 is not allowed with this head; choose another seed."
    assert message("even=3") == "command line, 'even=3': 'even': 3 is odd; give an even number."


def test_union_tags_do_not_appear_in_the_key() -> None:
    text = message(source={"optimizer": {"name": "sgd", "momentum": 2}})
    assert "'optimizer.momentum' is 2" in text and "less than 1" in text


def test_choice_of_a_variant() -> None:
    assert "'optimizer.name' is required" in message("optimizer.lr=1")
    text = message("optimizer.name=adem")
    assert "'optimizer.name' is 'adem'; did you mean 'adam'? It must be 'adam', 'sgd'." in text


def test_override_below_a_scalar_of_the_file() -> None:
    assert "'seed' is a single value (4) and has no key 'x'" in message("seed.x=1", source={"seed": 4})


def test_missing_key() -> None:
    class Needs(Section):
        model_dir: str

    with pytest.raises(UserError, match="a.yaml: 'model_dir' is required; add it."):
        load_config(Needs, {}, [], origin="a.yaml")


def test_dotted_keys_cover_sections_and_variants() -> None:
    keys = dotted_keys(Config)
    assert {"seed", "discriminator", "discriminator.clip", "optimizer.lr", "optimizer.momentum"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_dump_round_trips_exactly() -> None:
    config = load(
        "optimizer.name=adam",
        "optimizer.lr=3.3333333333333335e-05",
        "path=a/b",
        "discriminator.layers=[]",
        "weights.a=0.1",
    )
    text = dump_yaml(config)
    again = load_config(Config, parse_yaml(text, origin="dump"), [], origin="dump")
    assert again == config and again.tau == float("inf")
    assert text.splitlines()[0] == "seed: 0"
    assert plain(config)["path"] == "a/b"


# ------------------------------------------------------------------------------------------------- presets


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text("seed: 1\ndiscriminator: {head: action, clip: 2.0, layers: [1]}\n")
    (tmp_path / "tiny-sft.yaml").write_text("extends: tiny\ndiscriminator: {clip: null, layers: [5, 6]}\n")
    (tmp_path / "tiny-sft-2.yaml").write_text("extends: tiny-sft\nseed: 9\n")
    return tmp_path


def test_extends_merges_sections_and_replaces_lists(presets: Path) -> None:
    tree, origin = find_preset("tiny-sft-2", presets)
    assert tree == {"seed": 9, "discriminator": {"head": "action", "clip": None, "layers": [5, 6]}}
    assert origin.endswith("tiny-sft-2.yaml (extends tiny-sft, tiny)")


def test_a_path_may_extend_a_preset_or_a_neighbour(presets: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("mine")
    (other / "a.yaml").write_text("extends: tiny\nseed: 4\n")
    (other / "b.yaml").write_text("extends: ./a.yaml\nrun: b\n")
    tree, _ = find_preset(str(other / "b.yaml"), presets)
    assert tree == {"seed": 4, "run": "b", "discriminator": {"head": "action", "clip": 2.0, "layers": [1]}}


def test_unknown_preset_lists_and_suggests(presets: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_preset("tinny", presets)
    assert str(caught.value) == (
        "There is no preset 'tinny'; did you mean 'tiny'? The presets are: tiny, tiny-sft, tiny-sft-2."
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nrun: [1\n", "line 3: this is not valid YAML"),
        ("seed: 1\nseed: 2\n", "line 2: this is not valid YAML (the key 'seed' repeats)"),
        ("seed: !!python/object/apply:os.getcwd []\n", "line 1: this is not valid YAML"),
        ("- 1\n", "must hold `key: value` lines at the top, not a list"),
        ("extends: [a]\n", "'extends' must be the name of one preset"),
        ("extends: bad\n", "leads back to a file that extends this one"),
        ("extends: tiny-sfd\n", "did you mean 'tiny-sft'?"),
    ],
)
def test_malformed_files(presets: Path, text: str, expected: str) -> None:
    (presets / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        find_preset("bad", presets)
    assert expected in str(caught.value)


def test_missing_and_binary_files(presets: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        find_preset("nowhere/x.yaml", presets)
    (presets / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        find_preset("binary", presets)


def test_empty_file_is_all_defaults(presets: Path) -> None:
    (presets / "empty.yaml").write_text("")
    assert find_preset("empty", presets)[0] == {}
