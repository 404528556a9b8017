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
from collections.abc import Callable, Sequence
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
from bench.errors import BadArgument, Parser, run_command
from bench.padded import padded
from bench.peers._packages import installed
from bench.results import commit, device_name
from bench.step_flops import _passes, forward_flops, gemm_tflops
from bench.updates_report import render


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Lengths in tokens. One demonstration a prompt joins its `group` samples."""

    prompts: int = 8
    group: int = 16
    prompt_tokens: int = 180
    completion_tokens: int = 220


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRow:
    """seconds: medians of a phase. tokens_per_s: completion tokens of a batch over all phases. peak_mib: of the
    allocator during the policy's update, None on the CPU. model_flops_utilisation: of the policy's update against the
    product measured in the same run."""

    policy: str
    discriminator: str
    variant: str
    backend: str
    rows: int
    seconds: dict[str, float]
    tokens_per_s: float
    peak_mib: float | None
    model_flops_utilisation: float | None


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench updates", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    shape = Shape(**{name: getattr(options, name) for name in Shape.__dataclass_fields__})
    chosen = [name for name in options.policy.split(",") if name]
    for name in (*chosen, options.discriminator):
        if name not in MODELS:
            raise BadArgument(f"no model {name}; choose from {', '.join(MODELS)}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate, began, rows = gemm_tflops(device, dtype), time.monotonic(), []
    for name in chosen:
        if options.budget_s and time.monotonic() - began > options.budget_s:
            print(f"{name} left out: the budget of {options.budget_s:g} s is used")
            continue
        rows += _ours(name, options.discriminator, shape, device, dtype, rate, options.repeats)
        gc.collect()
        if installed("trl") is not None:
            rows.append(_trl(name, options.discriminator, shape, device, dtype, options.repeats))
            gc.collect()
    document = {
        "device": device_name(device),
        "versions": {name: installed(name) for name in ("torch", "transformers", "peft", "trl")},
        "commit": commit(),
        "shape": asdict(shape),
        "gemm_tflops": rate,
        "rows": [asdict(row) for row in rows],
    }
    print(render(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="bench updates", description=__doc__.split("\n")[0])
    parser.add_argument("--policy", default="qwen2.5-1.5b,qwen2.5-3b")
    parser.add_argument("--discriminator", default="qwen2.5-0.5b")
    for name, value in asdict(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, dest=name)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget-s", type=float, default=0.0, help="start no further model after so many seconds")
    parser.add_argument("--json", type=Path)
    return parser


def _ours(
    policy: str, discriminator: str, shape: Shape, device: torch.device, dtype: torch.dtype, rate: float, repeats: int
) -> list[UpdateRow]:
    optim = OptimConfig(learning_rate=1e-5, tokens_per_micro_batch=16_384)
    learner = _policy(_adapted(policy, device, dtype, seed=1), optim)
    judge, judge_optimiser = _discriminator(_adapted(discriminator, device, dtype, seed=2), optim)
    traces, rows = _traces(shape, MODELS[policy]["vocab_size"]), []
    for variant in ("shared", "packed", "padded"):
        batch = pack(traces, device, share=variant != "packed")
        advantages = torch.randn(batch.num_loss_tokens, device=device)
        phases: dict[str, Callable[[], object]] = {
            "discriminator": lambda batch=batch: judge.update(batch, judge_optimiser),
            "score": lambda batch=batch: judge.score(batch),
            "policy": lambda batch=batch, advantages=advantages: learner.update(batch, advantages),
        }
        with padded() if variant == "padded" else nullcontext():
            seconds, peak = {}, None
            for name, phase in phases.items():
                seconds[name], peak = _time(phase, device, repeats)
        work = (
            _policy_flops(learner, pack(traces, torch.device("cpu"))) / 1e12
        )  # the mathematics, a prompt once, whatever ran
        kernel = attention_kernel(learner.lm.backbone, device).name
        rows.append(
            UpdateRow(
                policy=policy,
                discriminator=discriminator,
                variant=variant,
                backend="transformers' SDPA" if variant == "padded" else kernel,
                rows=batch.segments.num_rows if variant != "padded" else _padded_rows(traces),
                seconds=seconds,
                tokens_per_s=batch.num_loss_tokens / sum(seconds.values()),
                peak_mib=peak,
                model_flops_utilisation=work / seconds["policy"] / rate,
            )
        )
    return rows


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


def _trl(policy: str, discriminator: str, shape: Shape, device, dtype, repeats: int) -> UpdateRow:
    from bench.peers.trl_update import update_of

    model = _adapted(policy, device, dtype, seed=1)
    update, version = update_of(model, shape.prompts, shape.group, shape.prompt_tokens, shape.completion_tokens)
    seconds, peak = _time(update, device, repeats)
    tokens = shape.prompts * shape.group * shape.completion_tokens
    return UpdateRow(
        policy=policy,
        discriminator=discriminator,
        variant="trl",
        backend=f"TRL {version} GRPOTrainer, policy update alone",
        rows=shape.prompts * shape.group * (shape.prompt_tokens + shape.completion_tokens),
        seconds={"policy": seconds},
        tokens_per_s=tokens / seconds,
        peak_mib=peak,
        model_flops_utilisation=None,
    )


if __name__ == "__main__":
    sys.exit(main())
