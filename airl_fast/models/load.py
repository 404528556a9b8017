"""Load a local Hugging Face model directory, and say in one sentence what is wrong with one that does not load."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    dynamic_module_utils,
)
from transformers.models.auto import tokenization_auto
from transformers.utils.import_utils import DummyObject

from airl_fast.errors import UserError
from airl_fast.manifest import check_model
from airl_fast.models.adapters import is_adapter_directory, keep_layout, nf4
from airl_fast.models.attention import set_packed
from airl_fast.models.ends import listed_ends
from airl_fast.models.regimes import Regimes, forget_lengths, regimes_of
from airl_fast.trust import HOW_TO_TRUST

if TYPE_CHECKING:  # its package is not on every machine that only runs models
    from airl_fast.config import ModelConfig

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*/[\w.-]+")  # Qwen/Qwen2.5-3B-Instruct


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A causal LM, its tokenizer and the facts of its output head that the log-probability ops need.

    model: always the plain model of transformers. Adapters and 4-bit weights are layers inside it, so every forward
    of it is the adapted one, and `name_or_path` is the directory its frozen weights came from.
    num_tokens: ids from here up are padding of the embedding (Qwen2.5 has 271 or 399 of them): no text has them.
    fp32_logits: keep the logits behind a log-probability in float32, whatever the model's type.
    """

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    softcap: float | None
    logit_scale: float
    max_length: int
    num_tokens: int
    fp32_logits: bool = False

    @property
    def backbone(self) -> torch.nn.Module:
        """The model without its output layer: token ids to last hidden states, adapters included."""
        return self.model.base_model

    @property
    def head(self) -> torch.nn.Module:
        return self.model.get_output_embeddings()

    @property
    def head_weight(self) -> torch.Tensor:
        """[num_tokens, H]: the rows of the output layer that can be sampled, a view, for counting. The backward pass
        of a slice fills and copies a whole [V, H]: ops take `projection`."""
        return self.head.weight[: self.num_tokens]

    @property
    def projection(self) -> dict[str, object]:
        """The output layer as the ops of airl_kernels take it, by keyword."""
        return {
            "weight": self.head.weight,
            "bias": getattr(self.head, "bias", None),
            "num_tokens": self.num_tokens,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "fp32_logits": self.fp32_logits,
        }

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that the model lists as ends of what it writes; its chat template may write another."""
        return listed_ends(self.model, self.num_tokens)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def regimes(self) -> Regimes:
        """Which lengths it reads with which rotary factors."""
        return regimes_of(self.model)


def check_directory(path: str, key: str) -> Path:
    """Refuse a directory that transformers could only meet with a traceback, and one of ours that has changed since.

    key: names the setting at fault.
    """
    given = Path(path).expanduser()
    check_model(given)  # a run's link to a directory knows more of it than the directory does
    folder = given.resolve()  # absolute: saved adapters record it
    if not folder.is_dir():
        if _HUB_NAME.fullmatch(path) and key.endswith(".path"):
            raise UserError(f"set {key}=DIR to a local copy of {path}; nothing is downloaded.")
        raise UserError(f"{key}: no model directory at {path}; give a local Hugging Face directory.")
    if is_adapter_directory(folder):  # beside a model, transformers would add it without a word
        what = "beside its model" if (folder / "config.json").is_file() else "not a model"
        raise UserError(
            f"{key}: {path} holds a PEFT adapter, {what}; give its base model, or merge the two with "
            "`airl-fast export RUN --format merged`."
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: {path} has no config.json; give the directory that `save_pretrained` wrote.")
    if not any(folder.glob("*.safetensors")):
        hint = " (pickled *.bin weights are not read; convert them)" if any(folder.glob("*.bin")) else ""
        raise UserError(f"{key}: {path} has no *.safetensors weights{hint}; save the model as safetensors.")
    for index in sorted(folder.rglob("*.index.json")):  # config.json may name any of them
        _check_shards(index, key)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{key}: {path} has no tokenizer.json; save the model's fast tokenizer beside its weights.")
    return folder


def _check_shards(index: Path, key: str) -> None:
    """An index of shards may name any file, a pickle among them, and transformers would read it."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # there is none, or transformers says what is wrong with it
    for shard in shards:
        if not (isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard):
            raise UserError(
                f"{key}: {index} names {shard!r}, which is no *.safetensors file beside it; save the model again."
            )


