"""What the ops must compute, in float64 where their inputs are: written from the papers' formulas, with autograd or
plain loops. Nothing here calls the library. Slow on purpose: sequences, pairs and tokens one at a time.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from .inputs import PolicyTokens, TokenHead, VocabularyHead

VARIANTS = ("ppo", "grpo", "dapo", "dr_grpo", "bnpo", "cispo", "gspo")  # of the policy loss


# ---- the discriminator's head ----------------------------------------------------------------------------------


def token_logits(head: TokenHead) -> Tensor:
    """z from the formula, differentiable, in the type of the head (float32 for bfloat16)."""
    compute = torch.promote_types(head.hidden.dtype, torch.float32)
    weight = head.weight.to(compute)
    hidden = head.hidden.to(compute)
    z = hidden @ weight if head.index is None else (hidden * weight[head.index]).sum(-1)
    if head.bias is not None:
        z = z + (head.bias if head.bias.numel() == 1 else head.bias[head.index]).to(compute)
    return z if head.offset is None else z + head.offset.to(compute)


def expected_rewards(head: TokenHead, kind: str, temperature: float, clip: float | None) -> Tensor:
    x = token_logits(head) / temperature
    reward = {"logit": x, "gail": -logsigmoid(-x), "logd": logsigmoid(x)}[kind]
    return reward if clip is None else reward.clamp(-clip, clip)


def expected_loss(head: TokenHead, loss: str, smoothing: float, margin: float) -> Tensor:
    """The loss from its definition; sequences and pairs one at a time. Rows of weight 0 are cut out before."""
    live = head.weights != 0
    z, w, y = token_logits(head)[live], head.weights[live], head.targets[live]
    if loss == "bce":
        return (w * binary_cross_entropy_with_logits(z, y * (1 - smoothing) + smoothing / 2, reduction="none")).sum()
    if loss == "wgan":
        return (w * z)[y == 0].sum() - (w * z)[y == 1].sum()
    spread = torch.zeros_like(head.weights).to(z.dtype).masked_scatter(live, z)
    terms = []
    for perturbed, expert in enumerate(head.pairs.tolist()):
        if expert < 0:
            continue
        scores = []
        for s in (expert, perturbed):
            part = slice(int(head.cu_seqlens[s]), int(head.cu_seqlens[s + 1]))
            total = head.weights[part].sum()
            scores.append((head.weights[part] * spread[part]).sum() / total if total > 0 else None)
        if None not in scores:
            terms.append(-logsigmoid(-(margin - (scores[0] - scores[1]))))
    return torch.stack(terms).mean() if terms else z.sum() * 0


# ---- the policy's head -----------------------------------------------------------------------------------------


def plain_log_softmax(
    inputs: VocabularyHead, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """log softmax [N, V]: products in the inputs' type, everything after in at least float32."""
    logits = inputs.hidden @ inputs.weight.T
    if inputs.bias is not None:
        logits = logits + inputs.bias
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def plain_logprob(inputs: VocabularyHead, **options: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) with autograd."""
    logp = plain_log_softmax(inputs, **options)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)
    return logp.gather(1, inputs.targets[:, None])[:, 0], entropy


# ---- the policy's loss -----------------------------------------------------------------------------------------


def plain_loss(logprobs: Tensor, case: PolicyTokens, variant: str, denominator: float | None = None) -> Tensor:
    """The loss by the papers' formulas, one token at a time, with autograd."""
    low, high = 1 - case.options.get("clip_low", 0.2), 1 + case.options.get("clip_high", 0.2)
    dual, beta = case.options.get("dual_clip"), case.options.get("beta", 0.0)
    bounds = case.cu_seqlens.tolist()
    sums, counts = [], []
    for first, last in itertools.pairwise(bounds):
        live = [t for t in range(first, last) if case.mask is None or case.mask[t]]
        sequence_ratio = None
        if variant == "gspo" and live:
            sequence_ratio = torch.stack([logprobs[t] - case.old_logprobs[t] for t in live]).mean().detach()
        losses = []
        for t in live:
            a = case.advantages[t]
            ratio = torch.exp(logprobs[t] - case.old_logprobs[t])
            if variant == "gspo":  # s_i(θ) as value, the token's own gradient (GSPO-token)
                ratio = torch.exp(sequence_ratio + logprobs[t] - logprobs[t].detach())
            if variant == "cispo":
                loss = -ratio.detach().clamp(low, high) * a * logprobs[t]
            else:
                gain = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
                if dual is not None and a < 0:
                    gain = torch.maximum(gain, dual * a)
                loss = -gain
            if case.is_ratio is not None:
                loss = loss * case.is_ratio[t]
            if case.ref_logprobs is not None:
                d = case.ref_logprobs[t] - logprobs[t]
                loss = loss + beta * (torch.exp(d) - d - 1)
            losses.append(loss)
        total = torch.stack(losses).sum() if losses else logprobs.sum() * 0
        if variant in ("grpo", "gspo"):
            total = total / max(len(live), 1)
        sums.append(total)
        counts.append(len(live))
    if denominator is None:
        denominator = len(sums) if variant in ("grpo", "gspo") else max(sum(counts), 1)
    return torch.stack(sums).sum() / denominator


