"""Everything one run works with, built from its configuration: task, prompts, models and optimisers."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from airl_fast.beside import Beside
from airl_fast.bridge import Bridge
from airl_fast.config import Config
from airl_fast.data.chat import ChatFormat
from airl_fast.data.task import Task, check_experts, make_task
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.models.adapters import trainable
from airl_fast.models.attention import shares_prompts
from airl_fast.models.build import build_model, build_tokenizer
from airl_fast.models.check import verify_packing
from airl_fast.models.heads import make_head
from airl_fast.models.load import LanguageModel, load_language_model, wrap
from airl_fast.optim import Optimiser, make_optimiser
from airl_fast.policy import Policy
from airl_fast.rollout.builtin import Builtin
from airl_fast.rollout.engine import Engine, SamplingParams
from airl_fast.traces import TraceMaker
from airl_fast.types import Example

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """What a run reads. train: prompts with a demonstration. dev: prompts watched during training."""

    task: Task
    train: tuple[Example, ...]
    dev: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """The discriminator with its optimiser and its way to and from the policy's tokens."""

    model: Discriminator
    optimiser: Optimiser
    bridge: Bridge
    learning: Beside  # the update beside the next rollout, under discriminator.overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Lab:
    """start: the frozen start policy. policy: the one that is trained, None when only a reward is. engine: the sampler
    of the policy, the built-in one unless a run replaces it. reward: None where none is learned."""

    config: Config
    material: Material
    maker: TraceMaker
    policy: Policy | None
    start: LanguageModel
    engine: Engine
    reward: Reward | None
    prepare: Beside  # what the host gets ready while the device works

    def sampling(self, step: int, purpose: str = "rollout") -> SamplingParams:
        """Parameters of the step's rollout. All draws of a run come from its seed, the step and their purpose, so
        a resumed run needs no generator state to repeat them."""
        return sampling_params(self.config, self.maker.chat, step, purpose)

    def rng(self, step: int, purpose: str) -> random.Random:
        return draws_of(self.config, step, purpose)

    def prompts(self, step: int, count: int | None = None) -> list[Example]:
        """The training prompts of a step (from 1): consecutive slices of a fresh shuffle in every epoch."""
        count = self.config.rollout.prompts_per_step if count is None else count
        train, chosen, position = self.material.train, [], (step - 1) * count
        while len(chosen) < count:
            epoch, offset = divmod(position + len(chosen), len(train))
            order = list(range(len(train)))
            self.rng(epoch, "prompts").shuffle(order)
            chosen += [train[i] for i in order[offset : offset + count - len(chosen)]]
        return chosen


def draws_of(config: Config, step: int, purpose: str) -> random.Random:
    return random.Random(f"{config.seed}/{purpose}/{step}")


def sampling_params(config: Config, chat: ChatFormat, step: int, purpose: str) -> SamplingParams:
    """See `Lab.sampling`. A purpose that begins with "dev" or "final" is an evaluation's."""
    rollout = config.rollout
    judged = purpose.startswith(("dev", "final")) and config.evaluate.top_p is not None
    return SamplingParams(
        temperature=rollout.temperature,
        top_p=config.evaluate.top_p if judged else rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        end_token=chat.end_of_turn,
        other_ends=tuple(sorted(chat.other_ends)),
        seed=draws_of(config, step, purpose).getrandbits(63),
        batch_size=rollout.batch_size,
    )


def _silent(text: str) -> None:
    pass


def load_material(config: Config, say: Say = _silent) -> Material:
    task = make_task(config.data.task, path=config.data.path, seed=config.seed, **config.data.options)
    train = [example for example in task.load("train") if example.expert is not None]
    report = check_experts(task, train, "keep" if config.data.failing_experts == "keep" else "drop")
    if report.failed and config.data.failing_experts == "error":
        raise UserError(f"{report}; correct them, or leave them out with data.failing_experts=drop.")
    if report.failed:
        verb = {"keep": "kept", "drop": "dropped"}[config.data.failing_experts]
        say(f"{report}; {verb} (data.failing_experts)")
    train = list(report.kept)
    random.Random(f"{config.seed}/experts").shuffle(train)
    train = train[: config.data.num_experts]
    if not train:
        raise UserError(
            f"data.task={config.data.task}: no training prompt has a usable demonstration; check data.path."
        )
    return Material(task=task, train=tuple(train), dev=tuple(task.load("dev", config.data.num_dev)))


