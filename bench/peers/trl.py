"""TRL: the chunked log-probability behind GRPOTrainer's fused LM head, and its log-probability of given logits.

With the plain policy loss of `reference.py` after it this is what GRPOTrainer computes.
"""

import torch
from torch import Tensor

from bench.cases import Case, Run, Unsupported, by_autograd
from bench.inputs import LinearInputs, LogitInputs
from bench.peers._packages import installed, why_absent
from bench.reference import policy_loss
from bench.shapes import Shape

NAME = "trl"
VOCABULARY_CHUNK = 32768  # what its trainers pass (trl 1.16.0)


def version() -> str | None:
    return installed("trl")


def unavailable(device: torch.device) -> str | None:
    return why_absent("trl", "trl.kernels")


def prepare(case: Case, shape: Shape) -> Run:
    if case.family == "linear":
        return by_autograd(case, _linear(case))
    if case.family == "logits":
        return by_autograd(case, _from_logits(case))
    raise Unsupported("it has no counterpart.")


def _linear(case: Case):
    from trl.kernels import ChunkedLogProbFunction

    def logprobs(inputs: LinearInputs, outputs: tuple[str, ...]) -> tuple[Tensor | None, ...]:
        head = inputs.hidden, inputs.head, None, inputs.targets
        return ChunkedLogProbFunction.apply(*head, 1.0, VOCABULARY_CHUNK, None, 1.0, outputs)

    def with_entropy(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
        return logprobs(inputs, ("entropy",))[:2]

    if case.op == "linear_ppo_loss":
        return lambda inputs: policy_loss(logprobs(inputs, ())[0], inputs, inputs.denominator)
    return with_entropy if case.entropy else lambda inputs: logprobs(inputs, ())[0]


def _from_logits(case: Case):
    from trl.trainer.utils import selective_log_softmax

    if case.op == "ppo_loss":

        def loss(inputs: LogitInputs) -> Tensor:
            logprobs = selective_log_softmax(inputs.logits, inputs.targets).float()
            return policy_loss(logprobs, inputs, inputs.denominator)

        return loss
    return lambda inputs: selective_log_softmax(inputs.logits, inputs.targets)