def load_tokenizer(folder: Path, key: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    try:
        _check_tokenizer_class(folder, key)
        with _no_questions():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever its file formats raise
        _refuse_code(error, folder, key)
        raise UserError(
            f"{key}: the tokenizer in {folder} does not load ({_first_line(error)}); save it again."
        ) from error
    if not (isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.is_fast):
        raise UserError(f"{key}: the tokenizer in {folder} is not a fast tokenizer; save its tokenizer.json.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_tokenizer_class(folder: Path, key: str) -> None:
    """A directory may name any class of transformers as its tokenizer's, and AutoTokenizer would load by it: one that
    holds several tokenizers forgets whether code is trusted, and a model's reads pickled weights."""
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config, _ = PreTrainedConfig.get_config_dict(folder, local_files_only=True)
    asked = [(file, settings.get("tokenizer_class")), (folder / "config.json", config.get("tokenizer_class"))]
    types = (tokenization_auto.TOKENIZER_MAPPING_NAMES.get(name) for name in _model_types(config))
    asked += [(folder / "config.json", name) for name in types]
    for source, name in asked:
        for each in (name, name.removesuffix("Fast"), f"{name}Fast") if isinstance(name, str) else ():
            found = tokenization_auto.tokenizer_class_from_name(each)
            stands_in = isinstance(found, DummyObject)  # for a tokenizer whose package is not here, and says so itself
            if found is None or stands_in or (isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)):
                continue
            raise UserError(
                f"{key}: {source} asks for {name[:60]} as its tokenizer's class, which is none of a single tokenizer; "
                "save the tokenizer again, or set tokenizer_class to PreTrainedTokenizerFast there."
            )


def _model_types(config: object) -> Iterator[str]:
    """Of a configuration and those inside it, each of which may bring its tokenizer's class."""
    if isinstance(config, dict):
        if isinstance(config.get("model_type"), str):
            yield config["model_type"]
        for value in config.values():
            yield from _model_types(value)


@contextmanager
def _no_questions() -> Iterator[None]:
    """Where transformers was not told whether code is trusted, it asks on the terminal; without time for an answer it
    raises what `_refuse_code` knows. It is told, but some of its classes do not hand that on."""
    before, dynamic_module_utils.TIME_OUT_REMOTE_CODE = dynamic_module_utils.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before


def load_model(
    folder: Path,
    key: str,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool = False,
    auto: type = AutoModelForCausalLM,
    quantise: str | None = None,
    device: torch.device | None = None,
) -> torch.nn.Module:
    """auto: AutoModelForCausalLM, or AutoModel for a backbone alone. quantise: "nf4", which needs the device because
    the weights are quantised there, one after the other."""
    quantised = {}
    if quantise is not None:
        quantised = {"quantization_config": nf4(dtype, f"quantise={quantise}"), "device_map": {"": device or "cpu"}}
    try:
        with _no_questions():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
            model, info = auto.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                dtype=dtype,
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **quantised,
            )
    except Exception as error:  # as above: a damaged file raises a dozen types
        _refuse_code(error, folder, key)
        raise UserError(f"{key}: the model in {folder} does not load ({_first_line(error)}); save it again.") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise UserError(f"{key}: the weights in {folder} lack {missing}; save the whole model again.")
    set_packed(model)
    forget_lengths(model)
    keep_layout(model)
    return model if device is None else model.to(device)


def load_language_model(config: "ModelConfig", device: torch.device, *, key: str = "model.path") -> LanguageModel:
    folder = check_directory(config.path, key)
    tokenizer = load_tokenizer(folder, key, trust_remote_code=config.trust_remote_code)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if tokenizer.chat_template is None:
        raise UserError(f"{key}: the tokenizer in {folder} has no chat template; set model.chat_template.")
    model = load_model(
        folder,
        key,
        getattr(torch, config.dtype),
        trust_remote_code=config.trust_remote_code,
        quantise=config.quantise,
        device=device,
    )
    lm = wrap(model, tokenizer, config.attention, config.fp32_logits)
    _check_logits(lm, folder, key)
    return lm


def wrap(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, attention: str = "auto", fp32_logits: bool = False
) -> LanguageModel:
    """Read from the model's config what happens between its last hidden state and its logits.

    attention: the kernel for packed rows, as model.attention names it. fp32_logits: as model.fp32_logits.
    """
    set_packed(model, attention)
    forget_lengths(model)
    text = model.config.get_text_config()
    scale = 1.0
    if getattr(text, "logit_scale", None) is not None:  # Cohere multiplies
        scale = float(text.logit_scale)
    elif getattr(text, "logits_scaling", None) is not None:  # Granite divides
        scale = 1.0 / float(text.logits_scaling)
    rows = model.get_output_embeddings().weight.shape[0]
    known = rows if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    model.eval()  # no dropout anywhere: the ratio to the sampler's log-probabilities must be exact
    return LanguageModel(
        model=model,
        tokenizer=tokenizer,
        softcap=getattr(text, "final_logit_softcapping", None),
        logit_scale=scale,
        max_length=int(text.max_position_embeddings),
        num_tokens=min(known, rows),
        fp32_logits=fp32_logits,
    )


@torch.no_grad()
def _check_logits(lm: LanguageModel, folder: Path, key: str) -> None:
    """Refuse an architecture that does more between its last hidden state and its logits than `wrap` knows of.

    Its log-probabilities would differ from the sampler's without a word.
    """
    tokens = torch.arange(4, device=lm.device)[None]
    theirs = lm.model(input_ids=tokens, use_cache=False).logits.float()
    ours = lm.head(lm.backbone(input_ids=tokens, use_cache=False).last_hidden_state).float() * lm.logit_scale
    if lm.softcap is not None:
        ours = lm.softcap * torch.tanh(ours / lm.softcap)
    if (ours - theirs).abs().max() > 0.05 * theirs.abs().max():  # rounding in bfloat16 stays well below
        raise UserError(
            f"{key}: {folder} holds a {type(lm.model).__name__}, whose logits are not its output layer's alone; "
            "use another architecture, such as Qwen2 or Llama."
        )


def _refuse_code(error: Exception, folder: Path, key: str) -> None:
    """Name the switch where transformers asks for `trust_remote_code`: the directory needs code that it brings."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        raise UserError(
            f"{key}: {folder} loads by Python code that it brings, which is not run unasked; {HOW_TO_TRUST}."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
