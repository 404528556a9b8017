"""Checkpoints: bit-exact, atomic, and never wrong without saying so."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from airl_fast import checkpoint
from airl_fast.checkpoint import NonFiniteError, SignalGuard, load_tree, save, save_tree
from airl_fast.errors import UserError

ROOT = Path(__file__).parents[2]
DTYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.bool,
)  # fmt: skip


def identical(a: object, b: object) -> bool:
    """Equal to the last bit, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        raw = [x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)] if same else []
        return same and torch.equal(*raw)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(identical(k, m) and identical(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def round_trip(tree: object, directory: Path) -> object:
    save_tree(tree, directory / "t")
    return load_tree(directory / "t")


# ------------------------------------------------------------------------------------------------- trees

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
tensors = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape).mul(1.5).to(dtype))
)
keys = scalars.filter(lambda key: not (isinstance(key, float) and math.isnan(key)))
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=trees)
def test_any_tree_comes_back_bit_exact(tree: object, tmp_path: Path) -> None:
    assert identical(round_trip(tree, tmp_path), tree)


def test_special_floats_and_confusable_keys(tmp_path: Path) -> None:
    tree = {
        "f": [math.inf, -math.inf, math.nan, -0.0, 5e-324, 0.1, 1e300],
        1: torch.tensor(1),
        "1": torch.tensor(2),
        1.5: {"dict": [], "float": "inf", "tensor": "x"},  # names that the format itself uses
        "a/b": torch.tensor(3),
        "a": {"b": torch.tensor(4)},
        None: (),
        (1, "x"): 2**200,
    }
    assert identical(round_trip(tree, tmp_path), tree)


def test_nan_payloads_views_and_layouts_survive(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    nan = torch.tensor([0x7FC00001, 0x7F800001], dtype=torch.int32).view(torch.float32)
    tree = {"t": base.t(), "row": base[1], "strided": base[:, ::2], "nan": nan, "tied": [base, base], "empty": base[:0]}
    back = round_trip(tree, tmp_path)
    assert identical(back, tree)
    back["tied"][0][0, 0] = 99  # copies, not one tensor twice
    assert back["tied"][1][0, 0] == 0
    round_trip({"row": torch.zeros(1000, 100)[3]}, tmp_path)
    assert (tmp_path / "t.safetensors").stat().st_size < 1000  # a view does not drag its whole storage along


@pytest.mark.parametrize("value", [object(), {1, 2}, np.float32(1), b"x", torch.device("cpu"), torch.tensor([1j])])
def test_other_values_are_refused_by_path(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match="a/0.*cannot be stored in a checkpoint"):
        save_tree({"a": [value]}, tmp_path / "t")


def test_optimizer_and_scheduler_resume_bit_exact(tmp_path: Path) -> None:
    """Six steps at once equal three, a checkpoint in fresh objects, and three more."""

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)).double()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-3}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train(model, optimizer, schedule, updates: int) -> None:
        for _ in range(updates):
            x = torch.randn(5, 4, dtype=torch.float64) + random.random() + float(np.random.rand())
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            schedule.step()

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(2)
        np.random.seed(3)

    straight = build()
    seed()
    train(*straight, 6)
    first = build()
    seed()
    train(*first, 3)
    parts = {name: part.state_dict() for name, part in zip(("model", "optimizer", "schedule"), first, strict=True)}
    path = save(tmp_path, 3, {**parts, "rng": checkpoint.rng_state()})
    seed()  # disturb what must be restored
    random.seed(99)
    second = build()
    for name, part in zip(("model", "optimizer", "schedule"), second, strict=True):
        part.load_state_dict(checkpoint.load(path, name))
    checkpoint.set_rng_state(checkpoint.load(path, "rng"))
    train(*second, 3)
    assert identical(dict(second[0].state_dict()), dict(straight[0].state_dict()))
    assert identical(second[1].state_dict(), straight[1].state_dict())


# ------------------------------------------------------------------------------------------------- writing


def weights(value: float = 1.0) -> dict[str, object]:
    return {"policy": {"w": torch.full((4,), value)}, "state": {"cursor": 7}}


