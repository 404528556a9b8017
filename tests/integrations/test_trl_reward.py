"""A trained discriminator inside TRL: rewards per completion, and token advantages through our own formula."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from airl_fast.artifacts import POLICY, REWARD
from airl_fast.config import OptimConfig
from airl_fast.errors import UserError
from airl_fast.integrations.reward import AIRLRewardFunction
from airl_fast.pack import pack
from airl_fast.types import Example, Kind, Trace
from tests.airl_fast.run_cases import EASY
from tests.airl_fast.run_cases import train as train_run
from tests.integrations.trl_cases import relative, settings, tokenizer_of

trl = pytest.importorskip("trl", reason="TRL is not installed; `make peers` installs it.")
datasets = pytest.importorskip("datasets", reason="datasets is not installed; `make peers` installs it with TRL.")


@functools.cache
def run() -> Path:
    """A short AIRL run of the embedded task, made once. Read it only."""
    root = Path(tempfile.mkdtemp(prefix="airl-trl-run-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    short = "warm_start={updates: 60, batch_size: 32, examples: 1000}"
    train_run(
        *EASY,
        short,
        "steps=2",
        "evaluate.final=false",
        "evaluate.baselines=[]",
        f"output_dir={root}",
        "--run-name",
        "airl",
    )
    return root / "airl"


@functools.cache
def reward_of(score: str = "mean") -> AIRLRewardFunction:
    return AIRLRewardFunction(run(), score=score)


@functools.cache
def demonstrations() -> tuple[Example, ...]:
    from airl_fast.data.task import make_task

    return tuple(make_task("arithmetic", seed=0, min_ops=1, max_ops=2, train_size=40).load("train", 6))


def conversation(example: Example) -> list[dict[str, str]]:
    return [{"role": "user", "content": example.prompt}]


def expert_ids() -> list[list[int]]:
    return [list(reward_of().bridge.maker.expert(example, 0).tokens) for example in demonstrations()]


# ---- rewards ----


def test_token_rewards_are_the_discriminators_scores_one_trace_at_a_time():
    reward = reward_of()
    prompts, ids = [conversation(e) for e in demonstrations()], expert_ids()
    ids[1] = ids[1][:-4]  # unfinished
    found = reward.token_rewards(prompts, ids)
    maker = reward.bridge.maker
    for i, (example, tokens) in enumerate(zip(demonstrations(), ids, strict=True)):
        trace = Trace(
            group=0, kind=Kind.POLICY, prompt_tokens=maker.prompt_tokens(example), tokens=tuple(tokens),
            text=maker.chat.decode(tokens), finished=i != 1,
        )  # fmt: skip
        alone = reward.model.score(pack([trace], reward.device))
        torch.testing.assert_close(found[i], alone, rtol=1e-4, atol=1e-5)
    assert torch.cat(found).std() > 0.05
    plain = reward.token_rewards([e.prompt for e in demonstrations()], ids)  # a string is the user's message
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_completions_score_is_what_its_option_says():
    prompts, ids = [conversation(e) for e in demonstrations()], expert_ids()
    ids[2] = ids[2][: len(ids[2]) // 3]  # names no answer
    tokens = [row.double() for row in reward_of().token_rewards(prompts, ids)]
    ask = {"prompts": prompts, "completions": ["unread"] * len(ids), "completion_ids": ids, "trainer_state": None}
    scores = {score: reward_of(score)(**ask) for score in ("mean", "last", "min_step", "answer")}
    assert scores["mean"] == pytest.approx([float(row.mean()) for row in tokens], rel=1e-5)
    assert scores["last"] == pytest.approx([float(row[-1]) for row in tokens], rel=1e-5)
    maker, gamma = reward_of().bridge.maker, reward_of().config.advantage.gamma
    for i, row in enumerate(tokens):
        text = maker.chat.decode(ids[i])
        trace = Trace(group=0, kind=Kind.POLICY, prompt_tokens=(1,), tokens=tuple(ids[i]), text=text)
        starts, steps = 0, []
        for end in maker.step_tokens(trace):
            steps.append(float(row[starts : end + 1].mean()))
            starts = end + 1
        assert scores["min_step"][i] == pytest.approx(min(steps), rel=1e-5)
        to_go = [sum(gamma**k * float(r) for k, r in enumerate(row[t:])) for t in range(len(row))]
        answer = [to_go[t] for t in maker.answer_tokens(trace)]
        assert (i == 2) == (not answer)
        assert scores["answer"][i] == (pytest.approx(sum(answer) / len(answer), rel=1e-5) if answer else None)
    assert reward_of("last").__name__ == "airl_last"


def test_it_tells_demonstrations_from_nonsense():
    prompts, ids = [conversation(e) for e in demonstrations()], expert_ids()
    good = reward_of()(prompts, [], ids)
    bad = reward_of()(prompts, [], [[*reversed(row[:-1]), row[-1]] for row in ids])
    assert sum(good) / len(good) > sum(bad) / len(bad) + 0.1


def test_token_advantages_follow_the_papers_formula():
    """Standardised by the group's last rewards, the demonstration's among them, then discounted sums."""
    reward, examples = reward_of(), demonstrations()[:2]
    ids = [row[:length] for row, length in zip([*expert_ids()[:2]] * 2, (6, 9, 11, 5), strict=True)]
    prompts = [conversation(examples[i % 2]) for i in range(4)]
    judged = reward.judge(prompts, ids, groups=[0, 1, 0, 1], experts=[examples[0].expert, None, None, None])
    rewards = reward.rewards(judged)
    found = reward.token_advantages(judged, rewards)
    assert [len(row) for row in found] == [6, 9, 11, 5]
    rows = rewards.double().split([len(trace.tokens) for trace in judged.traces])
    assert len(rows) == 5 and judged.traces[4].kind == Kind.EXPERT
    setting = reward.config.advantage
    assert (setting.mode, setting.position_baseline) == ("discounted", True)
    plain = replace_settings(reward, position_baseline=False, normalise=False)
    try:
        found = plain.token_advantages(judged, rewards)
    finally:
        replace_settings(reward, **{k: getattr(setting, k) for k in ("position_baseline", "normalise")})
    for group, members in ((0, (0, 2, 4)), (1, (1, 3))):
        last = torch.stack([rows[m][-1] for m in members])
        scale = last.std().clamp_min(setting.min_std) + setting.eps
        for m in members[:2]:
            returns, total = [], 0.0
            for r in reversed(((rows[m] - last.mean()) / scale).tolist()):
                total = r + setting.gamma * total
                returns.insert(0, total)
            assert found[m].tolist() == pytest.approx(returns, rel=1e-4, abs=1e-4), (group, m)


def replace_settings(reward: AIRLRewardFunction, **changes: object) -> AIRLRewardFunction:
    reward.config = reward.config.model_copy(update={"advantage": reward.config.advantage.model_copy(update=changes)})
    return reward


def test_another_tokenizer_gets_its_own_tokens_rewards():
    other = tokenizer_of()
    reward = AIRLRewardFunction(run() / REWARD, tokenizer=other)  # the reward model's directory will do
    prompts = [conversation(e) for e in demonstrations()]
    ids = [[*other(e.expert, add_special_tokens=False)["input_ids"], other.eos_token_id] for e in demonstrations()]
    assert [len(row) for row in ids] != [len(row) for row in expert_ids()]
    found, native = reward.token_rewards(prompts, ids), reward_of().token_rewards(prompts, expert_ids())
    for mine, theirs, tokens in zip(found, native, ids, strict=True):
        assert len(mine) == len(tokens)
        assert float(mine[-1]) == pytest.approx(float(theirs[-1]), rel=1e-4)  # the end of turn is one token in both
        assert theirs.min() - 1e-5 <= mine.min() and mine.max() <= theirs.max() + 1e-5  # means of what they overlap
    same = AIRLRewardFunction(run(), tokenizer=AutoTokenizer.from_pretrained(run() / POLICY))
    assert same.bridge.chat is None
    assert all(torch.equal(a, b) for a, b in zip(same.token_rewards(prompts, expert_ids()), native, strict=True))


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"belongs to no finished run \(no config.yaml and start in"):
        AIRLRewardFunction(tmp_path)
    with pytest.raises(UserError, match="score='best' is unknown; choose answer, mean, min_step, last"):
        AIRLRewardFunction(run(), score="best")
    reward, ids = reward_of(), expert_ids()[:2]
    user = {"role": "user", "content": "7?"}
    with pytest.raises(UserError, match="holds the turns user, assistant; the reward reads one user message"):
        reward.judge([[user, {"role": "assistant", "content": "1"}]], ids[:1])
    with pytest.raises(UserError, match="different system messages"):
        reward.judge([[user], [{"role": "system", "content": "Be brief."}, user]], ids)
    with pytest.raises(UserError, match="empty completion"):
        reward.judge([[user]], [[]])
    copied = tmp_path / "copied"
    shutil.copytree(run() / REWARD, copied)
    with pytest.raises(UserError, match="name the reward model's with run_directory"):
        AIRLRewardFunction(copied)
    moved = AIRLRewardFunction(copied, run_directory=run())
    assert moved([[user]], [], ids[:1]) == reward([[user]], [], ids[:1])


# ---- inside TRL ----


def policy():
    return AutoModelForCausalLM.from_pretrained(run() / POLICY, dtype=torch.float32)


def dataset(*, experts: bool):
    rows = [{"prompt": conversation(e), **({"expert": e.expert} if experts else {})} for e in demonstrations()]
    return datasets.Dataset.from_list(rows)


class Watch(TrainerCallback):
    def __init__(self) -> None:
        self.logs, self.gradients = [], {}

    def on_pre_optimizer_step(self, args, state, control, *, model, **_) -> None:
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, *, logs, **_) -> None:
        self.logs.append(logs)


def common(folder: Path, **options: object) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(run() / POLICY)
    default = {"max_steps": 1, "num_iterations": 1, "beta": 0.0, "temperature": 1.0, "max_completion_length": 24}
    arguments = settings(trl.GRPOConfig, folder, **{**default, "max_grad_norm": 1e6, **options})
    return {"model": policy(), "args": arguments, "processing_class": tokenizer, "callbacks": [Watch()]}


def test_grpo_trains_on_the_sequence_reward(tmp_path):
    seen = []

    class Remembering(AIRLRewardFunction):
        def __call__(self, *args, **kwargs):
            seen.append(super().__call__(*args, **kwargs))
            return seen[-1]

    how = common(tmp_path, max_steps=2)
    reward = Remembering(run(), tokenizer=how["processing_class"])
    before = {n: p.detach().clone() for n, p in how["model"].named_parameters()}
    trainer = trl.GRPOTrainer(reward_funcs=reward, train_dataset=dataset(experts=False), **how)
    trainer.train()
    logs = how["callbacks"][0].logs
    assert len(seen) == 2 and all(len(scores) == 8 for scores in seen)
    for scores, log in zip(seen, logs, strict=False):
        assert float(log["rewards/airl_mean/mean"]) == pytest.approx(sum(scores) / 8, rel=1e-4)
    assert max(relative(p, before[n]) for n, p in trainer.model.named_parameters()) > 1e-5


@pytest.mark.parametrize("experts", [False, True])
def test_airl_trainer_follows_the_gradient_of_our_token_advantages(tmp_path, experts):
    """One step's gradient is -1/N Σ A_t ∇log π(y_t), with A from the formula tested above, made here once more."""
    from airl_fast.integrations.trl import AIRLTrainer

    how, batches = common(tmp_path), []

    class Remembering(AIRLTrainer):
        def _generate_and_score_completions(self, inputs):
            batches.append((inputs, super()._generate_and_score_completions(inputs)))
            return batches[-1][1]

    reward = reward_of()
    Remembering(reward=reward, train_dataset=dataset(experts=experts), **how).train()
    (inputs, batch), gradients = batches[0], how["callbacks"][0].gradients
    mask = batch["completion_mask"].bool()
    ids = [row[keep].tolist() for row, keep in zip(batch["completion_ids"], mask, strict=True)]
    judged = reward.judge(
        [row["prompt"] for row in inputs], ids, groups=[0] * 4 + [1] * 4, experts=[row.get("expert") for row in inputs]
    )
    assert len(judged.traces) == 8 + 2 * experts
    expected = reward.token_advantages(judged, reward.rewards(judged))
    assert batch["advantages"].shape == mask.shape and not batch["advantages"][~mask].any()
    for row, keep, values in zip(batch["advantages"], mask, expected, strict=True):
        torch.testing.assert_close(row[keep], values, rtol=1e-5, atol=1e-6)
        assert len(values) == 1 or values.std() > 0  # not one number a completion
    model = policy()
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logprobs = model(input_ids=tokens, attention_mask=seen).logits[:, :-1].log_softmax(-1)
    logprobs = logprobs.gather(-1, tokens[:, 1:, None])[..., 0][:, -mask.shape[1] :]
    (-(logprobs * batch["advantages"] * mask).sum() / mask.sum()).backward()
    for name, parameter in model.named_parameters():
        assert relative(gradients[name], parameter.grad) < 1e-3, name


