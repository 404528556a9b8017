"""`airl-fast serve`."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from airl_fast.commands.settings import add_trust
from airl_fast.errors import UserError


def add(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser("serve", help="answer HTTP requests: score traces, rerank samples, find wrong steps")
    serve.add_argument("run", help="directory of a finished run, or of its reward model inside")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--token-file", help="file with a bearer token that requests must carry (default: none)")
    serve.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        help="most tokens of a pass that requests share (default: 16384)",
    )
    serve.add_argument(
        "--batch-wait-ms", type=float, default=2.0, help="a first request's wait for others on their way (default: 2)"
    )
    serve.add_argument("--max-body-mib", type=float, default=8.0, help="largest request (default: 8)")
    serve.add_argument("--max-traces", type=int, default=256, help="traces of one request (default: 256)")
    serve.add_argument("--concurrency", type=int, default=64, help="requests at once; more get 503 (default: 64)")
    serve.add_argument("--timeout", type=float, default=60.0, help="seconds for an answer; then 504 (default: 60)")
    add_trust(serve)
    serve.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {' and '.join(missing)}; run pip install 'airl-fast[serve]'.")
    _check(arguments)

    from airl_fast.serve.app import Settings
    from airl_fast.serve.guard import Limits
    from airl_fast.serve.server import read_token, serve

    settings = Settings(
        limits=Limits(
            body=int(arguments.max_body_mib * 2**20),
            traces=arguments.max_traces,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
        ),
        token=None if arguments.token_file is None else read_token(Path(arguments.token_file)),
        batch_tokens=arguments.batch_tokens,
        batch_wait=arguments.batch_wait_ms / 1000,
    )
    return serve(
        Path(arguments.run), arguments.host, arguments.port, settings, trust_remote_code=arguments.trust_remote_code
    )


def _check(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port {arguments.port}: give a number from 0 to 65535.")
    if not 0 <= arguments.batch_wait_ms <= 1000:
        raise UserError(f"--batch-wait-ms {arguments.batch_wait_ms:g}: give 0 to 1000 milliseconds.")
    for name in ("batch_tokens", "max_traces", "concurrency"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: give a whole number from 1.")
    for name, most in (("max_body_mib", 4096.0), ("timeout", 86400.0)):
        value = getattr(arguments, name)
        if not 0 < value <= most:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give a number above 0, up to {most:g}.")
