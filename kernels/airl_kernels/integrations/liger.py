"""Liger-Kernel's GRPO losses by name and call signature, on our kernels: change the import, nothing else.

    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss           # before
    from airl_kernels.integrations.liger import LigerFusedLinearGRPOLoss     # after

Signatures, defaults, loss types and returned metrics are those of Liger-Kernel 0.8. Liger-Kernel is not needed. Where
a result can differ is listed in docs/integrations/liger.md.
"""

import warnings

import torch
from torch import Tensor

from ..linear_policy_loss import linear_ppo_loss
from ..logprob import linear_logprob
from ..selective import selective_log_softmax
from ._grpo_terms import Objective, TokenTerms, divisor, reduce_terms, token_terms

# Loss types whose token-level form `linear_ppo_loss` has: three products of the vocabulary's size instead of four.
FUSED = {"grpo": "grpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "dapo": "dapo"}


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """GRPO and its relatives from hidden states, without the logits. See `_grpo_terms.py` for the formulas.

    beta: weight of the k3 estimate of KL(π ‖ π_ref). use_ref_model: False takes the policy itself for reference.
    compiled: accepted and without meaning, nothing here is compiled. chunk_size: accepted and without meaning, rows
    of logits are chunked by free memory. The other arguments: as in Liger-Kernel.
    Raises ValueError for combinations that have no meaning.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `liger_fused_linear_grpo`."""
        return liger_fused_linear_grpo(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps,
            old_per_token_logps, ref_input, ref_weight, ref_bias, self.beta, self.epsilon_low, self.epsilon_high,
            self.loss_type, self.max_completion_length, self.importance_sampling_level, self.sapo_temperature_pos,
            self.sapo_temperature_neg, self.temperature, self.compiled, self.use_ref_model, self.chunk_size,
            vllm_is_ratio, self.delta, self.use_bias_correction_kl, self.vespo_k_pos, self.vespo_lambda_pos,
            self.vespo_k_neg, self.vespo_lambda_neg, num_items_in_batch,
        )  # fmt: skip


def liger_fused_linear_grpo(
    _input: Tensor,
    weight: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    bias: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    old_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    beta: float = 0.04,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    temperature: float = 1.0,
    compiled: bool = True,
    use_ref_model: bool = True,
    chunk_size: int = 1,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    num_items_in_batch: float | Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(loss [], [mean k3 where beta is not 0, share of clipped tokens]); gradients reach _input, weight and bias.

    _input, ref_input: [B, T, H]. weight, ref_weight: [V, H]. bias, ref_bias: [V]. selected_token_ids: int64 [B, T].
    attention_mask: [B, T], 0 where a token does not count; such rows reach no matrix product (but for "luspo").
    advantages: [B]. *_per_token_logps: [B, T]. vllm_is_ratio: [B, T], [B, 1] or [B], multiplies the surrogate.
    num_items_in_batch: loss tokens of the whole batch on all ranks ("dapo", "cispo", "vespo").
    One host synchronisation on CUDA, to count the rows: not for CUDA graphs.
    """
    objective = Objective(
        beta=beta, epsilon_low=epsilon_low, epsilon_high=epsilon_high, loss_type=loss_type,
        importance_sampling_level=importance_sampling_level, max_completion_length=max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, delta=delta,
        use_bias_correction_kl=use_bias_correction_kl, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    mask = attention_mask.bool()
    is_ratio = _sequence_or_token(vllm_is_ratio, mask.shape)
    filled = loss_type == "luspo"  # its mean runs over masked tokens too, in Liger as in TRL
    rows = torch.ones_like(mask).flatten().nonzero()[:, 0] if filled else mask.flatten().nonzero()[:, 0]
    targets = selected_token_ids.reshape(-1)[rows]
    hidden = _input.reshape(-1, _input.shape[-1])
    head = _like(hidden, weight, bias)
    ref = None
    if use_ref_model:
        ref = _reference(ref_per_token_logps, ref_input, ref_weight, ref_bias, rows, targets, mask, temperature)
    if _fused_form(objective, old_per_token_logps, ref, is_ratio):
        return _fused_loss(
            objective, hidden, head, targets, rows, mask, advantages, old_per_token_logps, ref, is_ratio, temperature,
            num_items_in_batch,
        )  # fmt: skip
    logprobs = linear_logprob(hidden, head[0], targets, bias=head[1], temperature=temperature, rows=rows)
    logprobs = _spread(logprobs, rows, mask.shape)
    terms = token_terms(objective, logprobs, old_per_token_logps, ref, advantages, mask, is_ratio, filled)
    return reduce_terms(objective, terms.loss, mask, num_items_in_batch), _metrics(terms, mask)


def triton_grpo_loss(
    logits: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    completion_ids: Tensor,
    advantages: Tensor,
    completion_mask: Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
) -> tuple[Tensor, list[Tensor]] | tuple[Tensor, Tensor | None, Tensor]:
    """The same losses from logits [B, T+1, V], whose last position is left out.

    inplace: the backward pass overwrites the logits by their gradient, unless they are a leaf. The other arguments:
    as in `liger_fused_linear_grpo`. max_completion_length None: T.
    Returns, with reduce, (loss [], metrics as there); without, (loss [B, T] with gradient, k3 [B, T] or None,
    clipped [B, T] as 0 or 1), 0 where completion_mask is.
    """
    objective = Objective(
        beta=beta, epsilon_low=eps_low, epsilon_high=eps_high, loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        max_completion_length=completion_ids.shape[1] if max_completion_length is None else max_completion_length,
        sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, delta=delta,
        use_bias_correction_kl=use_bias_correction_kl, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
        vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg,
    )  # fmt: skip
    if beta != 0.0 and ref_logp is None:
        raise ValueError(f"beta={beta} needs ref_logp.")
    mask = torch.ones_like(completion_ids, dtype=torch.bool) if completion_mask is None else completion_mask.bool()
    logprobs = _completion_logprobs(logits, completion_ids, temperature, inplace and not logits.is_leaf)
    is_ratio = _sequence_or_token(vllm_is_ratio, mask.shape)
    terms = token_terms(objective, logprobs, old_logp, ref_logp, advantages, mask, is_ratio)
    if reduce:
        return reduce_terms(objective, terms.loss, mask, num_items_in_batch), _metrics(terms, mask)
    return terms.loss, None if terms.kl is None else terms.kl.detach(), terms.clipped.float()


@torch.no_grad()
def fused_selective_log_softmax(
    logits: Tensor, input_ids: Tensor, temperature: float = 0.9, mask: Tensor | None = None
) -> Tensor:
    """log_softmax(logits / temperature) of the last T ids: float32 [B, T], without gradient, 0 where mask is 0.

    logits: [B, T+1, V], whose last position is left out. input_ids, mask: [B, at least T].
    """
    length = logits.shape[1] - 1
    logprobs = _completion_logprobs(logits, input_ids[:, -length:], temperature, False)
    return logprobs if mask is None else torch.where(mask[:, -length:].bool(), logprobs, 0.0)


# ---- parts -----------------------------------------------------------------------------------------------------


def _completion_logprobs(logits: Tensor, ids: Tensor, temperature: float, inplace: bool) -> Tensor:
    """[B, T] from logits [B, T+1, V]: all T+1 positions, since the slice without the last would be copied."""
    if logits.shape[:-1] != (ids.shape[0], ids.shape[1] + 1):
        raise ValueError(
            f"logits must have shape [B, T+1, V] for ids [B, T], got {list(logits.shape)} and {list(ids.shape)}."
        )
    targets = torch.nn.functional.pad(ids.long(), (0, 1))
    return selective_log_softmax(logits, targets, temperature=temperature, inplace_backward=inplace)[:, :-1]


def _fused_form(objective: Objective, old: Tensor | None, ref: Tensor | None, is_ratio: Tensor | None) -> bool:
    """Whether `linear_ppo_loss` has this objective.

    Without an old policy a sequence's ratio is 1 like its tokens', and so is its gradient shared out among them: the
    two levels are the same, unless the sampler's correction weighs the tokens of a sequence differently.
    """
    alike = old is None and (is_ratio is None or is_ratio.shape[1] == 1)
    return (
        objective.loss_type in FUSED
        and (objective.importance_sampling_level == "token" or alike)
        and (objective.beta == 0.0 or (ref is not None and not objective.use_bias_correction_kl))
        and (objective.delta is None or objective.delta > 1.0 + objective.epsilon_high)
        and objective.epsilon_low <= 1.0
    )


def _fused_loss(
    objective: Objective,
    hidden: Tensor,
    head: tuple[Tensor, Tensor | None],
    targets: Tensor,
    rows: Tensor,
    mask: Tensor,
    advantages: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    is_ratio: Tensor | None,
    temperature: float,
    num_items_in_batch: float | Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    def pick(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.expand_as(mask).reshape(-1)[rows]

    ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    loss, stats = linear_ppo_loss(
        hidden,
        head[0],
        targets,
        pick(old),
        pick(advantages.float().unsqueeze(1)),
        cu_seqlens=ends,
        clip_low=objective.epsilon_low,
        clip_high=objective.epsilon_high,
        variant=FUSED[objective.loss_type],
        dual_clip=objective.delta,
        ref_logprobs=pick(ref) if objective.beta else None,
        beta=objective.beta,
        is_ratio=pick(is_ratio),
        denominator=None if objective.loss_type == "grpo" else divisor(objective, mask, num_items_in_batch),
        bias=head[1],
        temperature=temperature,
        rows=rows,
        entropy=False,
    )
    clipped = stats.clip_low + stats.clip_high
    return loss, [stats.reference_kl, clipped] if objective.beta else [clipped]


def _reference(
    given: Tensor | None,
    ref_input: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    rows: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float,
) -> Tensor:
    """Log-probabilities of the reference [B, T], as given or from its hidden states."""
    if given is not None:
        if ref_input is not None:
            warnings.warn("ref_per_token_logps and ref_input are both given. Using ref_per_token_logps.", stacklevel=3)
        return given
    if ref_input is None or ref_weight is None:
        raise ValueError("use_ref_model needs ref_per_token_logps, or ref_input with ref_weight.")
    with torch.no_grad():
        hidden = ref_input.reshape(-1, ref_input.shape[-1])
        weight, bias = _like(hidden, ref_weight, ref_bias)
        logprobs = linear_logprob(hidden, weight, targets, bias=bias, temperature=temperature, rows=rows)
    return _spread(logprobs, rows, mask.shape)


def _like(hidden: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """In the dtype of the hidden states; inside autocast, which the operations follow, as they are."""
    if torch.is_autocast_enabled(hidden.device.type):
        return tensors
    return tuple(None if tensor is None else tensor.to(hidden.dtype) for tensor in tensors)


def _spread(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """values [M] put at `rows` of zeros of `shape`, with gradient."""
    return values.new_zeros(shape.numel()).index_put((rows,), values).view(shape)


def _sequence_or_token(ratio: Tensor | None, shape: torch.Size) -> Tensor | None:
    """[B] as [B, 1]; [B, 1] and [B, T] as they are."""
    if ratio is None:
        return None
    column = ratio.unsqueeze(1) if ratio.dim() == 1 else ratio
    if column.dim() != 2 or column.shape[0] != shape[0] or column.shape[1] not in (1, shape[1]):
        raise ValueError(
            f"vllm_is_ratio must have shape [{shape[0]}], [{shape[0]}, 1] or {list(shape)}, got {list(ratio.shape)}."
        )
    return column


def _metrics(terms: TokenTerms, mask: Tensor) -> list[Tensor]:
    count = mask.sum().clamp(min=1)
    clipped = terms.clipped.sum() / count
    if terms.kl is None:
        return [clipped]
    return [torch.where(mask, terms.kl.detach(), 0.0).sum() / count, clipped]
