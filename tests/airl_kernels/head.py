"""Small token heads of every kind, for the tests of their values and of their autograd."""

import pytest
import torch
from airl_kernels import discriminator_loss
from airl_kernels.testing import INTERPRETED, TokenHead, make_token_head

from tests.airl_kernels.cases import DEVICES, DTYPES

KINDS = ("logit", "gail", "logd")
LOSSES = ("bce", "wgan", "pairwise")
SHAPES = {
    "linear": {},
    "linear without bias, with offset": {"bias": None, "offset": True},
    "one row of the weight per token": {"vocabulary": 11, "bias": 11, "offset": True},
    "one row of the weight, one bias": {"vocabulary": 11},
    "width of one tile and a bit": {"rows": 37, "width": 519},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
devices = pytest.mark.parametrize("device", DEVICES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = 40 if INTERPRETED else 120
not_a_kernel = pytest.mark.skipif(INTERPRETED, reason="does not reach a Triton kernel")


def make_head(rows: int = ROWS, width: int = 40, **options) -> TokenHead:
    return make_token_head(rows, width, **options)


def loss_of(head: TokenHead, loss: str = "bce", **options) -> tuple[torch.Tensor, torch.Tensor]:
    return discriminator_loss(
        *head.args, head.targets, head.weights, **head.extra, loss=loss,
        cu_seqlens=head.cu_seqlens, pairs=head.pairs, **options,
    )  # fmt: skip
