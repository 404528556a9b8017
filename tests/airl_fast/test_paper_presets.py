"""The paper's pairings of models: their settings, and a dry run of each against the published model shapes.

Here the models are narrow but for one, to spare time and memory. AIRL_REAL_WIDTH=1 runs them all at their real widths
and vocabularies in bfloat16 with one layer (up to 5 GiB).
"""

import os
import re
from pathlib import Path

import pytest

from airl_fast.cli import main
from airl_fast.commands.settings import PRESETS
from airl_fast.config import Config
from airl_fast.models.load import load_language_model
from airl_fast.overrides import find_preset, load_config
from airl_fast.rollout import builtin
from airl_fast.rollout.engine import SamplingParams
from tests.airl_fast.model_cases import CPU
from tests.airl_fast.published_models import CONFIGS, published_tokenizer, write_model
from tests.airl_fast.run_cases import DATA

PAIRS = {
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 1e-5),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", 1e-5),
    "qwen2.5-7b-small-disc": ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", 1e-5),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", 1e-4),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.2-1B-Instruct", 1e-4),
}
TASKS = {"": "gsm8k", "-medreason": "medreason", "-mmlu-pro": "mmlu_pro"}
NAMES = [pair + suffix for pair in PAIRS for suffix in TASKS]
EVERY_WIDTH = bool(os.environ.get("AIRL_REAL_WIDTH"))
WIDE = set(PAIRS) if EVERY_WIDTH else {"qwen2.5-3b"}  # checked at its real width


def load(name: str) -> Config:
    source, origin = find_preset(name, PRESETS)
    return load_config(Config, source, [], origin=origin)


def split(name: str) -> tuple[str, str]:
    """(pairing, task) of a preset's name."""
    suffix = next(s for s in sorted(TASKS, key=len, reverse=True) if name.endswith(s))
    return name.removesuffix(suffix), TASKS[suffix]


def data_folder(task: str) -> Path:
    folder = DATA / task
    if not folder.is_dir():
        pytest.skip(f"no published data at {folder}; set AIRL_DATA to the folder with it")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_pairing_has_the_papers_values(name):
    pair, task = split(name)
    policy, discriminator, rate = PAIRS[pair]
    config = load(name)
    assert (config.algorithm, config.steps, config.data.task) == ("airl", 500, task)
    assert (config.model.path, config.discriminator.path) == (policy, discriminator)
    assert (config.rollout.prompts_per_step, config.rollout.samples_per_prompt) == (16, 16)
    assert (config.rollout.temperature, config.rollout.top_p, config.evaluate.top_p) == (1.0, 1.0, 0.95)
    assert (config.advantage.gamma, config.discriminator.head, config.reward.granularity) == (0.9, "linear", "dense")
    for lora in (config.model.lora, config.discriminator.lora):
        assert (lora.rank, lora.alpha) == (128, 32)
    for optim in (config.policy.optim, config.discriminator.optim):
        assert (optim.name, optim.learning_rate, optim.schedule) == ("paged_adamw_8bit", rate, "cosine")
        assert (optim.warmup_fraction, optim.betas, optim.weight_decay) == (0.1, (0.9, 0.99), 0.1)
        assert optim.max_grad_norm == 1.0


def test_every_preset_of_a_published_model_is_tested_here():
    assert {p.stem for p in PRESETS.glob("*.yaml") if load(p.stem).model.path is not None} == set(NAMES)


