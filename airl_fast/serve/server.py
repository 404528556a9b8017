"""`airl-fast serve RUN`: open the port, load the model, answer until told to stop."""

import errno
import ipaddress
import logging
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from airl_fast.errors import UserError
from airl_fast.judge.judge import Judge, locate_reward, open_judge
from airl_fast.judge.locate import Thresholds
from airl_fast.judge.naming import calibrated
from airl_fast.serve.app import Settings, make_app


def serve(run: Path, host: str, port: int, settings: Settings, *, trust_remote_code: bool = False) -> int:
    """Returns when SIGTERM or SIGINT has come and what was in flight is answered. UserError for a port that is taken
    (before the model is loaded) and for a run that cannot be read."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    listener = bind(host, port)
    with listener:
        if not is_loopback(listener):
            print(
                f"airl-fast: {host} can be reached from other machines and nothing is encrypted; serve behind a proxy "
                "with TLS" + (", and demand a token with --token-file." if settings.token is None else "."),
                file=sys.stderr,
            )
        judge = open_judge(run, trust_remote_code=trust_remote_code)
        thresholds = thresholds_of(judge)
        app = make_app(judge, thresholds, locate_reward(run)[0].resolve().name, settings)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                # Whoever is in flight has a response by then: its own timeout answers before.
                timeout_graceful_shutdown=int(2 * settings.limits.timeout) + 5,
            )
        )

        def stop(number: int, frame: object) -> None:
            """uvicorn raises the signal again when it is done; then, the way to exit code 0 is to do nothing."""
            server.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        try:
            listener.listen(2048)
        except OSError as error:
            raise _refused(host, port, error) from None
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {run} on {judge.bridge.device} at http://{shown}:{listener.getsockname()[1]}", flush=True)
        server.run(sockets=[listener])
    print("stopped", flush=True)
    return 0


def thresholds_of(judge: Judge) -> Thresholds:
    """Of the localisation; without any, which is said, rule first_below is refused."""
    try:
        return calibrated(judge)
    except UserError as error:
        print(f"airl-fast: /localize has no threshold: {error}; other rules work.", file=sys.stderr)
        return {}


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket at the address, which does not listen yet. UserError when that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {host}: no such address; give one of this machine's, such as 127.0.0.1.") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _refused(host, port, error) from None
    return listener


def is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].split("%")[0]).is_loopback


def _refused(host: str, port: int, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"--port {port}: another program listens on {host}:{port}; stop it or give another port.")
    return UserError(f"--host {host} --port {port}: cannot be opened ({error.strerror}); give another address.")


def read_token(path: Path) -> str:
    """The token in a file of one line. UserError when there is none to use."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise UserError(f"--token-file {path}: cannot be read ({reason}); give a file with one line.") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"--token-file {path}: must hold one token of ASCII letters, digits and signs, without blanks; "
            "`openssl rand -hex 32` makes one."
        )
    return token
