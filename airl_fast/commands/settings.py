"""What the commands share that start from a configuration: the arguments, and how they become a Config."""

import argparse
from pathlib import Path

from airl_fast.trust import TRUST

PRESETS = Path(__file__).parents[1] / "presets"


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (`airl-fast presets`) or a YAML file")
    parser.add_argument("words", nargs="*", default=[], metavar="a.b=v", help="values that replace the configuration's")
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the Python files that model directories named here bring; no file can allow that (default: refuse)",
    )  # fmt: skip


def words_of(arguments: argparse.Namespace) -> list[str]:
    """The `a.b=v` of the command line, its switches among them."""
    return [*arguments.words, TRUST] if arguments.trust_remote_code else arguments.words


def load(arguments: argparse.Namespace):
    from airl_fast.config import Config
    from airl_fast.overrides import find_preset, load_config

    source, origin = find_preset(arguments.config, PRESETS)
    return load_config(Config, source, words_of(arguments), origin=origin)
