"""The log-probability and policy-loss ops for the table of `operations.py`."""

import torch
from airl_kernels import linear_logprob, linear_ppo_loss, ppo_loss, selective_log_softmax
from airl_kernels.testing import (
    VARIANTS,
    PolicyTokens,
    VocabularyHead,
    make_policy_tokens,
    make_vocabulary_head,
    normal,
    plain_logprob,
    plain_loss,
)
from torch import Tensor

from tests.gpu.device import DEVICE, pick
from tests.gpu.operation import Operation, Tensors

_LENGTHS = (37, 1, 0, 50, 41)  # of completions; row 3, the prompt's last, starts several
_ROWS = [3, *range(5, 41), 3, *range(50, 99), 3, 3, *range(110, 150)]


def _projection(t: Tensors) -> VocabularyHead:
    return VocabularyHead(t["hidden"], t["weight"], t.get("bias"), t["targets"])


def logprob_operations() -> list[Operation]:
    operations = []
    vocabularies = {17: {}, 50257: {"softcap": 5.0, "logit_scale": 0.8}, 151936: {"temperature": 0.7}}
    for vocab, options in vocabularies.items():
        for frozen in (True, False):
            rows, width = pick(133, 9), pick(96 if vocab == 17 else 256, 16)

            def make(dtype: torch.dtype, seed: int, vocab=vocab, rows=rows, width=width) -> Tensors:
                head = make_vocabulary_head(rows, width, vocab, dtype=dtype, device=DEVICE, bias=True, seed=seed)
                return {"hidden": head.hidden, "weight": head.weight, "bias": head.bias, "targets": head.targets,
                        "upstream": normal(rows, seed + 1, DEVICE)}  # fmt: skip

            leaves = ("hidden",) if frozen else ("hidden", "weight", "bias")
            kind = f"V={vocab} {'frozen' if frozen else 'trainable'}"
            operations.append(
                Operation(
                    name=f"linear_logprob {kind}",
                    make=make,
                    leaves=leaves,
                    terms=1.0,
                    ours=lambda t, o=options: linear_logprob(
                        t["hidden"], t["weight"], t["targets"], bias=t["bias"], entropy=True, chunk_rows=64, **o
                    ),
                    plain=lambda t, o=options: plain_logprob(_projection(t), **o),
                )
            )
    for vocab, inplace in ((50257, False), (151936, True), (17, True)):

        def logits(dtype: torch.dtype, seed: int, vocab=vocab) -> Tensors:
            rows = pick(133, 5)
            values = normal(rows * vocab, seed, DEVICE).view(rows, vocab) * 3
            targets = (torch.arange(rows, device=DEVICE) * 7919) % vocab
            return {"logits": values.to(dtype), "targets": targets, "upstream": normal(rows, seed + 1, DEVICE)}

        operations.append(
            Operation(
                name=f"selective_log_softmax V={vocab}{' in place' if inplace else ''}",
                make=logits,
                leaves=("logits",),
                terms=1.0,
                ours=lambda t, i=inplace: (
                    selective_log_softmax(t["logits"] * 2, t["targets"], temperature=0.7, inplace_backward=i),
                ),
                plain=lambda t: (_selective(t["logits"] * 2, t["targets"]),),
            )
        )
    return operations


