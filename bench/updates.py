"""Time the update phases of an AIRL step at a real model's size, with random weights and random tokens.

    python -m bench.updates [--policy qwen2.5-1.5b,qwen2.5-3b] [--discriminator qwen2.5-0.5b] [--json OUT.json]

Discriminator update, scoring and policy update of G samples and a demonstration a prompt: packed with shared prompts,
packed without, and padded; and the update of TRL's GRPOTrainer on as many samples when TRL is installed. LoRA on both
models. Nothing here samples.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from airl_fast.config import DiscriminatorConfig, LoraConfig, OptimConfig, PolicyConfig, RewardConfig
from airl_fast.discriminator import Discriminator
from airl_fast.models.adapters import trainable
from airl_fast.models.forward import attention_kernel
from airl_fast.models.heads import make_head
from airl_fast.models.load import wrap
from airl_fast.optim import make_optimiser
from airl_fast.pack import pack
from airl_fast.policy import Policy
from airl_fast.types import Kind, Trace, TraceBatch
from bench.errors import BadArgument, Parser, first_line, run_command
from bench.padded import padded
from bench.peers._packages import installed
from bench.results import commit, device_name
from bench.step_flops import _passes, forward_flops, gemm_tflops
from bench.updates_report import updates_table


def _shape(hidden: int, intermediate: int, heads: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
    }


_PUBLISHED = {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1e6}
MODELS = {
    "qwen2.5-0.5b": _PUBLISHED | _shape(896, 4864, 14, 24),
    "qwen2.5-1.5b": _PUBLISHED | _shape(1536, 8960, 12, 28),
    "qwen2.5-3b": _PUBLISHED | _shape(2048, 11008, 16, 36),
    "tiny": _PUBLISHED | _shape(64, 192, 4, 3) | {"vocab_size": 384},
}


VARIANTS = ("shared", "trl", "packed", "padded")  # in this order: what a budget leaves out comes last


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Lengths in tokens. One demonstration a prompt joins its `group` samples."""

    prompts: int = 8
    group: int = 16
    prompt_tokens: int = 180
    completion_tokens: int = 220


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRow:
    """seconds: medians of a phase. policy_tokens: that the policy's update has a loss on. tokens_per_s: completion
    tokens of a batch over all phases. peak_mib: of the allocator during the policy's update, None on the CPU; ours
    holds the discriminator as well. model_flops_utilisation: of the policy's update against the
    product measured in the same run."""

    policy: str
    discriminator: str
    variant: str
    backend: str
    rows: int
    policy_tokens: int
    seconds: dict[str, float]
    tokens_per_s: float
    peak_mib: float | None
    model_flops_utilisation: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What to measure and on what. variants: of VARIANTS. budget: seconds after which none is begun, None for no
    end. rate: TFLOP/s of a large product, measured here."""

    shape: Shape
    discriminator: str
    variants: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    repeats: int
    budget: float | None
    rate: float


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench updates", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    chosen = _known(options.policy, MODELS, "--policy: no model")
    _known(options.discriminator, MODELS, "--discriminator: no model")
    setting = setting_of(
        shape=Shape(**{name: getattr(options, name) for name in Shape.__dataclass_fields__}),
        discriminator=options.discriminator,
        variants=_known(options.variants, VARIANTS, "--variants: no variant"),
        repeats=options.repeats,
        budget=options.budget_s,
    )
    document = header(setting) | {"rows": [], "left_out": []}
    for entry in measure(chosen, setting):
        if isinstance(entry, UpdateRow):
            document["rows"].append(asdict(entry))
        else:
            document["left_out"].append(entry)
            print(entry)
        if options.json:  # after every row: a run that is stopped leaves what it has
            options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(updates_table(document))
    return 0


def _known(text: str, known: Collection[str], what: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in known:
            raise BadArgument(f"{what} {name}; choose from {', '.join(known)}.")
    return names


def _parser() -> Parser:
    parser = Parser(prog="bench updates", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="qwen2.5-1.5b,qwen2.5-3b")
    parser.add_argument("--discriminator", default="qwen2.5-0.5b")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, dest=name)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget-s", type=float, help="begin no further row after so many seconds")
    parser.add_argument("--json", type=Path, help="written after every row")
    return parser


def setting_of(
    *, shape: Shape, discriminator: str, variants: tuple[str, ...], repeats: int, budget: float | None,
    device: torch.device | None = None,
) -> Setting:  # fmt: skip
    """device: None takes a GPU where there is one."""
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    return Setting(
        shape=shape, discriminator=discriminator, variants=variants, device=place, dtype=dtype, repeats=repeats,
        budget=budget, rate=gemm_tflops(place, dtype),
    )  # fmt: skip


def header(setting: Setting) -> dict[str, object]:
    return {
        "device": device_name(setting.device),
        "versions": {name: installed(name) for name in ("torch", "transformers", "peft", "trl")},
        "commit": commit(),
        "shape": asdict(setting.shape),
        "gemm_tflops": setting.rate,
    }


def measure(policies: Sequence[str], setting: Setting) -> Iterator[UpdateRow | str]:
    """A row as soon as it is measured, or a sentence on what is left out. Raises what failed of ours, at the end."""
    began, failure = time.monotonic(), None
    for policy in policies:
        ours: _Ours | None = None
        for variant in setting.variants:
            name = f"{policy} {variant}"
            if setting.budget is not None and time.monotonic() - began > setting.budget:
                yield f"{name} left out: the budget of {setting.budget:g} s is used."
            elif variant != "trl":
                try:
                    ours = ours or _Ours(policy, setting)
                    yield ours.row(variant)
                except Exception as error:  # ours to mend, after the other rows
                    failure, ours = failure or error, None
                    yield f"{name} FAILED: {type(error).__name__}: {first_line(error)}"
            elif installed("trl") is None:
                yield f"{name} left out: the package trl is not installed."
            else:
                ours = None  # its memory is not TRL's
                gc.collect()
                try:
                    yield _trl(policy, setting)
                except Exception as error:  # a peer's failure, not ours to mend
                    yield f"{name} left out: {type(error).__name__}: {first_line(error)}"
            gc.collect()
    if failure is not None:
        raise failure


class _Ours:
    """A policy and a discriminator with adapters, updated on the same traces in every variant."""

    def __init__(self, policy: str, setting: Setting) -> None:
        self.policy, self.setting = policy, setting
        optim = OptimConfig(learning_rate=1e-5, tokens_per_micro_batch=16_384)
        self.learner = _policy(_adapted(policy, setting.device, setting.dtype, seed=1), optim)
        judged = _adapted(setting.discriminator, setting.device, setting.dtype, seed=2)
        self.judge, self.judge_optimiser = _discriminator(judged, optim)
        self.traces = _traces(setting.shape, MODELS[policy]["vocab_size"])
        # The mathematics, a prompt once, whatever a variant runs.
        self.work = _policy_flops(self.learner, pack(self.traces, torch.device("cpu"))) / 1e12

    def row(self, variant: str) -> UpdateRow:
        setting, judge, learner = self.setting, self.judge, self.learner
        batch = pack(self.traces, setting.device, share=variant != "packed")
        advantages = torch.randn(batch.num_loss_tokens, device=setting.device)
        phases: dict[str, Callable[[], object]] = {
            "discriminator": lambda: judge.update(batch, self.judge_optimiser),
            "score": lambda: judge.score(batch),
            "policy": lambda: learner.update(batch, advantages),
        }
        seconds, peak = {}, None
        with padded() if variant == "padded" else nullcontext():
            for name, phase in phases.items():
                seconds[name], peak = _time(phase, setting.device, setting.repeats)
        kernel = attention_kernel(learner.lm.backbone, setting.device).name
        return UpdateRow(
            policy=self.policy,
            discriminator=setting.discriminator,
            variant=variant,
            backend="transformers' SDPA" if variant == "padded" else kernel,
            rows=_padded_rows(self.traces) if variant == "padded" else batch.segments.num_rows,
            policy_tokens=batch.num_loss_tokens,
            seconds=seconds,
            tokens_per_s=batch.num_loss_tokens / sum(seconds.values()),
            peak_mib=peak,
            model_flops_utilisation=self.work / seconds["policy"] / setting.rate,
        )


def _adapted(name: str, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2Config(**MODELS[name], max_position_embeddings=4096)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    rank = min(64, config.hidden_size // 2)
    return trainable(model, LoraConfig(rank=rank, alpha=rank), base=name, seed=seed, own=True)


def _policy(model: PreTrainedModel, optim: OptimConfig) -> Policy:
    config = PolicyConfig(optim=optim)
    optimiser = make_optimiser([(model.parameters(), 1.0)], optim, 1000)
    return Policy(lm=wrap(model, None), optimiser=optimiser, config=config, temperature=1.0)


def _discriminator(model: PreTrainedModel, optim: OptimConfig):
    backbone = wrap(model, None).backbone
    head = make_head("linear", backbone, 0).to(model.device)
    judge = Discriminator(backbone, head, DiscriminatorConfig(optim=optim), RewardConfig(), None)
    groups = [(backbone.parameters(), 1.0), (head.parameters(), 1.0)]
    return judge, make_optimiser(groups, optim, 1000)


def _traces(shape: Shape, vocabulary: int) -> list[Trace]:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (count,), generator=generator).tolist())

    made = []
    for group in range(shape.prompts):
        prompt = ids(shape.prompt_tokens)
        for i in range(shape.group + 1):
            kind = Kind.EXPERT if i == 0 else Kind.POLICY
            tokens = ids(shape.completion_tokens)
            trace = Trace(group=group, kind=kind, prompt_tokens=prompt, tokens=tokens, text="")
            made.append(trace if i == 0 else replace(trace, logprobs=(-1.0,) * len(tokens)))
    return made


def _padded_rows(traces: Sequence[Trace]) -> int:
    lengths = [len(t.prompt_tokens) + len(t.tokens) for t in traces]
    return len(lengths) * max(lengths)


def _policy_flops(learner: Policy, batch: TraceBatch) -> float:
    head = 2 * learner.lm.head_weight.numel() * batch.num_loss_tokens
    return _passes(learner.lm.backbone) * forward_flops(learner.lm.backbone, batch.segments) + 2 * head


def _time(phase: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Median seconds after one call that is not counted, and MiB the allocator held at most."""
    phase()
    cuda, spent = device.type == "cuda", []
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        start = time.perf_counter()
        phase()
        if cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent), torch.cuda.max_memory_allocated() / 2**20 if cuda else None


def _trl(policy: str, setting: Setting) -> UpdateRow:
    from bench.peers.trl_update import update_of

    shape = setting.shape
    model = _adapted(policy, setting.device, setting.dtype, seed=1)
    update, version = update_of(model, shape.prompts, shape.group, shape.prompt_tokens, shape.completion_tokens)
    seconds, peak = _time(update, setting.device, setting.repeats)
    tokens = shape.prompts * shape.group * shape.completion_tokens
    return UpdateRow(
        policy=policy,
        discriminator=setting.discriminator,
        variant="trl",
        backend=f"TRL {version} GRPOTrainer, policy update alone",
        rows=shape.prompts * shape.group * (shape.prompt_tokens + shape.completion_tokens),
        policy_tokens=tokens,
        seconds={"policy": seconds},
        tokens_per_s=tokens / seconds,
        peak_mib=peak,
        model_flops_utilisation=None,
    )


if __name__ == "__main__":
    sys.exit(main())
