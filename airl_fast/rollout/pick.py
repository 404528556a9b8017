"""One choice of a token from logits, and the log-probability that it was made with."""

import torch


def pick(
    logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row from f32 logits [R, V], looked up in the distribution function at `uniform`, f32 [R, 1] in
    0..1; returns ids int64 [R] and their log-probabilities f32 [R]. Temperature 0 is greedy and needs no `uniform`.

    Nucleus sampling (Holtzman et al. 2020): the fewest tokens whose probability reaches top_p, renormalised.
    """
    if temperature == 0:
        ids = logits.argmax(-1)
        return ids, torch.zeros_like(logits[:, 0])  # the distribution is a point
    logits = logits / temperature
    if top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # mass before this token already suffices
        logits = logits.scatter(-1, index, ordered.masked_fill(outside, float("-inf")))
    logprobs = logits.log_softmax(-1)
    # The factor keeps rounding from reaching the total, past which no token lies.
    below = logprobs.exp().cumsum(-1)
    ids = torch.searchsorted(below, uniform * (1 - 2**-22) * below[:, -1:], right=True)
    return ids[:, 0], logprobs.gather(-1, ids)[:, 0]
