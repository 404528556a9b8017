"""Small real models, traces and optimisers for the tests of the training stages."""

import copy
import random
from collections.abc import Callable, Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from airl_fast.config import OptimConfig
from airl_fast.models.load import LanguageModel, wrap
from airl_fast.optim import Optimiser, make_optimiser
from airl_fast.types import Kind, Trace, TraceBatch

CPU = torch.device("cpu")
EVERYTHING = 1 << 20  # a micro-batch budget that cuts nothing


def language_model(
    architecture: str = "qwen2", vocab_size: int = 40, *, seed: int = 0, tokenizer=None, spread: float = 0.4
) -> LanguageModel:
    """Two layers, four query heads on two key heads, weights wide enough that no distribution is nearly uniform."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=512,
        initializer_range=spread,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return wrap(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"), tokenizer)


def copied(lm: LanguageModel) -> LanguageModel:
    return wrap(copy.deepcopy(lm.model), lm.tokenizer)


def trace(
    tokens: Sequence[int], kind: Kind = Kind.POLICY, *, prompt: Sequence[int] = (1,), group: int = 0, **fields
) -> Trace:
    return Trace(group=group, kind=kind, prompt_tokens=tuple(prompt), tokens=tuple(tokens), text="", **fields)


def random_traces(seed: int, groups: int = 3, samples: int = 3, vocab_size: int = 40, longest: int = 30) -> list[Trace]:
    """Per group one expert, some samples with log-probabilities, and one perturbed copy of the expert."""
    rng = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(count))

    made: list[Trace] = []
    for group in range(groups):
        prompt, expert = ids(rng.randint(1, 9)), ids(rng.randint(1, longest))
        made.append(trace(expert, Kind.EXPERT, prompt=prompt, group=group, correct=True))
        for _ in range(samples):
            tokens = ids(rng.randint(1, longest))
            logprobs = tuple(-3 * rng.random() for _ in tokens)
            correct = rng.random() < 0.5
            made.append(trace(tokens, prompt=prompt, group=group, logprobs=logprobs, correct=correct))
    for pair in range(0, len(made), samples + 1):
        source = made[pair]
        made.append(
            trace(
                ids(len(source.tokens)),
                Kind.PERTURBED,
                prompt=source.prompt_tokens,
                group=source.group,
                pair=pair,
                correct=False,
            )
        )
    return made


def whole_sequences(batch: TraceBatch) -> list[torch.Tensor]:
    """Prompt and completion of every sequence, int64, taken back out of the rows."""
    prompts = batch.tokens[: batch.segments.prompt_rows].split(batch.segments.prompts)
    completions = batch.labels.split(batch.loss_lengths)
    return [torch.cat([prompts[p], c]) for p, c in zip(batch.prompt_of, completions, strict=True)]


def plain_optimiser(parameters, learning_rate: float) -> Optimiser:
    """AdamW without schedule or decay."""
    config = OptimConfig(learning_rate=learning_rate, schedule="constant", warmup_fraction=0.0, weight_decay=0.0)
    return make_optimiser([(list(parameters), 1.0)], config, 1000)


def gradients_of(module: torch.nn.Module, step: Callable[[Optimiser], object]) -> dict[str, torch.Tensor]:
    """The gradient that `step(optimiser)` descends: one step of plain gradient descent, of length one, undone."""
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    descent = torch.optim.SGD(parameters.values(), lr=1.0)
    step(
        Optimiser(
            optimizer=descent,
            scheduler=torch.optim.lr_scheduler.ConstantLR(descent, 1.0),
            parameters=tuple(parameters.values()),
            max_grad_norm=1e9,
        )
    )
    found = {name: before[name] - parameter.detach() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    return found


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert ours.keys() == expected.keys()
    for name in ours:
        torch.testing.assert_close(ours[name].double(), expected[name].double(), atol=atol, rtol=1e-4, msg=name)