def _selective(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(wide / 0.7, -1).gather(1, targets[:, None])[:, 0]


def policy_operations() -> list[Operation]:
    operations = []
    rows, vocab = max(_ROWS) + 1, pick(3001, 130)

    def make(dtype: torch.dtype, seed: int) -> Tensors:
        head = make_vocabulary_head(rows, pick(256, 16), vocab, dtype=dtype, device=DEVICE, bias=True, seed=seed)
        index = torch.tensor(_ROWS, device=DEVICE)
        targets = head.targets[: len(_ROWS)]
        with torch.no_grad():
            picked = VocabularyHead(head.hidden[index].double(), head.weight.double(), head.bias.double(), targets)
            logprobs = plain_logprob(picked)[0]
        # Ratios far from the bounds, so that rounding moves no token across one.
        shift = torch.tensor([0.0, 0.5, -0.5, 1.5, 0.1]).repeat(len(_ROWS))[: len(_ROWS)].double()
        case = make_policy_tokens(logprobs, _LENGTHS, seed=seed)
        case.old_logprobs.copy_(logprobs.cpu() - shift)
        columns = {k: v for k, v in case.arguments(torch.float32, DEVICE).items() if isinstance(v, Tensor)}
        tensors = {"hidden": head.hidden, "weight": head.weight, "bias": head.bias, "targets": targets, "rows": index}
        upstream = torch.full((1,), 0.7, device=DEVICE)
        return {**tensors, **columns, "logprobs": logprobs.float(), "upstream": upstream}

    for variant in VARIANTS:
        options = {"variant": variant, "beta": 0.05, "denominator": 97.0 if variant == "dr_grpo" else None}
        options |= {} if variant == "cispo" else {"dual_clip": 3.0}
        operations.append(
            Operation(
                name=f"ppo_loss {variant}",
                make=make,
                leaves=("logprobs",),
                float32_only=True,
                terms=1.0,
                ours=lambda t, o=options: ppo_loss(t["logprobs"], *_tokens(t), **_rest(t), **o)[:1],
                plain=lambda t, v=variant, o=options: (_by_formula(t["logprobs"], t, v, o),),
            )
        )
        for mode in (
            "trainable",
            "frozen",
            "trainable compact",
            "frozen compact",
            "trainable fp32",
            "frozen first pass",
        ):
            if len(mode.split()) > 1 and variant not in ("ppo", "gspo"):
                continue
            operations.append(
                Operation(
                    name=f"linear_ppo_loss {variant} {mode}",
                    make=make,
                    syncs="compact" in mode and not (variant == "gspo" and mode.startswith("frozen")),
                    terms=1.0,
                    leaves=("hidden", "weight", "bias") if "trainable" in mode else ("hidden",),
                    ours=lambda t, o=options, m=mode: _fused(
                        _first_pass(t) if "first" in m else t, compact="compact" in m, fp32_logits="fp32" in m, **o
                    ),
                    plain=lambda t, v=variant, o=options, m=mode: _composed(t, v, o, "first" in m),
                )
            )
    return operations


def _tokens(t: Tensors) -> tuple[Tensor, ...]:
    return t["old_logprobs"], t["advantages"], t["loss_mask"], t["cu_seqlens"]


def _rest(t: Tensors) -> Tensors:
    return {"ref_logprobs": t["ref_logprobs"], "is_ratio": t["is_ratio"]}


def _fused(t: Tensors, **options: object) -> tuple[Tensor, ...]:
    loss, stats = linear_ppo_loss(
        t["hidden"], t["weight"], t["targets"], *_tokens(t), **_rest(t), bias=t["bias"], rows=t["rows"], chunk_rows=50,
        **options,
    )  # fmt: skip
    return loss, stats.token_logprobs, stats.token_entropy


def _first_pass(t: Tensors) -> Tensors:
    """Nothing known of the old policy."""
    return {**t, "old_logprobs": None}


def _composed(t: Tensors, variant: str, options: dict, first: bool) -> tuple[Tensor, ...]:
    picked = VocabularyHead(t["hidden"][t["rows"]], t["weight"], t["bias"], t["targets"])
    logprobs, entropy = plain_logprob(picked)
    t = {**t, "old_logprobs": logprobs.detach()} if first else t
    loss = _by_formula(logprobs, t, variant, options)
    return loss, *(torch.where(t["loss_mask"], x, 0.0) for x in (logprobs, entropy))


def _by_formula(logprobs: Tensor, t: Tensors, variant: str, options: dict) -> Tensor:
    columns = [t[k].detach().cpu() for k in ("old_logprobs", "advantages", "loss_mask", "ref_logprobs", "is_ratio")]
    case = PolicyTokens(*columns, _LENGTHS, {k: options.get(k) for k in ("dual_clip", "beta")})
    return plain_loss(logprobs.cpu(), case, variant, options["denominator"]).to(logprobs.device)
