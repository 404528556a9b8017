"""What the commands share that start from a configuration: the arguments, and how they become a Config."""

import argparse
from pathlib import Path

PRESETS = Path(__file__).parents[1] / "presets"


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a preset (`airl-fast presets`) or a YAML file")
    parser.add_argument("words", nargs="*", default=[], metavar="a.b=v", help="values that replace the configuration's")


def load(arguments: argparse.Namespace):
    from airl_fast.config import Config
    from airl_fast.overrides import find_preset, load_config

    source, origin = find_preset(arguments.config, PRESETS)
    return load_config(Config, source, arguments.words, origin=origin)
