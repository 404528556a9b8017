"""What a reward is worth on traces it did not train on: reranking, correctness and the first wrong step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from airl_fast.batches import expert_traces, perturbed_traces
from airl_fast.bridge import Bridge
from airl_fast.data.task import LocatesErrors
from airl_fast.discriminator import Discriminator
from airl_fast.evaluate.correlate import within_prompt_auroc
from airl_fast.evaluate.localise import (
    TokenValues,
    calibrate_threshold,
    chance_hits,
    step_of_token,
    step_scores,
    summarise_hits,
    suspicion,
    trace_hits,
)
from airl_fast.evaluate.passk import Estimate
from airl_fast.evaluate.policies import Samples
from airl_fast.evaluate.rerank import answer_classes, rerank, trace_scores
from airl_fast.lab import Lab
from airl_fast.microbatch import over_tokens
from airl_fast.models.forward import token_logprobs
from airl_fast.pack import Boundaries, pack
from airl_fast.types import Example, Kind, Trace

_CALIBRATION_STEP = -1  # a step no training step has: its draws are its own
_RULES = ("largest_drop", "argmin", "first_below")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardReport:
    """rerank: pass@1 after picking one of the samples, by scorer. localise: Hit@1, by rule and baseline.

    located: how many traces with a known first wrong step stand behind it.
    """

    rerank: dict[str, Estimate]
    auroc_within_prompt: Estimate | None
    localise: dict[str, Estimate]
    located: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scored:
    """Traces with two numbers per token: the reward, and the start policy's log-probability."""

    traces: Sequence[Trace]
    reward: TokenValues
    logprob: TokenValues


def evaluate_reward(lab: Lab, model: Discriminator, bridge: Bridge, samples: Samples) -> RewardReport:
    """Score the samples of one policy; labels are read only after every score is known."""
    settings = lab.config.evaluate
    gamma, shape = lab.config.advantage.gamma, samples.correct.shape
    scored = _score(lab, model, bridge, samples.traces, samples.examples)
    scores = {
        name: trace_scores(scored.reward, scorer, gamma=gamma).reshape(shape)
        for name, scorer in {
            "reward": settings.scorer,
            **{f"reward_{s}": s for s in _other_scorers(settings.scorer)},
        }.items()
    }
    scores["logprob"] = trace_scores(scored.logprob, "mean").reshape(shape)
    task = lab.material.task
    answers = [task.canonical_answer(samples.examples[t.group], t.text) for t in samples.traces]
    rows = [answers[i : i + samples.per_prompt] for i in range(0, len(answers), samples.per_prompt)]
    picked = rerank(samples.correct, scores, classes=answer_classes(rows))
    auroc = within_prompt_auroc(_finite(scores["reward"].ravel()), samples.correct.ravel(), samples.prompts)
    localised, located = _localise(lab, model, bridge, samples, scored)
    return RewardReport(
        rerank=dict(picked.estimates), auroc_within_prompt=auroc.estimate, localise=localised, located=located
    )


def _localise(
    lab: Lab, model: Discriminator, bridge: Bridge, samples: Samples, scored: _Scored
) -> tuple[dict[str, Estimate], int]:
    """Hit@1 on the policy's own errors where the task knows them, else on perturbed demonstrations of the prompts."""
    settings, task = lab.config.evaluate, lab.material.task
    if isinstance(task, LocatesErrors):
        tokens, prompts = _wrong_tokens(lab, task, samples), samples.prompts
    else:
        with_expert = [example for example in samples.examples if example.expert is not None]
        scored = _perturbed(lab, with_expert, model, bridge)
        if scored is None:
            return {}, 0
        tokens, prompts = _changed_tokens(lab, scored), np.array([t.group for t in scored.traces])
    located = int((tokens >= 0).sum())
    if not located:
        return {}, 0
    truth = step_of_token(scored.reward, tokens)
    calibration = _perturbed(lab, lab.material.train[: settings.prompts], model, bridge)
    found: dict[str, Estimate] = {}
    for name in ("reward", "logprob"):
        steps = step_scores(getattr(scored, name), settings.step_score)
        threshold = None if calibration is None else _threshold(lab, calibration, name)
        for rule in _RULES:
            if rule == "first_below" and threshold is None:
                continue
            hits = trace_hits(steps, suspicion(steps, rule, threshold), truth)
            key = name if rule == settings.localise else f"{name}_{rule}"
            found[key] = summarise_hits(hits, prompts=prompts).hit_at_1
    chance = chance_hits(step_scores(scored.reward, settings.step_score), truth)
    found["chance"] = summarise_hits(chance, prompts=prompts).hit_at_1
    return found, located


