"""One command trains, evaluates and leaves what it says; every option of the method runs and learns something."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from airl_fast.artifacts import POLICY, REWARD, START
from airl_fast.checkpoint import load_tree
from airl_fast.config import Config
from airl_fast.data.task import make_task
from airl_fast.evaluate.summary import read_summary, render_table
from airl_fast.overrides import load_config, read_yaml
from airl_fast.rundir import read_rollouts
from tests.airl_fast.run_cases import DATA, EASY, metrics, small_run, train, weights

PHASES = {"sample", "perturb", "pack", "discriminator", "score", "policy", "sync"}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------------------------------- one run of tiny


def test_the_run_directory_holds_what_is_documented() -> None:
    run = small_run()
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.yaml", "env.json", "metrics.jsonl", "summary.json", "plots.png", "summary.png",
        "start", "final", "baselines", "rollouts", "eval", "checkpoints", "logs",
    }  # fmt: skip
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_2", "step_4"]
    for picture in ("plots.png", "summary.png"):
        assert (run / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = load_config(Config, read_yaml(run / "config.yaml"), [], origin="config.yaml")
    assert (config.steps, config.rollout.samples_per_prompt, config.evaluate.baselines) == (4, 4, ("sft", "grpo"))
    (start,) = json.loads((run / "env.json").read_text())["starts"]
    assert start["torch_threads"] == 1 and start["versions"]["transformers"]


def test_every_step_is_measured() -> None:
    lines = metrics(small_run())
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert {key.removeprefix("seconds/") for key in line if key.startswith("seconds/")} == PHASES | {"step"}
        assert 0 < sum(line[f"seconds/{phase}"] for phase in PHASES) <= line["seconds/step"]
        # The sampler's log-probabilities, one token at a time, are those of the trainer, all at once.
        assert abs(line["policy/mismatch_kl"]) < 1e-9 and abs(line["policy/mismatch_max_ratio"] - 1) < 1e-3
        assert 0 < line["policy/entropy"] < math.log(384)
        assert 0 < line["discriminator/accuracy"] < 1 and math.isfinite(line["discriminator/reward_gap"])
        assert line["policy/grad_norm"] > 0 and line["discriminator/grad_norm"] > 0
        assert line["policy/kl_to_start"] is None  # not measured without the KL term
        assert line["tokens_per_s"] > 0 and 0.1 < line["peak_rss_gib"] < 16
    assert lines[-1]["eta_s"] == 0 < lines[0]["eta_s"]
    gaps = [line["discriminator/reward_gap"] for line in lines]
    assert len(set(gaps)) == 4  # a reward that moves


def test_metrics_agree_with_the_rollouts_that_were_kept() -> None:
    run = small_run()
    task = make_task("arithmetic", min_ops=1, max_ops=2, train_size=40)
    gold = {example.prompt: example for example in task.load("train")}
    tokenizer = AutoTokenizer.from_pretrained(run / START)
    for line in metrics(run):
        traces = list(read_rollouts(run / "rollouts" / f"step_{line['step']:06d}.jsonl.gz"))
        assert len(traces) == 16 and [trace["group"] for trace in traces] == [g for g in range(4) for _ in range(4)]
        assert line["rollout/sample_pass_at_1"] == sum(trace["correct"] for trace in traces) / 16
        assert line["rollout/mean_length"] == sum(len(trace["tokens"]) for trace in traces) / 16
        assert line["rollout/truncated"] == sum(not trace["finished"] for trace in traces) / 16
        for trace in traces:
            assert len(trace["logprobs"]) == len(trace["tokens"]) <= 40
            assert trace["finished"] == (trace["tokens"][-1] == tokenizer.eos_token_id)
            prompt = tokenizer.decode(trace["prompt_tokens"]).removeprefix("<|user|>").removesuffix("<|assistant|>")
            assert trace["correct"] == (trace["finished"] and task.verify(gold[prompt], trace["text"]))


def test_tensorboard_shows_the_same_numbers() -> None:
    run = small_run()
    board = EventAccumulator(str(run / "logs"))
    board.Reload()
    lines = metrics(run)
    for key in ("discriminator/reward_gap", "policy/entropy", "rollout/sample_pass_at_1"):
        events = board.Scalars(key)
        assert [event.step for event in events] == [1, 2, 3, 4]
        assert [event.value for event in events] == pytest.approx([line[key] for line in lines], rel=1e-6)


def test_the_summary_has_every_figure_and_they_agree() -> None:
    run = small_run()
    document = json.loads((run / "summary.json").read_text())
    assert set(document["pass_at_1"]) == set(document["pass_at_5"]) == {"start", "sft", "grpo", "airl"}
    assert set(document["rerank_pass_at_1"]) == {"reward", "random", "majority", "logprob"}
    assert set(document["localise_hit_at_1"]) == {"reward", "chance", "logprob"}
    for group in ("pass_at_1", "pass_at_5", "rerank_pass_at_1", "localise_hit_at_1"):
        for name, value in document[group].items():
            low, high = document["intervals"][group][name]
            assert 0 <= low <= value + 1e-9 and value - 1e-9 <= high <= 1
    assert document["seed"] == 0 and document["rerank_n"] == 5
    assert 1 < document["seconds"] < 3600 and 0.2 < document["peak_rss_gib"] < 16
    assert document["auroc_within_prompt"] is None or 0 <= document["auroc_within_prompt"] <= 1
    # A random pick from the start policy's samples is right as often as the start policy is.
    assert document["rerank_pass_at_1"]["random"] == pytest.approx(document["pass_at_1"]["start"])
    oracle = document["rerank_other_pass_at_1"]["oracle"]
    assert all(value <= oracle + 1e-9 for value in document["rerank_pass_at_1"].values())
    assert document["pass_at_5"]["start"] == pytest.approx(oracle)  # five samples: the best of them all
    assert document["counts"]["test_prompts"] == 8 and document["counts"]["samples_per_prompt"] == 5
    printed = (run.parent / "stdout.txt").read_text()
    assert render_table(read_summary(run / "summary.json")) in printed and str(run) in printed


def test_the_final_policies_load_and_each_has_learned_from_the_same_start() -> None:
    run = small_run()
    start = weights(run / START)
    finals = [weights(run / POLICY), *(weights(run / "baselines" / name / POLICY) for name in ("sft", "grpo"))]
    for name in ("sft", "grpo"):
        assert same(weights(run / "baselines" / name / START), start)
        assert yaml.safe_load((run / "baselines" / name / "config.yaml").read_text())["algorithm"] == name
    for i, one in enumerate(finals):
        assert not any(same(one, other) for other in [start, *finals[:i]])
    model = AutoModelForCausalLM.from_pretrained(run / POLICY)
    saved = load_tree(run / "checkpoints" / "step_4" / "policy")
    assert same({key: value for key, value in model.state_dict().items() if key in saved}, saved)
    tokenizer = AutoTokenizer.from_pretrained(run / POLICY)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "start 4; lose 3?"}], return_tensors="pt")
    assert torch.isfinite(model(**prompt).logits).all()


def test_the_reward_model_is_the_one_that_was_trained() -> None:
    run = small_run()
    saved = load_tree(run / "checkpoints" / "step_4" / "discriminator")
    final = weights(run / REWARD)
    assert {key: json.loads((run / REWARD / "head.json").read_text())[key] for key in ("head", "lipschitz")} == {
        "head": "action", "lipschitz": None,
    }  # fmt: skip
    for key, tensor in saved.items():
        part, _, name = key.partition(".")
        assert torch.equal(final[f"{'head' if part == 'head' else 'model'}.safetensors/{name}"], tensor), key


# ---------------------------------------------------------------------------------------------- every option


def fast(tmp_path: Path, *words: str) -> tuple[str, ...]:
    """Two steps from the small run's start policy, without evaluation."""
    return (
        *EASY, f"model={{path: {small_run() / START}, build: null}}", "warm_start.updates=0", "steps=2",
        "evaluate.final=false", "evaluate.baselines=[]", "tensorboard=false", "discriminator.warmup_steps=1",
        f"output_dir={tmp_path}", *words, "--run-name", "run",
    )  # fmt: skip


