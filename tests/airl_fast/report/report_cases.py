"""Run directories whose every figure is known, written without training anything."""

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import yaml

from airl_fast.evaluate.record import (
    Correlations,
    Record,
    RecordedPrompt,
    RecordedTrace,
    RewardRecord,
    record_path,
    write_record,
)
from airl_fast.evaluate.summary import Summary, write_summary
from airl_fast.measures.correlate import WelchT
from airl_fast.measures.localise import Localisation
from airl_fast.measures.passk import Estimate

STEPS = 40
PHASES = {"seconds/sample": 0.25, "seconds/policy": 0.5}
HOSTILE = "</script><img src=x onerror=\"document.title='run'\"><b>&amp; 🙂 é"
SIGNALS = ["reward", "logprob", "correct", "ended its turn"]
CORRELATION = [[1.0, 0.25, -0.5, None], [0.25, 1.0, 0.125, None], [-0.5, 0.125, 1.0, None], [None] * 4]
CONFIG = {"algorithm": "airl", "seed": 0, "advantage": {"gamma": 0.9, "min_std": 0.1}, "output_dir": "runs"}


def around(value: float) -> Estimate:
    return Estimate(value, max(value - 0.05, 0.0), min(value + 0.05, 1.0))


def found(value: float) -> Localisation:
    return Localisation(hit_at_1=around(value), hit_within_1=around(value + 0.02), mrr=around(value + 0.01), traces=7)


def write_run(root: Path, name: str = "one", *, prompts: int = 4, samples: int = 5, gamma: float = 0.9) -> Path:
    """A run of `prompts` prompts, `samples` samples of each and one perturbed demonstration."""
    run = root / name
    run.mkdir(parents=True)
    config = {**CONFIG, "advantage": {"gamma": gamma, "min_std": 0.1}, "output_dir": str(root)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metric_rows()))
    write_summary(run / "summary.json", summary(samples))
    record, traces = recorded(prompts, samples, gamma)
    write_record(record_path(run, "test"), record, traces)
    return run


def metric_rows() -> list[dict]:
    return [
        {
            "step": step,
            "discriminator/reward_gap": 1.0 / step,
            "discriminator/accuracy": 0.5 + 0.3 / step,
            "rollout/sample_pass_at_1": step / STEPS,
            "rollout/mean_length": 40.0 + step,
            "policy/entropy": 0.5 / step,
            "policy/mismatch_kl": 1e-13 * step,
            "tokens_per_s": 1000.0 + step,
            **PHASES,
        }
        for step in range(1, STEPS + 1)
    ]


def summary(samples: int) -> Summary:
    return Summary(
        pass_at_1={"start": around(0.5), "airl": around(0.9)},
        pass_at_5={"start": around(0.8), "airl": around(0.95)},
        rerank_pass_at_1={"reward": around(0.75), "random": around(0.5)},
        rerank_n=samples,
        localise_hit_at_1={"reward": around(0.7), "chance": around(0.2)},
        auroc_within_prompt=around(0.8),
        seconds=12.3,
        peak_rss_gib=0.75,
        seed=0,
        counts={"test_prompts": 4},
    )


def recorded(prompts: int, samples: int, gamma: float = 0.9) -> tuple[Record, list[RecordedTrace]]:
    """Sample 0 of prompt 0 spells HOSTILE. Samples with an odd number are correct."""
    rng = np.random.default_rng(0)
    traces = []
    for prompt in range(prompts):
        for number in range(samples):
            text = f"<think>\n{prompt} + {number} = {prompt + number}\n1 + 1 = 2\n</think>\n<answer>{number}</answer>"
            if prompt == number == 0:
                text = f"<think>\n{HOSTILE}\n0 + 0 = 0\n</think>\n<answer>0</answer>"
            traces.append(trace(prompt, number, text, rng, correct=number % 2 == 1))
        planted = f"<think>\n{prompt} + 1 = 9\n1 + 1 = 2\n</think>\n<answer>9</answer>"
        traces.append(replace(trace(prompt, 0, planted, rng, correct=False), kind="perturbed", truth=0))
    shown = [each for each in traces if each.kind == "sample"]
    reward = RewardRecord(
        scorer="min_step",
        localise="first_below",
        step_score="min",
        threshold=-0.5,
        gamma=gamma,
        eps=1e-6,
        min_std=0.1,
        rewards=[each.scores["reward"] for each in shown],
        correct=[each.correct for each in shown],
        rerank={
            name: {k: around(start + 0.01 * k) for k in (1, 2, samples)}
            for name, start in (("reward", 0.7), ("reward_mean", 0.65), ("random", 0.4), ("oracle", 0.9))
        },
        localisation={
            "reward": found(0.9),
            "logprob": found(0.6),
            "reward_argmin": found(0.8),
            "chance": found(0.2),
            "majority_position": found(0.3),
        },
        auroc_within_prompt=around(0.8),
        auroc_pooled=around(0.85),
        welch=WelchT(t=5.125, degrees=17.0, mean_correct=1, mean_wrong=0, prompts_correct=4, prompts_wrong=3),
        correlations=Correlations(names=SIGNALS, values=CORRELATION),
    )
    record = Record(
        split="test",
        samples=samples,
        prompts_total=prompts + 2,
        pass_at_k={
            "start": {k: around(0.4 + 0.02 * k) for k in (1, 2, samples)},
            "airl": {k: around(0.8 + 0.01 * k) for k in (1, 2, samples)},
        },
        end_token="<|end|>",
        reward=reward,
        prompts=[
            RecordedPrompt(id=f"case/{p}", prompt=f"What is <b>{p}</b> plus a number?", answer=str(p))
            for p in range(prompts)
        ],
    )
    return record, traces


def trace(prompt: int, number: int, text: str, rng: np.random.Generator, *, correct: bool) -> RecordedTrace:
    """Tokens are words, single marks and blanks; the emoji is two tokens that share it. Steps end at line breaks."""
    spans = [match.span() for match in re.finditer(r"\w+|[^\w\s]|\s", text)]
    spans = [span for start, end in spans for span in [(start, end)] * (1 + (text[start:end] == "🙂"))]
    spans.append((len(text), len(text)))
    last_lines = [i for i, (start, end) in enumerate(spans) if text[start:end] == "\n"]
    step_ends = [*last_lines[1:3], len(spans) - 1]
    reward = rng.normal(size=len(spans)).round(4).tolist()
    edges = [0, *(end + 1 for end in step_ends)]
    scores = [min(reward[a:b]) for a, b in pairwise(edges)]
    return RecordedTrace(
        prompt=prompt,
        sample=number,
        kind="sample",
        correct=correct,
        finished=True,
        text=text,
        spans=spans,
        reward=reward,
        logprob=(-rng.random(len(spans))).round(4).tolist(),
        step_ends=step_ends,
        step_scores=scores,
        predicted=int(np.argmin(scores)),
        truth=-1 if correct else number % 3,
        scores={"reward": min(scores), "reward_mean": float(np.mean(reward)), "logprob": -0.5},
    )