@pytest.mark.parametrize("name", PAIRS)
def test_without_a_model_the_preset_says_which_one_to_get(name, capsys):
    assert main(["train", name, "--dry-run", f"data.path={data_folder('gsm8k')}"]) == 2
    assert capsys.readouterr().err == (
        f"airl-fast: set model.path=DIR to a local copy of {PAIRS[name][0]}; nothing is downloaded.\n"
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """model(name, wide): a directory of that model, made when it is asked for and kept while the file runs."""
    root, made, tokenizer = tmp_path_factory.mktemp("published"), {}, published_tokenizer()

    def model(name: str, wide: bool) -> Path:
        key = f"{name.partition('/')[2]}-{'wide' if wide else 'narrow'}"
        if key not in made:
            if wide:  # at most two large models on the disk
                for other in [other for other in made if other.endswith("wide")][:-1]:
                    _delete(made.pop(other))
            made[key] = write_model(name, root / key, layers=1 if wide else 2, narrow=not wide, tokenizer=tokenizer)
        made[key] = made.pop(key)  # the one used last is at the end
        return made[key]

    return model


def _delete(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


@pytest.mark.parametrize(("name", "quantise"), [*((name, None) for name in NAMES), *((pair, "nf4") for pair in PAIRS)])
def test_a_pairing_dry_runs(name, quantise, models, capsys):
    pair, task = split(name)
    wide = pair in WIDE and task == "gsm8k"
    policy, discriminator, _ = PAIRS[pair]
    words = [f"model.path={models(policy, wide)}", f"discriminator.path={models(discriminator, wide)}"]
    words += [f"data.path={data_folder(task)}", "data.num_experts=40", "data.num_dev=8", "data.too_long=drop"]
    words += ["evaluate.prompts=16", "device=cpu"]
    if quantise is not None:
        words += ["model.quantise=nf4", "discriminator.quantise=nf4"]
    assert main(["train", name, "--dry-run", *words]) == 0
    said = capsys.readouterr().out
    assert said.endswith("dry run: configuration, data and models fit together; nothing was written.\n")
    over = "4-bit" if quantise else "bfloat16"
    trained = re.findall(
        r"adapters of ([\d.]+)M parameters over frozen (\S+) weights, 8-bit AdamW \(paged on a GPU only\)", said
    )
    assert [kind for _, kind in trained] == [over, over]
    if not wide:
        return
    roles = (("policy", policy), ("discriminator", discriminator))
    for (role, published), (adapters, _) in zip(roles, trained, strict=True):
        size = float(re.search(rf"^{role} +\S+ of ([\d.]+)M", said, re.MULTILINE)[1])
        config, shape = CONFIGS[published], _parameters(CONFIGS[published])
        outside = config.vocab_size * config.hidden_size
        outside *= 2 if role == "policy" and not config.tie_word_embeddings else 1
        assert float(adapters) == pytest.approx(shape["adapters"] / 1e6, abs=0.01)
        assert size == pytest.approx((outside + shape["layer"] + shape["adapters"]) / 1e6, rel=1e-4)


def _parameters(config) -> dict[str, int]:
    """Of one layer, from its published shape: its own, and those of adapters of rank 128 on its linear layers."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    hidden, middle = config.hidden_size, config.intermediate_size
    linear = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    linear += [(hidden, middle), (hidden, middle), (middle, hidden)]
    return {"layer": sum(a * b for a, b in linear), "adapters": sum(128 * (a + b) for a, b in linear)}


def test_ids_that_pad_the_vocabulary_are_never_sampled(models):
    """Qwen2.5 has 151 936 or 152 064 rows for 151 665 tokens; here the stand-in tokenizer leaves nearly all unused."""
    folder = models("Qwen/Qwen2.5-7B-Instruct", False)
    config = Config(model={"path": str(folder), "dtype": "float32"}).model
    lm = load_language_model(config, CPU)
    assert lm.head.weight.shape[0] == 152064 and lm.num_tokens == len(lm.tokenizer) == 270
    assert lm.head_weight.shape == (270, 224) and lm.head_weight.data_ptr() == lm.head.weight.data_ptr()
    params = SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=20, end_token=-1, seed=0, batch_size=8)
    for sample in builtin.sample(lm, [[5, 6, 7]], 4, params)[0]:
        assert max(sample.tokens) < 270
        assert len(sample.tokens) == 20
        assert sum(sample.logprobs) / 20 > -6.5  # of 270 ids; over all rows a token has about -12