OPTIONS = {
    "sft": ("algorithm=sft",),
    "grpo": ("algorithm=grpo", "grpo={strict_format: 0.3, soft_format: 0.2, xml_count: 0.1, integer: 0.1}"),
    "grpo kl": ("algorithm=grpo", "policy.kl_coef=0.1", "policy.epochs=2", "rollout.top_p=0.9"),
    "bce linear": ("discriminator.head=linear", "discriminator.label_smoothing=0", "discriminator.neg_weight=2"),
    "bce logprob": ("discriminator.head=logprob", "discriminator.updates_per_step=2"),
    "bce action rank": ("discriminator.action_rank=4", "rollout.temperature=0.8"),
    "wgan linear penalty": (
        "discriminator.head=linear", "discriminator.loss=wgan", "discriminator.lipschitz=gradient_penalty",
    ),
    "wgan action penalty": ("discriminator.loss=wgan", "discriminator.lipschitz=gradient_penalty"),
    "wgan rank penalty": (
        "discriminator.action_rank=4", "discriminator.loss=wgan", "discriminator.lipschitz=gradient_penalty",
    ),
    "wgan linear spectral": (
        "discriminator.head=linear", "discriminator.loss=wgan", "discriminator.lipschitz=spectral_norm",
    ),
    "wgan action spectral": ("discriminator.loss=wgan", "discriminator.lipschitz=spectral_norm"),
    "pairwise": ("discriminator.loss=pairwise", "discriminator.margin=0.5"),
    "interval": ("reward.granularity=interval",),
    "interval of tokens": ("reward.granularity=interval", "reward.interval=3", "discriminator.head=linear"),
    "sparse": ("reward.granularity=sparse", "advantage.mode=average"),
    "multiscale": ("reward.granularity=multiscale", "reward.scale_weights=[1,0.5,2]"),
    "replay": ("discriminator.replay_size=8", "discriminator.replay_per_prompt=2"),
    "correct are positive": ("discriminator.positives=expert_and_correct", "reward.outcome_weight=1"),
    "no perturbations": ("discriminator.perturbed_per_expert=0",),
    "perturbed samples": ("discriminator.perturbed_per_prompt=2", "discriminator.propagate=1"),
    "kl": ("policy.kl_coef=0.2", "policy.epochs=2"),
    "no expert in the policy loss": ("policy.expert_in_policy=none", "advantage.mode=leave_one_out"),
    "balanced expert": ("policy.expert_in_policy=balanced", "advantage.normalise=true"),
    "gail": ("reward.kind=gail", "reward.clip=2", "reward.score_before_update=true"),
    "logd": ("reward.kind=logd", "reward.temperature=2", "advantage.position_baseline=true"),
    "one sample": ("rollout.samples_per_prompt=1",),
    "accumulation": ("policy.optim.tokens_per_micro_batch=100", "discriminator.optim.tokens_per_micro_batch=100"),
    "schedules": ("policy.optim.schedule=linear", "discriminator.optim.schedule=cosine"),
    "bfloat16": ("model.dtype=bfloat16",),
    "overlap": ("discriminator.overlap=true",),
    "prompts not shared": ("model.share_prompts=false", "model.attention=sdpa"),
    "importance of tokens": ("policy.importance_sampling=token", "policy.importance_ceiling=1.5"),
    "importance of sequences": ("policy.importance_sampling=sequence", "policy.epochs=2"),
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(option: str, tmp_path: Path) -> None:
    train(*fast(tmp_path, *OPTIONS[option]))
    run = tmp_path / "run"
    first, second = metrics(run)
    assert math.isfinite(first["policy/loss"]) and second["policy/grad_norm"] > 0
    assert not same(weights(run / POLICY), weights(run / START))
    if "algorithm=sft" in OPTIONS[option] or "algorithm=grpo" in OPTIONS[option]:
        assert not (run / REWARD).exists()
        return
    assert math.isfinite(second["discriminator/loss"]) and second["discriminator/grad_norm"] > 0
    trained = {key.removeprefix("model.safetensors/"): value for key, value in weights(run / REWARD).items()}
    start = weights(run / START)
    moved = [not torch.equal(trained[k.removeprefix("model.safetensors/model.")], start[k]) for k in start]
    assert any(moved)
    if "kl" in option:
        assert second["policy/kl_to_start"] > 0


def test_a_frozen_discriminator_is_the_control(tmp_path: Path) -> None:
    train(*fast(tmp_path, "discriminator.updates_per_step=0", "discriminator.warmup_steps=0"))
    start, run = weights(tmp_path / "run" / START), tmp_path / "run"
    backbone = {key: value for key, value in weights(run / REWARD).items() if key.startswith("model.safetensors")}
    for key, tensor in backbone.items():
        assert torch.equal(start[key.replace("model.safetensors/", "model.safetensors/model.")], tensor)
    assert not any(key.startswith("discriminator/") for line in metrics(run) for key in line)
    assert not same(weights(run / POLICY), start)


def test_a_correct_answer_is_rewarded_by_grpo_alone_when_samples_differ(tmp_path: Path) -> None:
    """Prompts whose samples are all wrong, or all right, teach nothing: their steps leave the weights as they are."""
    train(*fast(tmp_path, "algorithm=grpo", "steps=1", "rollout.max_new_tokens=3", "policy.optim.weight_decay=0"))
    run = tmp_path / "run"
    (line,) = metrics(run)
    assert line["rollout/sample_pass_at_1"] == 0 and line["rollout/truncated"] == 1
    assert line["policy/grad_norm"] == 0
    assert same(weights(run / POLICY), weights(run / START))


def test_equal_commands_give_equal_runs(tmp_path: Path) -> None:
    for root in ("one", "two"):
        train(*fast(tmp_path / root))
    one, two = (tmp_path / root / "run" for root in ("one", "two"))
    assert same(weights(one / POLICY), weights(two / POLICY)) and same(weights(one / REWARD), weights(two / REWARD))
    train(*fast(tmp_path / "three", "seed=1"))
    assert not same(weights(one / POLICY), weights(tmp_path / "three" / "run" / POLICY))


# ---------------------------------------------------------------------------------------------- own models and data


def user_file(folder: Path) -> Path:
    """Thirty rows of a user's own, with demonstrations written three ways."""
    rows = []
    for i in range(30):
        steps = f"{i} apples and {i + 3} pears.\n{i} + {i + 3} = {2 * i + 3} pieces of fruit."
        whole = f"<think>\n{steps}\n</think>\n<answer>{2 * i + 3}</answer>"
        prompt = f"There are {i} apples and {i + 3} pears. How many pieces of fruit?"
        rows.append(
            {"prompt": prompt, "expert": whole if i % 2 else steps, "answer": str(2 * i + 3) if i % 3 else 2 * i + 3}
        )
    rows[7]["expert"] = None
    file = folder / "fruit.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_models(folder: Path, data: Path) -> None:
    """qwen2 and llama, each with a tokenizer of its own size, and a second qwen2 that shares the first's."""
    from airl_fast.cli import main

    task = ["data.task=jsonl", f"data.path={data}", "data.options={warmstart_fraction: 0.5}", "model.path=null"]
    for name, architecture, vocabulary, hidden in (
        ("qwen2", "qwen2", 400, 32), ("qwen2-small", "qwen2", 400, 16), ("llama", "llama", 320, 16),
    ):  # fmt: skip
        shape = (
            f"model.build={{architecture: {architecture}, vocab_size: {vocabulary}, hidden_size: {hidden}, layers: 2, "
            "heads: 2, kv_heads: 1, intermediate_size: 32, max_length: 256}"
        )
        assert main(["make-model", "tiny", *task, shape, "-o", str(folder / name)]) == 0


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Own data file, and a folder of own model directories."""
    folder = tmp_path_factory.mktemp("own")
    data = user_file(folder)
    make_models(folder, data)
    return data, folder


@pytest.mark.parametrize(
    ("policy", "discriminator", "head"),
    [
        ("qwen2", "policy", "action"),
        ("llama", "policy", "linear"),
        ("qwen2", "qwen2-small", "logprob"),
        ("qwen2", "llama", "action"),
        ("llama", "qwen2", "linear"),
    ],
)
def test_own_models_train_on_own_data(
    own: tuple[Path, Path], policy: str, discriminator: str, head: str, tmp_path: Path
) -> None:
    data, models = own
    path = discriminator if discriminator == "policy" else models / discriminator
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"data: {{task: jsonl, path: {data}, options: {{test_fraction: 0.3}}}}\nmodel: {{path: {models / policy}}}\n"
        f"discriminator: {{path: '{path}', head: {head}, optim: {{learning_rate: 1e-3}}}}\n"
        "policy: {optim: {learning_rate: 1e-3}}\nsteps: 2\nthreads: 1\ndevice: cpu\n"
        "rollout: {prompts_per_step: 3, samples_per_prompt: 3, max_new_tokens: 24}\n"
        f"evaluate: {{prompts: 4, samples: 2}}\noutput_dir: {tmp_path / 'runs'}\n"
    )
    train("--run-name", "mine", config=config)
    run = tmp_path / "runs" / "mine"
    assert not same(weights(run / POLICY), weights(models / policy))
    for line in metrics(run):
        assert abs(line["policy/mismatch_kl"]) < 1e-9
        assert math.isfinite(line["discriminator/reward_gap"]) and line["policy/grad_norm"] > 0
    summary = read_summary(run / "summary.json")
    # Random weights do not answer; what was measured is said, what was not run is absent.
    assert summary.pass_at_1["start"].value == 0 and summary.pass_at_1["grpo"] is None
    assert summary.auroc_within_prompt is None
    assert summary.localise_hit_at_1["chance"].value > 0 and summary.counts["traces_with_a_wrong_step"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(run / POLICY)
    assert loaded.config.model_type == policy
    assert not (models / policy / "final").exists()  # the user's directories are only read


def test_gsm8k_goes_through_every_stage(tmp_path: Path) -> None:
    data = DATA / "gsm8k"
    if not (data / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K at {data}; set AIRL_DATA to the folder with the published data")
    train(
        f"data.path={data}", "device=cpu", "steps=2", "warm_start.updates=3", "warm_start.batch_size=2",
        "warm_start.examples=60", "data.num_experts=12", "data.num_dev=4", "model.build.hidden_size=32",
        "model.build.layers=2", "model.build.intermediate_size=64", "rollout.prompts_per_step=2",
        "rollout.samples_per_prompt=2", "rollout.max_new_tokens=24", "discriminator.warmup_steps=2",
        "discriminator.warmup_prompts=4", "evaluate={prompts: 4, samples: 2, baselines: []}",
        f"output_dir={tmp_path}", "--run-name", "g", config="gsm8k-tiny",
    )  # fmt: skip
    run = tmp_path / "g"
    assert [line["step"] for line in metrics(run)] == [1, 2]
    summary = read_summary(run / "summary.json")
    assert summary.pass_at_1["airl"].value == 0  # what a model without training knows
    assert summary.counts["test_prompts"] == 4
    tokenizer = AutoTokenizer.from_pretrained(run / START)
    assert 1000 < len(tokenizer) <= 2048  # sixty solutions hold fewer merges than the preset asks for
    prompt = make_task("gsm8k", path=str(data)).load("test", 1)[0].prompt
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == prompt and len(ids) < len(prompt) / 2
    assert not any(
        trace["correct"] for step in (1, 2) for trace in read_rollouts(run / f"rollouts/step_00000{step}.jsonl.gz")
    )


def test_records_between_stages_stay_frozen() -> None:
    """A rollout file is what `Trace` holds, so that a later reader finds every field."""
    from airl_fast.types import Trace

    (first, *_) = read_rollouts(small_run() / "rollouts" / "step_000001.jsonl.gz")
    assert set(first) == {field.name for field in dataclasses.fields(Trace)}
