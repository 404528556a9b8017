"""What holds for every op: registered whole, compiled for every chip, never waiting, refusing what it cannot read."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import airl_kernels
import pytest
import torch
from airl_kernels import discriminator_loss, linear_logprob, linear_ppo_loss, token_rewards
from airl_kernels._common import DEFINED
from airl_kernels.testing import INTERPRETED

PACKAGE = Path(airl_kernels.__file__).parent
pytestmark = pytest.mark.skipif(INTERPRETED, reason="about the code, whoever runs it")


# ---- registration ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEFINED)
def test_every_op_has_a_body_a_fake_and_a_triton_half(name):
    op, _ = DEFINED[name]
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"airl_kernels::{name}", "CUDA")
    assert op._abstract_fn is not None
    sources = [p for p in PACKAGE.glob("*_triton.py") if re.search(rf"^def {name}\(", p.read_text(), re.MULTILINE)]
    assert len(sources) == 1


def test_every_op_is_opchecked():
    """Each name stands in a call of a test file that runs `torch.library.opcheck`."""
    here = Path(__file__).parent
    files = [p.read_text() for p in here.glob("test_*.py") if p != Path(__file__)]
    text = "\n".join(source for source in files if "opcheck(" in source)
    variables = {"linear_logprob": "_linear_logprob", "linear_logprob_backward": "_linear_logprob_backward",
                 "scale_rows": "scaled", "selective_log_softmax": "_selective", "ppo_loss": "_ppo_loss",
                 "selective_log_softmax_backward_": "_selective_backward_", "linear_ppo_loss": "_linear_ppo_loss",
                 "gather_rows": "gather_rows", "add_rows": "_add_rows"}  # fmt: skip
    for name in DEFINED:
        pattern = rf"opcheck\(\s*{variables[name]}," if name in variables else rf'"{name}": \('
        assert re.search(pattern, text), name


def test_every_kernel_is_compiled_for_every_chip():
    """A kernel that `shipped_launches` forgot would be tested by nobody without a GPU."""
    defined = set()
    for path in PACKAGE.glob("*_triton.py"):
        defined |= set(re.findall(r"^@triton\.jit.*\ndef (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    listed = "".join((Path(__file__).parent / f).read_text() for f in (
        "test_head_and_returns_compiled.py", "test_logprob_compiled.py"))  # fmt: skip
    assert len(defined) > 15
    assert {name for name in defined if f'"{name}"' not in listed} == set()


def test_launchers_read_nothing_back():
    """No call that makes the host wait for a device, but the one that `compact` documents."""
    waiting = {"item", "tolist", "nonzero", "cpu", "numpy", "masked_select", "unique", "synchronize"}
    found = [
        f"{path.name}: {node.func.attr}"
        for path in (*PACKAGE.glob("*_triton.py"), PACKAGE / "_chunking.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in waiting
    ]
    assert found == ["_chunking.py: nonzero"]


# ---- installation ----------------------------------------------------------------------------------------------


def test_the_library_needs_torch_and_triton_alone():
    requirements = importlib.metadata.requires("airl-kernels")
    assert {re.match(r"[\w-]+", r)[0] for r in requirements} == {"torch", "triton"}


def test_nothing_of_the_library_imports_more():
    """Every module, Triton's half and the test helpers included, without what a bare environment lacks."""
    names = [".".join(("airl_kernels", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in PACKAGE.rglob("*.py")]
    absent = ("airl_fast", "transformers", "numpy.testing", "pytest", "hypothesis", "peft", "trl")
    code = (
        f"import sys, importlib\nfor name in {absent}: sys.modules[name] = None\n"
        f"for name in {[n.removesuffix('.__init__') for n in names if 'integrations' not in n]}: "
        "importlib.import_module(name)"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


# ---- weights that are refused ----------------------------------------------------------------------------------


def calls(weight: object) -> dict:
    """Every op that takes a weight, with this one."""
    hidden, ids, ones = torch.zeros(6, 64), torch.zeros(6, dtype=torch.int64), torch.ones(6)
    return {
        "linear_logprob": lambda: linear_logprob(hidden, weight, ids),
        "linear_ppo_loss": lambda: linear_ppo_loss(hidden, weight, ids, ones, ones),
        "token_rewards": lambda: token_rewards(hidden, weight, index=ids),
        "discriminator_loss": lambda: discriminator_loss(hidden, weight, None, ones, ones, index=ids),
    }


@pytest.fixture(scope="module")
def dtensor(tmp_path_factory):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, distribute_tensor

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    yield distribute_tensor(torch.zeros(128, 64), mesh, [Replicate()])
    dist.destroy_process_group()


@pytest.mark.parametrize("op", calls(None))
def test_a_dtensor_is_refused(op, dtensor):
    with pytest.raises(TypeError, match=r"weight is a DTensor; pass a plain tensor \(a DTensor's `full_tensor\(\)`\)"):
        calls(dtensor)[op]()


@pytest.mark.parametrize("op", calls(None))
def test_a_lora_wrapped_head_is_refused(op):
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential()
    model.add_module("head", torch.nn.Linear(64, 128, bias=False))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["head"], r=2))
    layer = next(m for m in wrapped.modules() if type(m).__name__ == "Linear" and hasattr(m, "lora_A"))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got Linear; pass the layer's `\.weight`"):
        calls(layer)[op]()


@pytest.mark.parametrize("op", calls(None))
def test_a_quantised_head_is_refused(op):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = bitsandbytes.nn.Params4bit(torch.zeros(64 * 128 // 2, 1, dtype=torch.uint8), quant_type="nf4")
    with pytest.raises(TypeError, match=r"torch\.uint8; quantised weights are not supported"):
        calls(weight)[op]()
