"""A trained reward that reads traces of anyone's: per token the reward, and a policy's log-probability beside it.

Nothing here looks at an answer key: whoever compares with labels does so after the scores are known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from airl_fast.artifacts import REWARD, START, load_policy, load_reward
from airl_fast.batches import broken_copies
from airl_fast.bridge import Bridge
from airl_fast.config import Config
from airl_fast.data.chat import ChatFormat
from airl_fast.data.task import Task, make_task
from airl_fast.device import pick_device
from airl_fast.discriminator import Discriminator
from airl_fast.errors import UserError
from airl_fast.lab import Lab, draws_of, make_maker
from airl_fast.measures.localise import TokenValues
from airl_fast.microbatch import TokenBudget, over_tokens
from airl_fast.models.attention import shares_prompts
from airl_fast.models.check import verify_packing
from airl_fast.models.forward import token_logprobs
from airl_fast.models.load import LanguageModel
from airl_fast.pack import pack
from airl_fast.saved import run_config
from airl_fast.traces import TraceMaker
from airl_fast.types import Example, Kind, Trace

_CALIBRATION_STEP = -1  # a step no training step has: its draws are its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """S traces with two numbers per token [M], on the policy's tokens, and where steps end and answers lie.

    reward: the discriminator's logit log D - log(1 - D). logprob: the log-probability of the judge's policy.
    """

    traces: tuple[Trace, ...]
    reward: TokenValues
    logprob: TokenValues


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A frozen reward. policy: whose tokens the traces are made of, and whose log-probability is the baseline."""

    config: Config
    model: Discriminator
    bridge: Bridge
    policy: LanguageModel

    @property
    def maker(self) -> TraceMaker:
        return self.bridge.maker

    @property
    def task(self) -> Task:
        return self.maker.task

    def trace(self, example: Example, group: int, text: str, finished: bool = True) -> Trace:
        """A written completion as a trace of the policy's tokens; its text is what those tokens spell.

        Whether it is correct is not asked. UserError for a text without a token.
        """
        tokens = tuple(self.maker.chat.completion_tokens(text, finished))
        if not tokens:
            raise UserError(f"the trace of {example.id} is empty; leave it out.")
        return Trace(
            group=group,
            kind=Kind.POLICY,
            prompt_tokens=self.maker.prompt_tokens(example),
            tokens=tokens,
            text=self.maker.chat.decode(tokens),
            finished=finished,
        )

    def rewards(
        self,
        traces: Sequence[Trace],
        examples: Sequence[Example],
        step_ends: Sequence[Sequence[int] | None] | None = None,
    ) -> TokenValues:
        """The discriminator's logit of every token, on the policy's tokens.

        examples: the prompts, indexed by a trace's group. step_ends: for each trace the character offsets one past
        the end of its steps; None cuts it as the task does.
        """
        flags = []
        for trace, chars in zip(traces, [None] * len(traces) if step_ends is None else step_ends, strict=True):
            own = np.zeros((2, len(trace.tokens)), dtype=bool)
            own[0, list(self.maker.step_tokens(trace, chars))] = True
            own[1, list(self.maker.answer_tokens(trace))] = True
            flags.append(own)
        closing, answers = np.concatenate(flags, axis=1)
        logits = self.model.logits(self.bridge.pack(traces, examples))
        return TokenValues(
            values=self.bridge.to_policy(logits, traces, examples).double().cpu().numpy(),
            offsets=np.cumsum([0, *(len(trace.tokens) for trace in traces)]),
            step_ends=closing,
            answer_mask=answers,
        )

    def score(
        self,
        traces: Sequence[Trace],
        examples: Sequence[Example],
        step_ends: Sequence[Sequence[int] | None] | None = None,
    ) -> Scored:
        """`rewards` of the same arguments, and the policy's log-probabilities beside them.

        Everything is held at once: give a long list in parts.
        """
        reward = self.rewards(traces, examples, step_ends)
        batch = pack(traces, self.bridge.device, regimes=self.policy.regimes)
        logprobs = over_tokens(batch, self._budget(), lambda part: token_logprobs(self.policy, part))
        return Scored(
            traces=tuple(traces),
            reward=reward,
            logprob=replace(reward, values=logprobs.double().cpu().numpy()),
        )

    def perturbed(self, examples: Sequence[Example]) -> Scored | None:
        """Perturbed demonstrations of `examples`, made even where training makes none; None when nothing in them can
        be changed. `first_changed` of a trace says where its error begins."""
        settings = self.config.discriminator
        experts = [self.maker.expert(example, group) for group, example in enumerate(examples)]
        rng = draws_of(self.config, _CALIBRATION_STEP, f"perturb-{Kind.EXPERT.name}")
        copies = max(settings.perturbed_per_expert, 1)
        made = broken_copies(self.maker, examples, experts, Kind.EXPERT, copies, settings.propagate, rng)
        traces = [replace(trace, pair=None) for trace in made]  # their sources stay behind
        return self.score(traces, examples) if traces else None

    def excess(self, traces: Iterable[Trace], examples: Sequence[Example]) -> str | None:
        """Why a trace cannot be read, as a clause that names its prompt; None when all fit the models' contexts."""
        limit = self.model.backbone.config.get_text_config().max_position_embeddings
        for trace in traces:
            length = len(trace.prompt_tokens) + len(trace.tokens)
            if length > self.policy.max_length:
                return f"{examples[trace.group].id} has {length} tokens, the policy's context {self.policy.max_length}"
            if self.bridge.chat is not None:
                own = self.bridge.chat
                prompt = own.prompt_tokens(examples[trace.group].prompt, self.maker.system)
                length = len(prompt) + len(own.completion_tokens(trace.text, trace.finished))
            if length > limit:
                return f"{examples[trace.group].id} has {length} tokens, the discriminator's context {limit}"
        return None

    def _budget(self) -> TokenBudget:
        key = "policy.optim.tokens_per_micro_batch"
        return TokenBudget(self.config.policy.optim.tokens_per_micro_batch, key)


