"""The Python examples of docs/kernels.md run as they stand, outside the trainer, and answer what their words say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
OPS = (
    "token_rewards", "discriminator_loss", "discounted_returns", "group_advantages", "gae", "linear_logprob",
    "selective_log_softmax", "linear_ppo_loss", "ppo_loss",
)  # fmt: skip
# What the comments of an example claim, by the op that it shows first.
CLAIMS = {
    "discriminator_loss": (
        "assert rewards.shape == (1000,) and rewards.dtype == torch.float32 and not rewards.any()\n"
        "assert abs(loss.item() - 0.6931) < 1e-3 and weight.grad.abs().sum() > 0"
    ),
    "discounted_returns": (
        "assert returns[4] == rewards[4] and not group_advantages(rewards, cu_seqlens, group, 0.9)[9:].any()"
    ),
    "linear_logprob": "assert hidden.grad.shape == (64, 128) and hidden.grad.abs().sum() > 0 and (logprob < 0).all()",
    "selective_log_softmax": "assert logits.sum(-1).abs().max() < 1e-3 and hidden.grad.abs().sum() > 0",
    "linear_ppo_loss": "assert not hidden.grad[:40].any() and weight.grad.abs().sum() > 0 and stats.num_tokens == 60",
    "linear_logprob, ppo_loss": "assert stats.approx_kl == 0 and hidden.grad.norm() > 0",
}


def shown(example: str) -> str:
    return re.search(r"^from airl_kernels import (.*)$", example, re.MULTILINE)[1]


@pytest.mark.parametrize("example", EXAMPLES, ids=map(shown, EXAMPLES))
def test_examples_run(example):
    claim = next(text for ops, text in CLAIMS.items() if shown(example).startswith(ops))
    if shown(example) in CLAIMS:
        claim = CLAIMS[shown(example)]
    paths = os.pathsep.join([str(PAGE.parents[1] / "kernels"), *sys.path])
    code = "import sys\nsys.modules['airl_fast'] = sys.modules['transformers'] = None\n"  # importing them raises
    run = subprocess.run(
        [sys.executable, "-c", f"{code}{example}\n{claim}"], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


def test_every_op_has_an_example_of_about_ten_lines():
    used = {name.strip() for example in EXAMPLES for name in shown(example).split(",")}
    assert used == set(OPS)
    assert len(EXAMPLES) == len(CLAIMS)
    assert all(len([line for line in example.splitlines() if line]) <= 13 for example in EXAMPLES)


def test_every_family_says_maths_floor_design_and_limits():
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) == 4
    for section in sections:
        for heading in ("The maths", "The floor", "The design", "When it is not worth using", "Example"):
            assert f"### {heading}" in section, section.splitlines()[0]