# ---- returns and advantages ------------------------------------------------------------------------------------


def loop_returns(
    rewards: list[float], gamma: float, keep: list[bool] | None = None, dtype=torch.float64
) -> list[float]:
    """One sequence, one token at a time, backwards; dropped tokens are 0 and take no time."""
    out, value = [0.0] * len(rewards), torch.zeros((), dtype=dtype)
    for t in reversed(range(len(rewards))):
        if keep is None or keep[t]:
            value = torch.tensor(rewards[t], dtype=dtype) + torch.tensor(gamma, dtype=dtype) * value
            out[t] = float(value)
    return out


def loop_gae(r: list[float], v: list[float], gamma: float, lam: float, keep: list[bool] | None = None):
    """Schulman et al. (2016), eq. 16, over the kept tokens of one sequence."""
    kept = [t for t in range(len(r)) if keep is None or keep[t]]
    advantages, targets = [0.0] * len(r), [0.0] * len(r)
    for position, t in enumerate(kept):
        total = 0.0
        for ahead, s in enumerate(kept[position:]):
            following = v[kept[position + ahead + 1]] if position + ahead + 1 < len(kept) else 0.0
            total += (gamma * lam) ** ahead * (r[s] + gamma * following - v[s])
        advantages[t], targets[t] = total, total + v[t]
    return advantages, targets


def by_sequence(values: Tensor | None, lengths: list[int]) -> list[list | None]:
    if values is None:
        return [None] * len(lengths)
    return [part.tolist() for part in values.cpu().split(lengths)]


def expected_returns(rewards: Tensor, lengths: list[int], gamma: float, keep: Tensor | None = None) -> Tensor:
    """f64 [N] on the CPU, in Python floats: fast enough for a million tokens."""
    out = []
    for part, kept in zip(by_sequence(rewards.double(), lengths), by_sequence(keep, lengths), strict=True):
        values, value = [0.0] * len(part), 0.0
        for t in reversed(range(len(part))):
            if kept is None or kept[t]:
                value = part[t] + gamma * value
                values[t] = value
        out += values
    return torch.tensor(out, dtype=torch.float64)


def expected_gae(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), f64 [N] on the CPU. Quadratic in the length of a sequence."""
    parts = (by_sequence(t if t is None else t.detach(), lengths) for t in (rewards, values, keep))
    pairs = [loop_gae(r, v, gamma, lam, k) for r, v, k in zip(*parts, strict=True)]
    return tuple(torch.tensor([x for pair in pairs for x in pair[which]], dtype=torch.float64) for which in (0, 1))


def expected_advantages(
    rewards: Tensor, lengths: list[int], group: list[int], gamma: float, baseline: str, eps: float, min_std: float
) -> list[float]:
    """The definition, group by group in Python floats."""
    parts = by_sequence(rewards.double(), lengths)
    out = []
    for me, part in enumerate(parts):
        mates = [s for s in range(len(parts)) if group[s] == group[me] and parts[s]]
        if baseline == "leave_one_out":
            samples = [parts[s][-1] for s in mates if s != me]
            mean, scale = (sum(samples) / len(samples), 1.0) if samples else (0.0, 0.0)
        else:
            samples = [x for s in mates for x in (parts[s] if baseline == "all_tokens" else parts[s][-1:])]
            mean = math.fsum(samples) / max(len(samples), 1)
            variance = math.fsum((x - mean) ** 2 for x in samples) / max(len(samples) - 1, 1)
            alike = len(set(samples)) <= 1
            comparable = len(samples) > 1 and (min_std > 0 or not alike)
            scale = 1 / (max(math.sqrt(variance), min_std) + eps) if comparable else 0.0
        out += loop_returns([(x - mean) * scale for x in part], gamma)
    return out