def judge_of(lab: Lab, model: Discriminator, bridge: Bridge) -> Judge:
    """The judge of a run that is open: its log-probabilities are the start policy's."""
    return Judge(config=lab.config, model=model, bridge=bridge, policy=lab.start)


def open_judge(
    run: Path, *, policy: LanguageModel | None = None, task: Task | None = None, trust_remote_code: bool = False
) -> Judge:
    """The reward of a finished run, given by its directory or by that of its reward model inside.

    policy: another model whose traces are to be judged; None for the run's start policy. task: another one to cut
    steps and read answers by; None for the run's. trust_remote_code: whether the run's model directories may run Python
    files of their own. UserError for a directory that is no finished AIRL run's.
    """
    root, directory = locate_reward(run)
    config = run_config(root, trust_remote_code=trust_remote_code)
    device = pick_device(config)
    if task is None:
        task = make_task(config.data.task, path=config.data.path, seed=config.seed, **config.data.options)
    start = load_policy(root / START, config.model, device)
    verify_packing(start, str(root / START))
    model, own = load_reward(directory, config, make_maker(config, task, start), start, device)
    tokenizer, ends = (None, ()) if policy is None else (policy.tokenizer, policy.ends)
    bridge = bridge_from(model, own, start.tokenizer, tokenizer, config, ends)
    return Judge(config=config, model=model, bridge=bridge, policy=policy or start)


def locate_reward(given: Path, run: Path | None = None) -> tuple[Path, Path]:
    """(run, reward model) of either directory. run: the run of a reward model that lies elsewhere."""
    if run is not None:
        root, directory = run, given
    elif (given / "head.json").is_file():
        root, directory = given.resolve().parents[1], given
    else:
        root, directory = given, given / REWARD
    if not (root / "config.yaml").is_file() or not (root / START).is_dir():
        raise UserError(
            f"{given} belongs to no finished run (no config.yaml and {START} in {root}); "
            "give a run's directory, or name the reward model's with run_directory."
        )
    if not directory.is_dir():
        raise UserError(f"{root} has no {REWARD}; give a finished run whose algorithm is airl or reward.")
    return root, directory


def bridge_from(
    model: Discriminator,
    own: Bridge,
    start: PreTrainedTokenizerBase,
    tokenizer: PreTrainedTokenizerBase | None,
    config: Config,
    ends: Iterable[int] = (),
) -> Bridge:
    """From the given policy's tokens to the discriminator's: `own` leads there from the start policy's.

    ends: the tokens that end that policy's completions, besides its template's.
    """
    share = config.model.share_prompts and shares_prompts(model.backbone)
    if tokenizer is None:
        return replace(own, share=share)
    reads = own.chat or ChatFormat.from_tokenizer(start)
    same = tokenizer.backend_tokenizer.to_str() == reads.tokenizer.backend_tokenizer.to_str()
    maker = replace(own.maker, chat=ChatFormat.from_tokenizer(tokenizer, ends))
    return replace(own, maker=maker, chat=None if same else reads, share=share)
