"""The comparison a run ends with: its policies on held-out prompts, and its reward on the start policy's samples."""

import resource
from collections.abc import Callable, Mapping
from pathlib import Path

from airl_fast.artifacts import POLICY, REWARD, load_policy, load_reward
from airl_fast.evaluate.policies import Samples, sample_policy
from airl_fast.evaluate.record import record_evaluation, record_path
from airl_fast.evaluate.reward import RewardReport, evaluate_reward
from airl_fast.evaluate.summary import LOCALISERS, RERANKERS, Summary
from airl_fast.judge.judge import judge_of
from airl_fast.lab import Lab, held_out
from airl_fast.measures.passk import Estimate, pass_at_k, pass_at_ks
from airl_fast.metrics import peak_rss_gib

Say = Callable[[str], None]
_KIB_IN_GIB = 2**20


def final_summary(lab: Lab, run: Path, split: str, seconds: Callable[[], float], say: Say) -> Summary:
    """Evaluate everything found in the run directory on `split`; what was not trained is left out."""
    measured = sample_policies(lab, run, split, say)
    return summarise(lab, run, measured, split, seconds, say)


def sample_policies(lab: Lab, run: Path, split: str, say: Say) -> dict[str, Samples]:
    """Samples of the start policy, the run's own and its baselines, by name, all on the same prompts."""
    settings, config = lab.config.evaluate, lab.config
    examples = held_out(lab, split, say)
    say(f"evaluate the start policy on {len(examples)} {split} prompts")
    measured = {"start": sample_policy(lab, lab.start, examples, settings.samples, "final-start")}
    found = {config.algorithm: run / POLICY}
    found |= {name: run / "baselines" / name / POLICY for name in settings.baselines}
    for name, directory in found.items():
        if directory.is_dir():
            say(f"evaluate {name}")
            lm = load_policy(directory, config.model, lab.start.device)
            measured[name] = sample_policy(lab, lm, examples, settings.samples, f"final-{name}")
    return measured


def summarise(
    lab: Lab, run: Path, measured: Mapping[str, Samples], split: str, seconds: Callable[[], float], say: Say
) -> Summary:
    """The run's Summary. The start policy's samples also test the reward, which has seen neither those prompts nor,
    when it scores, whether the samples are right. What there is to look at goes to `record_path`."""
    judge = report = None
    if (run / REWARD).is_dir():
        say("evaluate the reward on the start policy's samples")
        model, bridge = load_reward(run / REWARD, lab.config, lab.maker, lab.start, lab.start.device)
        judge = judge_of(lab, model, bridge)
        report = evaluate_reward(judge, measured["start"], lab.material.train)
    end_token = lab.maker.chat.name(lab.maker.chat.end_of_turn)
    record_evaluation(record_path(run, split), split, measured, end_token, judge, report)
    return _summary(lab, measured, report, split, seconds())


def pass_table(samples: Mapping[str, Samples], ks: tuple[int, ...]) -> dict[str, dict[int, Estimate]]:
    """pass@k of every policy, for the k that its number of samples allows."""
    return {name: pass_at_ks(each.correct, [k for k in ks if k <= each.per_prompt]) for name, each in samples.items()}


def _summary(
    lab: Lab, measured: Mapping[str, Samples], report: RewardReport | None, split: str, seconds: float
) -> Summary:
    policies = {name: each for name, each in measured.items() if name != "random"}
    table = pass_table(policies, (1, 5))
    control = measured.get("random")
    start = measured["start"]
    counts = {f"{split}_prompts": len(start.examples), "samples_per_prompt": start.per_prompt}
    parts = {}
    if report is not None:
        counts["traces_with_a_wrong_step"] = report.located
        parts = {
            "rerank_pass_at_1": {name: report.rerank[name] for name in RERANKERS},
            "rerank_other_pass_at_1": {k: v for k, v in report.rerank.items() if k not in RERANKERS},
            "localise_hit_at_1": {k: v.hit_at_1 for k, v in report.localise.items() if k in LOCALISERS},
            "localise_other_hit_at_1": {k: v.hit_at_1 for k, v in report.localise.items() if k not in LOCALISERS},
            "auroc_within_prompt": report.auroc_within_prompt,
            "rerank_n": start.per_prompt,
        }
    return Summary(
        pass_at_1={name: row[1] for name, row in table.items()},
        pass_at_5={name: row.get(5) for name, row in table.items()},
        control_random_reward=None if control is None else pass_at_k(control.correct, 1),
        seconds=seconds,
        peak_rss_gib=peak_rss_gib() + (_largest_child_gib() if lab.config.evaluate.baselines else 0.0),
        seed=lab.config.seed,
        counts=counts,
        **parts,
    )


def _largest_child_gib() -> float:
    """Peak memory of the largest baseline process; with one worker it ran beside this one."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / _KIB_IN_GIB
