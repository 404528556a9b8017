"""The command itself: a process on a port, told to stop by a signal; and mistakes on its command line."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from airl_fast.cli import main
from airl_fast.errors import UserError
from airl_fast.serve.server import bind, is_loopback, read_token
from tests.airl_fast.run_cases import small_run
from tests.airl_fast.serve.service_cases import rows


@contextlib.contextmanager
def served(*flags: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """(process, address) of the command on a free port."""
    command = [sys.executable, "-m", "airl_fast", "serve", str(small_run()), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        line = process.stdout.readline()
        address = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert address, line
        yield process, address[0]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_parallel_clients_large_bodies_and_a_signal_in_flight():
    """One process for all of it: a start takes seconds. Requests wait 0.3 s for company, so that they meet."""
    with served("--batch-wait-ms", "300", "--max-body-mib", "0.05") as (process, address):
        check_parallel_clients(address)
        check_chunked_body(address)
        check_large_body_with_a_length(address)
        check_a_client_that_leaves(address)
        check_signal(process, address)


def check_parallel_clients(address: str) -> None:
    """Each gets its own answer, the one it gets alone, from fewer passes than there are requests."""
    asked = [rows(1 + i % 2, i % 6) for i in range(12)]

    def ask(traces: list[dict]) -> list[dict]:
        response = httpx.post(f"{address}/score", json={"traces": traces}, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()["traces"]

    alone = ask(rows(8))
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    for i, (traces, found) in enumerate(zip(asked, answers, strict=True)):
        assert [trace["id"] for trace in found] == [trace["id"] for trace in traces]
        for k, trace in enumerate(found):
            expected = alone[i % 6 + k]["token_rewards"]
            np.testing.assert_allclose(trace["token_rewards"], expected, rtol=0, atol=1e-5)
    metrics = httpx.get(f"{address}/metrics").text
    assert 'airl_requests_total{path="/score",status="200"} 13\n' in metrics
    passes = int(re.search(r"^airl_passes_total (\d+)$", metrics, re.MULTILINE)[1])
    assert 2 <= passes < 13
    assert f"airl_traces_total {8 + sum(map(len, asked))}\n" in metrics
    health = httpx.get(f"{address}/health").json()
    assert (health["status"], health["run"], health["device"]) == ("ok", "small", "cpu")
    assert (health["queue_length"], health["in_flight"]) == (0, 0)


def check_chunked_body(address: str) -> None:
    """Without Content-Length the body counts as it arrives, and a body that never ends is refused all the same."""
    host, port = address.removeprefix("http://").split(":")
    head = (
        f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode())
        for _ in range(6):  # 60 kB of the 52 kB allowed; the last chunk never comes
            connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "body_too_large"


def check_large_body_with_a_length(address: str) -> None:
    response = httpx.post(f"{address}/score", json={"traces": [{"prompt": "1", "completion": "1" * 5_000_000}]})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def check_a_client_that_leaves(address: str) -> None:
    """Its request waits for the one on its way, and is cancelled: no pass is made for it."""
    passes = counter(address, "airl_passes_total")
    with pytest.raises(httpx.ReadTimeout), on_its_way(address):
        httpx.post(f"{address}/score", json={"traces": rows(2)}, timeout=0.1)
    while httpx.get(f"{address}/health").json()["in_flight"]:
        time.sleep(0.01)
    time.sleep(0.4)
    assert counter(address, "airl_passes_total") == passes
    assert counter(address, 'airl_requests_total{path="/score",status="499"}') == 2


def counter(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


@contextlib.contextmanager
def on_its_way(address: str) -> Iterator[None]:
    """A request whose body does not end: others wait for it, up to --batch-wait-ms. Its client leaves at the end."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"POST /score HTTP/1.1\r\nHost: {host}\r\nContent-Length: 500\r\n\r\n{{".encode())
        while httpx.get(f"{address}/health").json()["in_flight"] == 0:
            time.sleep(0.01)
        yield


def check_signal(process: subprocess.Popen, address: str) -> None:
    """SIGTERM while a request waits for another that is on its way: it is answered, new connections are not, the one
    whose client leaves in the middle of its body is dropped, and the exit code is 0."""
    answers = []

    def ask() -> None:
        answers.append(httpx.post(f"{address}/score", json={"traces": rows(2)}, timeout=30))

    client = threading.Thread(target=ask)
    with on_its_way(address):
        client.start()
        while httpx.get(f"{address}/health").json()["in_flight"] < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        client.join()
    assert answers[0].status_code == 200
    assert len(answers[0].json()["traces"]) == 2
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")
    assert process.wait(20) == 0
    assert process.stdout.read() == "stopped\n"


def refused(capsys, *words: str) -> str:
    """The one sentence of a command line that is refused with exit code 2."""
    assert main(["serve", *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("airl-fast: ")
    assert text.count("\n") == 1
    return text


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert "another program listens on 127.0.0.1" in refused(capsys, "no-such-run", "--port", port)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "70000"], "--port 70000: give a number from 0 to 65535"),
        (["--batch-wait-ms", "-1"], "--batch-wait-ms -1: give 0 to 1000"),
        (["--batch-wait-ms", "nan"], "--batch-wait-ms nan: give 0 to 1000"),
        (["--batch-tokens", "0"], "--batch-tokens 0: give a whole number from 1"),
        (["--concurrency", "0"], "--concurrency 0: give a whole number from 1"),
        (["--max-body-mib", "0"], "--max-body-mib 0: give a number above 0"),
        (["--timeout", "inf"], "--timeout inf: give a number above 0"),
        (["--host", "no such host"], "--host no such host: no such address"),
        (["--host", "203.0.113.7", "--port", "0"], "cannot be opened"),
        (["--port", "0"], "belongs to no finished run"),
        (["--token-file", "no-such-file"], "--token-file no-such-file: cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(capsys, tmp_path, words, sentence):
    assert sentence in refused(capsys, str(tmp_path), *words)


def test_an_address_that_others_reach_is_warned_of(capsys, tmp_path):
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("airl-fast: 0.0.0.0 can be reached from other machines and nothing is encrypted")
    assert "--token-file" in warning
    assert "belongs to no finished run" in error
    (tmp_path / "token").write_text("secret")
    words = ["--host", "0.0.0.0", "--port", "0", "--token-file", str(tmp_path / "token")]
    assert main(["serve", str(tmp_path), *words]) == 2
    assert "--token-file" not in capsys.readouterr().err.splitlines()[0]


def test_without_the_packages(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)  # importing it raises, and find_spec finds none
    assert "serve needs fastapi; run pip install 'airl-fast[serve]'" in refused(capsys, str(small_run()))


def test_token_files(tmp_path):
    file = tmp_path / "token"
    file.write_text("abc-123\n")
    assert read_token(file) == "abc-123"
    for text in ("", "two words", "two\nlines", "naïve"):
        file.write_text(text)
        with pytest.raises(UserError, match="must hold one token of ASCII letters"):
            read_token(file)


def test_which_addresses_are_loopback():
    for host, expected in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        with bind(host, 0) as listener:
            assert is_loopback(listener) is expected