def make_start_model(config: Config, task: Task, device: torch.device) -> LanguageModel:
    """The policy before any training: a local directory, or a model and tokenizer built from the task's text.

    A warm start trains every weight, so they are quantised after it, when the run loads what it saved.
    """
    if config.model.path is not None:
        settings = config.model.model_copy(update={"quantise": None}) if config.warm_start.updates else config.model
        return load_language_model(settings, device)
    examples = task.load("warmstart", min(config.warm_start.examples, 5000))
    texts = [text for example in examples for text in (example.prompt, example.expert) if text is not None]
    tokenizer = build_tokenizer(texts, config.model.build)
    model = build_model(config.model.build, tokenizer, config.seed)
    model = model.to(device, getattr(torch, config.model.dtype))
    return wrap(model, tokenizer, fp32_logits=config.model.fp32_logits)


def make_maker(config: Config, task: Task, lm: LanguageModel) -> TraceMaker:
    system = config.data.system if config.data.system is not None else task.system
    chat = ChatFormat.from_tokenizer(lm.tokenizer, lm.ends)
    return TraceMaker(task=task, chat=chat, reward=config.reward, system=system)


def make_lab(config: Config, material: Material, start: LanguageModel, device: torch.device, say: Say = _silent) -> Lab:
    """Assemble a run around a start policy, which stays as it is: the trained policy, where there is one, is a copy
    of it, or adapters over the same weights.

    Prompts too long for a model are refused or left out here, where the tokenizers are known.
    """
    verify_packing(start)
    maker = make_maker(config, material.task, start)
    policy = make_policy(config, start) if config.trains_policy else None
    start.model.requires_grad_(False)
    reward = make_reward(config, maker, start, device) if config.learns_reward else None
    lab = Lab(
        config=config,
        material=material,
        maker=maker,
        policy=policy,
        start=start,
        engine=Builtin(start if policy is None else policy.lm, plain=config.why_no_graphs),
        reward=reward,
        prepare=Beside(device, "prepare"),
    )
    fitting = replace(
        material,
        train=tuple(fit_context(lab, material.train, "training", say, demonstrations=True)),
        dev=tuple(fit_context(lab, material.dev, "dev", say)),
    )
    if policy is not None and config.algorithm != "sft" and config.policy.importance_sampling == "none":
        _refuse_crossing(lab, fitting.train)
    return replace(lab, material=fitting)


def _refuse_crossing(lab: Lab, examples: Sequence[Example]) -> None:
    """UserError where a sample could be drawn with other rotary factors than the trainer reads it with: each token is
    drawn with those of the length before it, and the trainer reads all of them with those of the whole length."""
    regimes, new = lab.start.regimes, lab.config.rollout.max_new_tokens
    for example in examples if regimes else ():
        prompt = len(lab.maker.prompt_tokens(example))
        if regimes.of(prompt) != regimes.of(prompt + new):
            raise UserError(
                f"model.path: the policy has other rotary factors {regimes}. Training prompt {example.id} has {prompt} "
                f"and rollout.max_new_tokens={new}: tokens that are drawn before the change would be trained on as if "
                "drawn after it. Lower rollout.max_new_tokens, or set policy.importance_sampling=token, which corrects "
                "for the difference."
            )


def make_policy(config: Config, start: LanguageModel) -> Policy:
    settings = config.model
    model = trainable(
        start.model,
        settings.lora,
        base=start.model.name_or_path,
        seed=config.seed,
        checkpointing=settings.gradient_checkpointing,
    )
    updates = config.steps * config.policy.epochs
    return Policy(
        lm=replace(start, model=model),
        optimiser=make_optimiser([(model.parameters(), 1.0)], config.policy.optim, updates),
        config=config.policy,
        temperature=config.rollout.temperature,
        reference=start if config.policy.kl_coef > 0 else None,
    )


