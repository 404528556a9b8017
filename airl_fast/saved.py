"""What a finished run says of itself: the configuration it was trained with, and whether its files can be checked."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from airl_fast import manifest
from airl_fast.artifacts import POLICY, REWARD, START
from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.overrides import load_config, read_yaml
from airl_fast.trust import TRUST

log = logging.getLogger(__name__)


def run_config(run: Path, words: Sequence[str] = (), *, trust_remote_code: bool = False) -> Config:
    """The configuration of the run in the directory `run`, with `words` on top.

    trust_remote_code: whether this call lets the run's model directories execute Python files of their own. What the
    run's config.yaml says of that counts for nothing, so that a run of somebody else's decides nothing: UserError when
    it asks for more than the call allows, when there is no such file, and for its mistakes.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run} is no run directory (it has no config.yaml); give one that `airl-fast train` wrote.")
    words = [*words, TRUST] if trust_remote_code else list(words)
    config = load_config(Config, read_yaml(file), words, origin=str(file))
    say_unchecked(run)
    return config


def say_unchecked(run: Path) -> None:
    """Say, once in a process, that a run has model directories whose files cannot be checked."""
    _say_unchecked(run.resolve())


@cache
def _say_unchecked(run: Path) -> None:
    own = [run / name for name in (START, POLICY, REWARD) if (run / name).is_dir()]
    without = [folder.relative_to(run) for folder in own if not manifest.has_model_list(folder)]
    if without:
        log.warning(
            "%s: no %s in %s, as in runs of older versions; what is there is read without a check that it is as it was "
            "written.", run, manifest.MODEL, " and ".join(map(str, without)),
        )  # fmt: skip
