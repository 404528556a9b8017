"""`airl-fast export RUN`: a run's policy or discriminator as a PEFT adapter, or merged into a plain model directory."""

import json
import shutil
from pathlib import Path

import torch

from airl_fast.artifacts import POLICY, REWARD, base_directory, check_base, write_whole
from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.manifest import MODEL, check_model
from airl_fast.models.adapters import CONFIG, WEIGHTS, is_adapter_directory, load_adapter, merge
from airl_fast.models.load import check_directory, load_model
from airl_fast.saved import run_config

SOURCES = {"policy": POLICY, "discriminator": REWARD}
FORMATS = ("adapter", "merged")


def export(run: Path, what: str, form: str, out: Path | None, *, trust_remote_code: bool = False) -> str:
    """Write a directory and return a sentence about it.

    form "adapter": adapter_config.json and adapter_model.safetensors as PEFT and vLLM read them. "merged": an ordinary
    model directory in the run's dtype, adapters added to the weights they were trained over; 4-bit weights become the
    full ones they stood for, so that it computes what was trained and evaluated. A discriminator keeps its head beside
    either. What is written is the user's, to change at will, so it has no list of its files to be checked by; what is
    read is checked. trust_remote_code: whether the model may run Python files of its own. UserError for what the run
    does not have, and for a directory that exists.
    """
    config = run_config(run, trust_remote_code=trust_remote_code)
    source = run / SOURCES[what]
    if not source.is_dir():
        raise UserError(
            f"{run} has no {SOURCES[what]}; finish the run with --resume auto"
            + (", or export the policy if its algorithm is not airl." if what == "discriminator" else ".")
        )
    out = out if out is not None else run / "export" / f"{what}-{form}"
    if out.exists():
        raise UserError(f"export: {out} exists; choose another directory with -o.")
    adapted = is_adapter_directory(source)
    if form == "adapter" and not adapted:
        section = "model.lora" if what == "policy" else "discriminator.lora"
        raise UserError(
            f"{run} trained every weight of its {what} ({section} is not set), so there is no adapter; "
            "use --format merged."
        )
    if form == "adapter":
        base = base_directory(source)
        write_whole(out, lambda folder: _copy_adapter(source, folder, base))
        return f"adapter of the {what} written to {out}; its frozen weights are in {base}"
    if not adapted:
        check_model(source)
        write_whole(out, lambda folder: _copy(source, folder))
        return f"{what} copied to {out}: the run trained every weight, so there was nothing to merge"
    write_whole(out, lambda folder: _write_merged(source, what, config, folder))
    return f"merged {what} written to {out}"


def _copy(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MODEL))


def _copy_adapter(source: Path, folder: Path, base: Path) -> None:
    _copy(source, folder)
    settings = json.loads((folder / CONFIG).read_text())
    settings["base_model_name_or_path"] = str(base)  # where it is now, should the run have been moved
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _write_merged(source: Path, what: str, config: Config, folder: Path) -> None:
    base = base_directory(source)
    check_base(source, base)
    settings = config.model if what == "policy" else config.discriminator
    model = load_model(
        check_directory(str(base), what),
        what,
        getattr(torch, config.model.dtype),
        trust_remote_code=config.model.trust_remote_code,
        quantise=settings.quantise,
        device=torch.device("cpu"),
    )
    if settings.quantise is not None:
        model = model.dequantize()
    model = model if what == "policy" else model.base_model
    load_adapter(model, source, str(base), what)
    merge(model).save_pretrained(folder)
    for file in source.iterdir():  # the tokenizer, and a discriminator's head
        if file.name not in (CONFIG, WEIGHTS, MODEL, "README.md"):
            shutil.copy2(file, folder / file.name)