def _threshold(lab: Lab, calibration: _Scored, name: str) -> float:
    known = step_of_token(calibration.reward, _changed_tokens(lab, calibration))
    return calibrate_threshold(step_scores(getattr(calibration, name), lab.config.evaluate.step_score), known)


def _perturbed(lab: Lab, examples: Sequence[Example], model: Discriminator, bridge: Bridge) -> _Scored | None:
    """Perturbed demonstrations, made even where training makes none; None when nothing in them can be changed."""
    settings = lab.config.discriminator
    copies = {"perturbed_per_expert": max(settings.perturbed_per_expert, 1)}
    willing = replace(lab, config=lab.config.model_copy(update={"discriminator": settings.model_copy(update=copies)}))
    made = perturbed_traces(willing, examples, expert_traces(lab, examples), Kind.EXPERT, _CALIBRATION_STEP)
    traces = [replace(trace, pair=None) for trace in made]  # their sources stay behind
    return _score(lab, model, bridge, traces, examples) if traces else None


def _changed_tokens(lab: Lab, scored: _Scored) -> np.ndarray:
    """int64 [S]: the token that holds the first perturbed character of each trace."""
    return np.array([_token_at(lab, trace, trace.first_changed + 1) for trace in scored.traces])


def _wrong_tokens(lab: Lab, task: LocatesErrors, samples: Samples) -> np.ndarray:
    """int64 [S]: the token that ends the first wrong step of each trace, -1 where every step is right."""
    tokens = []
    for trace in samples.traces:
        step = task.first_wrong_step(samples.examples[trace.group], trace.text)
        ends = lab.material.task.step_ends(trace.text)
        end = ends[step] if step is not None and step < len(ends) else len(trace.text)
        tokens.append(-1 if step is None else _token_at(lab, trace, end))
    return np.array(tokens)


def _token_at(lab: Lab, trace: Trace, end: int) -> int:
    """The token that holds the character before offset `end`: the last one when the text is shorter."""
    spans = lab.maker.chat.token_char_spans(trace.text, trace.tokens)
    return next((i for i, (_, stop) in enumerate(spans) if stop >= end), len(spans) - 1)


@torch.no_grad()
def _score(
    lab: Lab, model: Discriminator, bridge: Bridge, traces: Sequence[Trace], examples: Sequence[Example]
) -> _Scored:
    device = lab.policy.lm.device
    # Steps as the task cuts them, whatever granularity the reward was trained at.
    batch = pack(traces, device, lambda trace: Boundaries(steps=lab.maker.step_tokens(trace)))
    judged = bridge.pack(traces, examples)
    rewards = bridge.to_policy(model.logits(judged), traces, examples)
    logprobs = over_tokens(batch, lab.policy.budget, lambda part: token_logprobs(lab.start, part))
    offsets = np.concatenate([[0], np.cumsum(batch.loss_lengths)])
    ends = batch.step_ends.cpu().numpy()
    answers = np.zeros(batch.num_loss_tokens, dtype=bool)
    for start, trace in zip(offsets, traces, strict=False):
        inside = lab.maker.answer_tokens(trace)
        answers[start + inside.start : start + inside.stop] = True

    def values(tensor: torch.Tensor) -> TokenValues:
        return TokenValues(values=tensor.double().cpu().numpy(), offsets=offsets, step_ends=ends, answer_mask=answers)

    return _Scored(traces=traces, reward=values(rewards), logprob=values(logprobs))


def _finite(scores: np.ndarray) -> np.ndarray:
    """The same order without -inf (a trace that names no answer), which becomes less than every other score."""
    known = scores[np.isfinite(scores)]
    return np.where(np.isneginf(scores), known.min(initial=0.0) - 1.0, scores)


def _other_scorers(chosen: str) -> list[str]:
    return [scorer for scorer in ("answer", "mean", "min_step", "last") if scorer != chosen]