def test_airl_trainer_trains_the_discriminator_too(tmp_path):
    from airl_fast.integrations.trl import AIRLTrainer

    how = common(tmp_path, max_steps=6, learning_rate=0.0)  # the policy stands still: only the discriminator moves
    reward = AIRLRewardFunction(run())
    before = {n: p.detach().clone() for n, p in reward.model.named_parameters()}
    optim = OptimConfig(learning_rate=3e-3, schedule="constant", warmup_fraction=0.0)
    two = dataset(experts=True).select(range(2))
    AIRLTrainer(reward=reward, discriminator_optim=optim, train_dataset=two, **how).train()
    assert sum(relative(p, before[n]) > 1e-4 for n, p in reward.model.named_parameters()) > len(before) // 2
    logs = [log for log in how["callbacks"][0].logs if "discriminator/loss" in log]
    assert len(logs) == 6
    assert float(logs[-1]["discriminator/loss"]) < float(logs[0]["discriminator/loss"]) - 0.05
    assert float(logs[-1]["discriminator/reward_gap"]) > float(logs[0]["discriminator/reward_gap"]) + 0.1


def test_airl_trainer_says_so_where_padded_batches_depend_on_the_longest_row(tmp_path, caplog):
    from airl_fast.integrations.trl import AIRLTrainer

    AIRLTrainer(reward=reward_of(), train_dataset=dataset(experts=False), **common(tmp_path))
    assert "rotary factors" not in caplog.text
    how = common(tmp_path)
    how["model"].config.rope_parameters |= {"rope_type": "longrope", "original_max_position_embeddings": 64}
    AIRLTrainer(reward=reward_of(), train_dataset=dataset(experts=False), **how)
    assert "other rotary factors above 64 tokens" in caplog.text


def test_airl_trainer_refuses_what_has_no_meaning(tmp_path):
    from airl_fast.integrations.trl import AIRLTrainer

    optim = OptimConfig()
    with pytest.raises(UserError, match="loss_type=luspo with importance_sampling_level=sequence weighs whole"):
        how = common(tmp_path, loss_type="luspo", importance_sampling_level="sequence")
        AIRLTrainer(reward=reward_of(), train_dataset=dataset(experts=False), **how)
    reward = AIRLRewardFunction(run())
    trainer = AIRLTrainer(
        reward=reward, discriminator_optim=optim, train_dataset=dataset(experts=False), **common(tmp_path)
    )
    with pytest.raises(UserError, match="needs demonstrations; give the dataset a text column `expert`"):
        trainer.train()
    with pytest.raises(UserError, match="needs max_steps"):
        AIRLTrainer(
            reward=reward, discriminator_optim=optim, train_dataset=dataset(experts=True),
            **common(tmp_path, max_steps=-1),
        )  # fmt: skip
