"""Packed attention on the GPU: every kernel this machine has against the dense masked product in float64."""

import pytest
import torch

from tests.gpu.device import DEVICE, ON_GPU, gpu_only, needs_device

attention = pytest.importorskip("airl_fast.models.attention", reason="needs transformers and the trainer's sources")
from airl_fast.models.flash import Segmentwise, choose_kernel, pieces  # noqa: E402  (after the check that it is there)
from airl_fast.types import Segments  # noqa: E402

pytestmark = needs_device
# prompts, completions, completions of each prompt
SEGMENTS = {
    "odd lengths": ((3, 90, 1), (30, 1, 170, 5, 2, 11, 29, 299, 3), (3, 1, 5)),
    "one token each": ((1,), (1,), (1,)),
    "a prompt without completion": ((4, 7), (1,), (1, 0)),
    "a group of real size": ((180,), (220,) * 8 + (61, 1), (10,)),
}


def check(kernel, dtype: torch.dtype, name: str, heads: int, kv_heads: int, width: int, tolerance: float) -> None:
    prompts, completions, counts = SEGMENTS[name]
    segments = Segments(prompts=prompts, completions=completions, counts=counts)
    generator = torch.Generator().manual_seed(heads + width)
    shapes = [(segments.num_rows, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    mask = attention.dense_mask(segments, torch.device(DEVICE))
    expected = attention.attend_dense(*inputs, mask, width**-0.5)
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    cuts = pieces(segments, torch.device(DEVICE), kernel)
    ours = attention.SharedPrefixAttention.apply(*inputs, width**-0.5, cuts, kernel)
    found = torch.autograd.grad(ours, inputs, grad)
    for mine, theirs in zip((ours, *found), (expected, *wanted), strict=True):
        assert mine.dtype == dtype and mine.isfinite().all()
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


@gpu_only
@pytest.mark.parametrize("kernel", ["torch_flash", "flash_attn"])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 2, 128), (14, 2, 64), (4, 4, 64)])
@pytest.mark.parametrize("name", SEGMENTS)
def test_flash_kernels(kernel, heads, kv_heads, width, name):
    if kernel == "flash_attn":
        pytest.importorskip("flash_attn")
    check(
        choose_kernel(kernel, torch.device(DEVICE), torch.bfloat16), torch.bfloat16, name, heads, kv_heads, width, 0.02
    )


@pytest.mark.parametrize("name", SEGMENTS)
def test_float32_has_a_kernel_too(name):
    kernel = choose_kernel("auto", torch.device(DEVICE), torch.float32)
    assert isinstance(kernel, Segmentwise) == ON_GPU
    check(kernel, torch.float32, name, 4, 2, 16, 3e-3)  # TF32 products, where they are allowed
