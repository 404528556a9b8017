"""`airl-fast generate`."""

import argparse
import sys
from pathlib import Path

from airl_fast.commands.settings import add_trust
from airl_fast.errors import UserError

GUIDED = ("none", "steps", "tokens", "reject", "revise")
_OPTIONS = ("n", "beam", "expand", "beta", "top_k", "keep", "running", "rounds")


def add(commands: argparse._SubParsersAction) -> None:
    generate = commands.add_parser("generate", help="write traces under the guidance of a run's reward")
    generate.add_argument("run", help="directory of the run, such as runs/demo, or of its reward model")
    generate.add_argument("prompts", nargs="?", help="JSON Lines with prompt, and optionally id and answer")
    generate.add_argument("--split", choices=("train", "dev", "test"), help="prompts of the run's task, not a file's")
    generate.add_argument("--prompts", dest="limit", type=int, metavar="P", help="the first P prompts (default: all)")
    generate.add_argument(
        "--guided",
        metavar="{" + ",".join(GUIDED) + "}",
        help="none: best of n samples; steps: beam search; tokens: re-weighted next tokens; reject: stop bad samples "
        "early; revise: rewrite from the first suspicious step (default: steps; with --compare several, by default "
        "each but none)",
    )
    generate.add_argument("--n", help="samples (none: 8, tokens: 1, reject: 16, revise: 1)")
    generate.add_argument("--beam", help="steps: partial traces kept (default: 4)")
    generate.add_argument("--expand", help="steps: next steps sampled from each (default: 4)")
    generate.add_argument("--beta", help="tokens: how far the reward shifts the policy (default: 1)")
    generate.add_argument("--top-k", help="tokens: how many likeliest tokens are scored at a place (default: 20)")
    generate.add_argument("--keep", help="reject: share of demonstrations that the floor lets pass (default: 0.95)")
    generate.add_argument("--running", help="reject: min or mean of what is written so far (default: min)")
    generate.add_argument("--rounds", help="revise: revisions at most (default: 4)")
    generate.add_argument("--policy", default="start", help="start, airl or a model's directory (default: start)")
    generate.add_argument("--seed", type=int, default=0, help="(default: 0)")
    generate.add_argument("--max-new-tokens", type=int, help="of one trace (default: the run's rollout.max_new_tokens)")
    generate.add_argument("--temperature", type=float, help="(default: the run's rollout.temperature)")
    generate.add_argument("-o", "--out", help="file for the traces, JSON Lines (default: standard output)")
    generate.add_argument(
        "--compare",
        action="store_true",
        help="measure against best-of-N at equal tokens; options then take several values: --beta 0.5,1,2",
    )
    generate.add_argument("--repeats", type=int, default=1, help="--compare: times each prompt is solved (default: 1)")
    generate.add_argument("--json", help="--compare: file for the figures (default: RUN/eval/guided.json)")
    generate.add_argument("--plot", help="--compare: file for the picture (default: RUN/eval/guided.png)")
    generate.add_argument("--allow-training-prompts", action="store_true", help="--compare on questions trained on")
    add_trust(generate)
    generate.set_defaults(command=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from airl_fast.guided.command import Request, compare, generate

    request = Request(
        run=Path(arguments.run),
        prompts=_path(arguments.prompts),
        split=arguments.split or "test",
        limit=arguments.limit,
        guided=_kinds(arguments.guided, arguments.compare),
        options={name: getattr(arguments, name) for name in _OPTIONS},
        policy=arguments.policy,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        repeats=arguments.repeats,
        allow_training_prompts=arguments.allow_training_prompts,
        trust_remote_code=arguments.trust_remote_code,
    )
    out = _path(arguments.out)
    if arguments.compare:
        print(compare(request, out, _path(arguments.json), _path(arguments.plot), _say), end="")
    else:
        generate(request, out, _write, _say)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """UserError for what does not go together, before anything is loaded."""
    if (arguments.prompts is None) == (arguments.split is None):
        raise UserError("give either a file of prompts or --split, and one of them only.")
    for name, value, least in (
        ("--prompts", arguments.limit, 1),
        ("--max-new-tokens", arguments.max_new_tokens, 1),
        ("--repeats", arguments.repeats, 1),
        ("--seed", arguments.seed, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} {value}: give a whole number from {least}.")
    if arguments.temperature is not None and not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature {arguments.temperature}: give a number from 0, where 0 is greedy.")
    if not arguments.compare:
        for flag, given in (
            ("--json", arguments.json),
            ("--plot", arguments.plot),
            ("--repeats", arguments.repeats != 1),
            ("--allow-training-prompts", arguments.allow_training_prompts),
        ):
            if given:
                raise UserError(f"{flag} belongs to --compare; add that, or leave {flag} out.")


def _kinds(text: str | None, compare: bool) -> tuple[str, ...]:
    if text is None:
        return GUIDED[1:] if compare else ("steps",)
    kinds = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [kind for kind in kinds if kind not in GUIDED]
    if unknown:
        raise UserError(f"--guided {unknown[0]}: choose one of {', '.join(GUIDED)}.")
    if len(kinds) > 1 and not compare:
        raise UserError(f"--guided {text}: several kinds are for --compare; give one.")
    return kinds


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