def make_reward(config: Config, maker: TraceMaker, start: LanguageModel, device: torch.device) -> Reward:
    discriminator, settings = config.discriminator, config.model
    if discriminator.path == "policy":
        own, chat = start, None
    else:
        changes = {"path": discriminator.path, "build": None, "quantise": discriminator.quantise}
        settings = settings.model_copy(update=changes)
        own = load_language_model(settings, device, key="discriminator.path")
        verify_packing(own, "discriminator.path")
        same = own.tokenizer.backend_tokenizer.to_str() == start.tokenizer.backend_tokenizer.to_str()
        chat = None if same else ChatFormat.from_tokenizer(own.tokenizer)
    if chat is not None and discriminator.head == "logprob":
        raise UserError(
            "discriminator.head=logprob reads the start policy's log-probabilities, so discriminator.path must share "
            "the policy's tokenizer; choose head=linear or head=action."
        )
    backbone = trainable(
        own.backbone,
        discriminator.lora,
        base=own.model.name_or_path,
        seed=config.seed + 1,  # other adapters than the policy's
        checkpointing=discriminator.gradient_checkpointing,
        own=own is not start,
        key="discriminator",
    )
    torch.manual_seed(config.seed)
    head = make_head(discriminator.head, backbone, discriminator.action_rank).to(device)
    model = Discriminator(backbone, head, discriminator, config.reward, start)
    updates = config.steps * max(discriminator.updates_per_step, 1)
    groups = [(backbone.parameters(), 1.0), (head.parameters(), discriminator.head_lr_scale)]
    return Reward(
        model=model,
        optimiser=make_optimiser(groups, discriminator.optim, updates),
        bridge=Bridge(
            maker=maker,
            chat=chat,
            device=device,
            regimes=model.regimes,
            share=config.model.share_prompts and shares_prompts(backbone),
        ),
        learning=Beside(device, "discriminator"),
    )


def held_out(lab: Lab, split: str, say: Say = _silent) -> list[Example]:
    """The prompts of a split that an evaluation reads: the first `evaluate.prompts`. UserError when there is none."""
    examples = lab.material.task.load(split, lab.config.evaluate.prompts)
    if not examples:
        raise UserError(
            f"data.task={lab.config.data.task}: the {split} split holds no prompt to evaluate on; "
            "set more aside (data.path, data.options) or set evaluate.final=false."
        )
    return fit_context(lab, examples, split, say)


def fit_context(
    lab: Lab, examples: Sequence[Example], split: str, say: Say = _silent, *, demonstrations: bool = False
) -> list[Example]:
    """The examples whose prompt and sample, and demonstration where asked, fit the contexts of policy and
    discriminator. Others raise UserError or are left out, as data.too_long says."""
    config, readers = lab.config, [("policy", lab.maker, lab.start.max_length)]
    if lab.reward is not None:
        context = lab.reward.model.backbone.config.get_text_config().max_position_embeddings
        readers.append(("discriminator", replace(lab.maker, chat=lab.reward.bridge.chat or lab.maker.chat), context))
    fitting, excess = list(examples), ""
    for name, maker, context in readers:
        needed = [_tokens_needed(example, maker, config, demonstrations) for example in fitting]
        long = [i for i, tokens in enumerate(needed) if tokens > context]
        if long and not excess:
            completion = f"rollout.max_new_tokens={config.rollout.max_new_tokens}"
            completion += " or the demonstration" if demonstrations else ""
            excess = (
                f"the {name}'s context is {context} tokens, but {split} prompt {fitting[long[0]].id} and its "
                f"completion ({completion}) need {needed[long[0]]}"
            )
        fitting = [example for example, tokens in zip(fitting, needed, strict=True) if tokens <= context]
    count = len(examples) - len(fitting)
    if count and not fitting:
        raise UserError(f"{excess}, and none of the {count} fits; lower rollout.max_new_tokens or change the model.")
    if count and config.data.too_long == "error":
        raise UserError(
            f"{excess} ({count} of {len(examples)} prompts are too long); lower rollout.max_new_tokens, "
            "or leave such prompts out with data.too_long=drop."
        )
    if count:
        say(f"{count} of {len(examples)} {split} prompts left out (data.too_long=drop): {excess}")
    return fitting


def _tokens_needed(example: Example, maker: TraceMaker, config: Config, demonstration: bool) -> int:
    completion = config.rollout.max_new_tokens
    if demonstration and example.expert is not None:
        completion = max(completion, len(maker.expert(example, 0).tokens))
    return len(maker.prompt_tokens(example)) + completion