def test_save_prunes_and_the_latest_loads(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        path = save(tmp_path, step, weights(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_10", "step_15"]
    assert checkpoint.latest(tmp_path) == path == tmp_path / "step_15"
    assert torch.equal(checkpoint.load(path, "policy")["w"], torch.full((4,), 15.0))
    assert checkpoint.load(path, "state") == {"cursor": 7}
    suffixes = {p.suffix for p in path.rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors"}
    with pytest.raises(UserError, match="holds no 'critic'"):
        checkpoint.load(path, "critic")


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, weights(1.0))
    path = save(tmp_path, 5, weights(2.0))
    assert checkpoint.load(path, "policy")["w"][0] == 2.0 and checkpoint.verify(path) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step_5"]


def test_writers_fill_their_directory_and_are_summed(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        save_file({"w": torch.ones(2)}, str(directory / "model.safetensors"))
        (directory / "config.json").write_text("{}")

    path = save(tmp_path, 1, weights(), writers={"model": write})
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {"model/model.safetensors", "model/config.json", "policy.json", "policy.safetensors"} <= set(files)
    (path / "model" / "config.json").write_text("[]")
    assert checkpoint.verify(path) == "model/config.json has changed since it was written"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
def test_nonfinite_weights_are_refused(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    save(tmp_path, 1, weights())
    broken = {"policy": {"layer": {"w": torch.tensor([1.0, bad], dtype=dtype)}}}
    with pytest.raises(NonFiniteError, match="step_2 was not saved because policy layer/w holds NaN or infinity"):
        save(tmp_path, 2, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"]
    assert save(tmp_path, 2, broken, may_be_nonfinite=("policy",)).name == "step_2"


def test_large_double_is_finite(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"policy": torch.tensor([1e300], dtype=torch.float64)})
    assert checkpoint.load(path, "policy").item() == 1e300


def test_nonfinite_weights_of_a_writer_are_refused(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        save_file({"w": torch.tensor([math.nan])}, str(directory / "model.safetensors"))

    with pytest.raises(NonFiniteError, match="model w holds NaN"):
        save(tmp_path, 1, {}, writers={"model": write})


def test_a_failed_write_is_one_sentence_and_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, weights())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(UserError) as caught:
        save(tmp_path, 2, weights())
    text = str(caught.value)
    assert "No space left on device" in text and "step_1 is untouched" in text and "free some space" in text
    assert [p.name for p in tmp_path.iterdir()] == ["step_1"] and checkpoint.verify(tmp_path / "step_1") is None


def can_mount() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"], capture_output=True
    ).returncode == 0  # fmt: skip


@pytest.mark.skipif(not can_mount(), reason="needs a user namespace to mount a small file system")
def test_a_really_full_disk(tmp_path: Path) -> None:
    """On a 300 KiB file system the first checkpoint fits and the second does not."""
    code = f"""
import sys, torch
from pathlib import Path
from airl_fast import checkpoint
from airl_fast.errors import UserError
d = Path({str(tmp_path)!r})
checkpoint.save(d, 1, {{"p": torch.ones(20_000)}})
try:
    checkpoint.save(d, 2, {{"p": torch.ones(60_000)}})
except UserError as error:
    print(error)
print(sorted(p.name for p in d.iterdir()), checkpoint.verify(d / "step_1"))
"""
    script = f'mount -t tmpfs -o size=300k none "{tmp_path}" && exec "{sys.executable}" -c "$CODE"'
    out = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        env={**os.environ, "CODE": code},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    sentence, listing = out.stdout.splitlines()
    assert "No space left" in sentence and "step_1 is untouched; free some space" in sentence, out.stderr
    assert listing == "['step_1'] None"


def test_a_lost_directory_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no earlier one; check that the directory exists"):
        save(tmp_path / "gone", 1, weights())


def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """A process that saves without pause is killed at several moments; what it leaves is always intact and recent."""
    code = f"""
import torch
from pathlib import Path
from airl_fast import checkpoint
d, step = Path({str(tmp_path)!r}), 0
w = torch.ones(200_000)
while True:
    step += 1
    checkpoint.save(d, step, {{"p": w * step}}, keep=1)
    print(step, flush=True)
"""
    for delay in (0.0, 0.003, 0.011, 0.017):
        for leftover in tmp_path.iterdir():
            shutil.rmtree(leftover)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            reported = int(process.stdout.readline())
        time.sleep(delay)
        process.kill()
        reported = max([reported, *(int(line) for line in process.stdout)])
        process.wait()
        process.stdout.close()
        path = checkpoint.latest(tmp_path)
        step = checkpoint.step_of(path)
        assert step in (reported, reported + 1)
        assert torch.equal(checkpoint.load(path, "p"), torch.full((200_000,), float(step)))
        save(tmp_path, step + 1, weights(), keep=1)  # and the next save clears the debris
        assert [p.name for p in tmp_path.iterdir()] == [f"step_{step + 1}"]


# ------------------------------------------------------------------------------------------------- reading


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda p: flip_bit(p / "policy.safetensors"), "policy.safetensors has changed since it was written"),
        (lambda p: (p / "policy.safetensors").unlink(), "policy.safetensors is missing"),
        (lambda p: os.truncate(p / "policy.safetensors", 10), "policy.safetensors has 10 bytes instead of"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be used"),
        (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be used"),
        (lambda p: shutil.copy(p.parent / "step_1" / "manifest.json", p), "has changed"),
    ],
)
def test_damage_is_named_and_the_previous_used(tmp_path: Path, damage, expected: str) -> None:
    save(tmp_path, 1, weights(1.0))
    save(tmp_path, 2, {**weights(2.0), "state": {"cursor": 8}})
    damage(tmp_path / "step_2")
    said: list[str] = []
    assert checkpoint.latest(tmp_path, say=said.append) == tmp_path / "step_1"
    assert len(said) == 1 and expected in said[0] and "step_2 is damaged" in said[0]


def test_a_renamed_checkpoint_is_not_what_it_says(tmp_path: Path) -> None:
    save(tmp_path, 1, weights()).rename(tmp_path / "step_9")
    assert checkpoint.verify(tmp_path / "step_9") == "manifest.json is that of step 1"


def test_no_good_checkpoint_is_an_error_and_none_may_be_fine(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path, required=False) is None
    with pytest.raises(UserError, match="there is no checkpoint"):
        checkpoint.latest(tmp_path)
    flip_bit(save(tmp_path, 1, weights()) / "state.json")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path, say=lambda _: None, required=False)


def test_steps_sort_as_numbers_and_ignore_other_names(tmp_path: Path) -> None:
    for name in ("step_9", "step_10", "step_x", ".tmp_step_11", "abandoned_step_12", ".old_step_8"):
        (tmp_path / name).mkdir()
    assert checkpoint.steps(tmp_path) == [9, 10]


def test_find_takes_a_checkpoint_a_run_or_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    directory.mkdir(parents=True)
    save(directory, 1, weights())
    path = save(directory, 2, weights())
    assert checkpoint.find(tmp_path / "run") == checkpoint.find(directory) == checkpoint.find(path) == path
    assert checkpoint.find(directory / "step_1") == directory / "step_1"
    flip_bit(directory / "step_1" / "policy.safetensors")
    with pytest.raises(UserError, match="step_1 is damaged"):
        checkpoint.find(directory / "step_1")


# ------------------------------------------------------------------------------------------------- signals


def test_first_signal_sets_a_flag_and_handlers_are_restored(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with SignalGuard() as guard:
        assert guard.stop is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.stop == "SIGTERM"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "SIGTERM: saving a checkpoint after this phase; send it again to stop at once." in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(number: signal.Signals) -> None:
    code = (
        "import os, time; from airl_fast.checkpoint import SignalGuard\n"
        f"with SignalGuard() as guard:\n"
        f"    os.kill(os.getpid(), {int(number)}); print(guard.stop, flush=True)\n"
        f"    os.kill(os.getpid(), {int(number)}); print('still here')"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert out.stdout == f"{number.name}\n" and out.returncode == -number
