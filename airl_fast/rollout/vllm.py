"""vLLM as the sampler, in the trainer's process: prompts as ids in, ids with the log-probabilities of the sampling
distribution out, and the trainer's weights after every push.

Full weights are copied into the engine's own, in place. Adapters go through PEFT's files: each version has its own
directory and number, and the one before is removed first, so that it cannot be sampled again. Either way the prefix
cache is emptied. How sampler and trainer are kept in step is in probe.py; docs/vllm.md is the manual.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.models import adapters
from airl_fast.models.load import LanguageModel
from airl_fast.rollout.engine import Sample, SamplingParams, SyncStats
from airl_fast.rollout.probe import Scored, Sentinel, trainer_logprobs
from airl_fast.rollout.residue import restored

# Read while vLLM is imported and an engine starts; what the user has set stays.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_CPU_BLOCK = 32  # tokens; whole blocks are shared between samples of a prompt, and vLLM's 128 exceed many prompts
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of adapters that vLLM has room for
_MIB, _GIB = 2**20, 2**30
_NO_MEMORY = ("memory", "KV cache", "cache blocks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an engine must hold. longest: tokens of prompt and completion. sequences: decoded at once. probes: scored
    by the sentinel. scratch: a directory of the engine's own for adapters; it is emptied, and deleted at the end."""

    longest: int
    sequences: int
    probes: tuple[Scored, ...]
    scratch: Path


def require(config: Config, lm: LanguageModel) -> None:
    """UserError when the configuration asks for a vLLM that is not here or cannot run `lm` on its device."""
    key = "rollout.engine=vllm"
    if find_spec("vllm") is None:
        raise UserError(
            f"{key} needs the package vllm, which is not installed; install it as docs/vllm.md says, "
            "or set rollout.engine=builtin."
        )
    lora, text = config.model.lora, lm.model.config.get_text_config()
    if lora is not None and lora.rank > _RANKS[-1]:
        raise UserError(
            f"{key} holds adapters of rank {_RANKS[-1]} at most, not model.lora.rank={lora.rank}; lower it."
        )
    if lora is None and adapters.is_quantised(lm.model):
        raise UserError(f"{key} takes no 4-bit weights; train adapters over them (model.lora).")
    with restored(**_ENVIRONMENT):
        try:
            from vllm.platforms import current_platform
        except ImportError as error:
            raise UserError(
                f"{key}: the package vllm does not load ({_first_line(error)}); install it again."
            ) from None
    if current_platform.device_type != lm.device.type:
        raise UserError(
            f"{key}: this vllm runs on {current_platform.device_type or 'no device here'} and the policy on "
            f"{lm.device.type}; install vllm for {lm.device.type}, or set rollout.engine=builtin."
        )
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if current_platform.is_cpu() and size not in (sizes := _cpu_head_sizes()):
        raise UserError(
            f"{key}: on the CPU vllm has no attention for heads of {size}, only for {', '.join(map(str, sizes))}; "
            "choose another model (model.build.heads), or set rollout.engine=builtin."
        )


class VllmEngine:
    """A vLLM engine around the weights in `directory`, which are those of `lm`, the start policy without adapters.

    It holds the weights unquantised, whatever the trainer does.
    """

    def __init__(self, config: Config, lm: LanguageModel, directory: Path, needs: Needs) -> None:
        require(config, lm)
        _refuse_other_factors(lm, needs.longest)
        self._needs, self._lora = needs, config.model.lora
        self._sentinel, self._probes = Sentinel(config.rollout.sync_ceiling), needs.probes
        self._vocabulary, self._adapter, self._count = lm.num_tokens, None, 0
        self._gpus = [] if lm.device.type == "cpu" else [lm.device]
        memory = _memory(config, lm, needs)
        with restored(**_ENVIRONMENT):
            import vllm

            try:
                with _weights_in_place(lm.device):
                    self._llm = vllm.LLM(str(directory), **_options(config, lm, needs), **memory)
                self._llm.apply_model(lambda model: _hide_padding(model, lm.num_tokens))
            except Exception as error:  # vLLM raises whatever its parts raise
                _clean_up()
                raise _start_failed(config, directory, error) from error
        self.name = (
            f"vLLM {vllm.__version__} on {lm.device.type}, {needs.sequences} sequences of {needs.longest} tokens"
        )
        if "kv_cache_memory_bytes" in memory:
            self.name += f", KV cache {memory['kv_cache_memory_bytes'] / _MIB:.1f} MiB"
        self._recreate_scratch()

    def sample(self, prompts: Sequence[Sequence[int]], per_prompt: int, params: SamplingParams) -> list[list[Sample]]:
        """Each prompt's draws have seeds of their own, from `params.seed` and the prompt's place."""
        import vllm

        self._check_prompts(prompts, params.max_new_tokens)
        self._forget_prefixes()  # what an earlier call left there changes the last bits of this one's logits
        greedy = params.temperature == 0  # vLLM refuses several greedy samples: they are one
        requests = [
            vllm.SamplingParams(
                n=1 if greedy else per_prompt,
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_new_tokens,
                seed=random.Random(f"{params.seed}/{place}").getrandbits(62),  # sample i of the prompt gets seed + i
                logprobs=0,  # of the chosen token alone
                stop_token_ids=sorted(params.ends),
                ignore_eos=True,
                detokenize=False,
            )
            for place in range(len(prompts))
        ]
        groups = []
        for output in self._generate(prompts, requests):
            drawn = sorted(output.outputs, key=lambda one: one.index)
            groups.append([_sample(one, greedy) for one in drawn] * (per_prompt if greedy else 1))
        return groups

    def push(self, lm: LanguageModel, version: str) -> None:
        if self._lora is None:
            self._push_weights(lm, version)
        else:
            self._push_adapter(lm, version)
        self._forget_prefixes()

    def check(self, lm: LanguageModel, version: str) -> SyncStats:
        return self._sentinel.judge(trainer_logprobs(lm, self._probes), self._probe_logprobs(), version)

    def close(self) -> None:
        if self._llm is None:
            return
        with restored():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            _clean_up()
        shutil.rmtree(self._needs.scratch, ignore_errors=True)

    # ---- weights ----

    @torch.no_grad()
    def _push_weights(self, lm: LanguageModel, version: str) -> None:
        if adapters.is_adapted(lm.model) or adapters.is_quantised(lm.model):
            raise TypeError(f"{version}: a model with adapters or 4-bit weights has no full weights to push")
        loaded: set[str] = set()
        own: set[str] = set()

        def load(model: torch.nn.Module) -> None:
            loaded.update(model.load_weights((name, weight.detach()) for name, weight in lm.model.named_parameters()))
            own.update(name for name, _ in model.named_parameters())

        self._llm.apply_model(load)
        if own - loaded:
            raise UserError(f"rollout.engine=vllm: {sorted(own - loaded)[0]} did not reach the sampler at {version}; "
                            "set rollout.engine=builtin.")  # fmt: skip

    def _push_adapter(self, lm: LanguageModel, version: str) -> None:
        from vllm.lora.request import LoRARequest

        engine, before = self._llm.llm_engine, self._adapter
        self._adapter = None
        if before is not None:
            engine.remove_lora(before.lora_int_id)
            shutil.rmtree(before.lora_path, ignore_errors=True)
        if not adapters.is_adapted(lm.model):  # the start policy
            return
        self._count += 1
        folder = self._needs.scratch / f"v{self._count}"
        folder.mkdir()
        adapters.save_adapter(lm.model, folder)
        request = LoRARequest(f"v{self._count}", self._count, str(folder))
        if not engine.add_lora(request) or set(engine.list_loras()) != {self._count}:
            raise UserError(f"rollout.engine=vllm did not load the adapter of {version}; set rollout.engine=builtin.")
        self._adapter = request

    def _forget_prefixes(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: a request is still running")

    def _recreate_scratch(self) -> None:
        shutil.rmtree(self._needs.scratch, ignore_errors=True)  # of a run that was killed
        self._needs.scratch.mkdir(parents=True)

    # ---- requests ----

    def _generate(self, prompts: Sequence[Sequence[int]], params):
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with torch.random.fork_rng(self._gpus):  # it draws from torch's own generator beside those of the requests
            return self._llm.generate(requests, params, use_tqdm=False, lora_request=self._adapter)

    def _check_prompts(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """vLLM rejects all prompts with a bad one, some of them only when half of them are under way."""
        for place, prompt in enumerate(prompts):
            wrong = next((token for token in prompt if not 0 <= token < self._vocabulary), None)
            problem = None
            if not prompt:
                problem = "is empty"
            elif wrong is not None:
                problem = f"holds the id {wrong}, which no token of the vocabulary has (0 to {self._vocabulary - 1})"
            elif len(prompt) + max_new_tokens > self._needs.longest:
                problem = (
                    f"has {len(prompt)} tokens and asks for {max_new_tokens} more, but the sampler was started for "
                    f"{self._needs.longest} in all"
                )
            if problem is not None:
                raise UserError(f"prompt {place} of {len(prompts)} {problem}; correct it or leave it out.")

    def _probe_logprobs(self) -> torch.Tensor:
        import vllm

        params = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._generate([probe.prompt + probe.completion for probe in self._probes], params)
        found = []
        for probe, output in zip(self._probes, outputs, strict=True):
            scored = output.prompt_logprobs[len(probe.prompt) :]
            found += [given[token].logprob for token, given in zip(probe.completion, scored, strict=True)]
        return torch.tensor(found)


def _sample(output, greedy: bool) -> Sample:
    tokens = tuple(output.token_ids)
    logprobs = (given[token].logprob for token, given in zip(tokens, output.logprobs, strict=True))
    # Greedy: the distribution is a point.
    return Sample(
        tokens=tokens,
        logprobs=(0.0,) * len(tokens) if greedy else tuple(logprobs),
        finished=output.finish_reason == "stop",
    )


# ---------------------------------------------------------------------------------------------- starting and ending


def _options(config: Config, lm: LanguageModel, needs: Needs) -> dict[str, object]:
    options: dict[str, object] = {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's own: penalties, a top-k; its ends come with requests
        "dtype": config.model.dtype,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_len": needs.longest,
        "max_num_seqs": needs.sequences,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is drawn from
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if config.model.lora is not None:
        rank = next(rank for rank in _RANKS if rank >= config.model.lora.rank)
        options |= {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}
        # Not the output layer, which is never adapted: a Llama with room for that cannot score a prompt.
        options["lora_target_modules"] = _layers(lm)
    if lm.device.type == "cpu":
        options |= {"enforce_eager": True, "block_size": _CPU_BLOCK}
    return options


def _layers(lm: LanguageModel) -> list[str]:
    """Last names of the linear layers below the output layer: q_proj, down_proj, …"""
    modules = lm.backbone.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear)})


@contextmanager
def _weights_in_place(device: torch.device) -> Iterator[None]:
    """On the CPU, vLLM's layers would repack their weights into another library's own form while they are loaded and
    drop them: nothing could be loaded into them again, and a tied output layer would go on with the old weights. In
    this block they become plain products with the weights where they are, as on a GPU. And its sampling helpers stay
    uncompiled: a C++ compiler may be absent, and takes longer than a small run samples."""
    if device.type != "cpu":
        yield
        return
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    repack, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, dispatch
    type(current_platform).simple_compile_backend = "eager"
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = repack


def _refuse_other_factors(lm: LanguageModel, longest: int) -> None:
    """vLLM gives a longrope model its long factors for every sequence once its context allows a long one, and a dynamic
    one the same scaled factors for every sequence. The trainer's depend on each sequence's own length."""
    regimes, key = lm.regimes, "rollout.engine=vllm"
    if regimes.growing is not None:
        raise UserError(
            f"{key} scales the rotary factors of a {type(lm.model).__name__} (dynamic) for every sequence, the trainer "
            f"only above {regimes.growing} tokens; set rollout.engine=builtin."
        )
    end = next((end for end in regimes.switches if end < longest), None)
    if end is not None:
        raise UserError(
            f"{key} with a context of {longest} tokens (the longest prompt and rollout.max_new_tokens) takes the long "
            f"rotary factors of a {type(lm.model).__name__} for every sequence, the trainer only for those above {end} "
            "tokens; lower rollout.max_new_tokens, or set rollout.engine=builtin."
        )


def _memory(config: Config, lm: LanguageModel, needs: Needs) -> dict[str, float]:
    """vLLM's memory arguments: on a GPU its share of the device, on the CPU as much cache as one rollout can use."""
    share = config.rollout.gpu_memory
    if lm.device.type != "cpu":
        return {"gpu_memory_utilization": share}
    import psutil

    total = psutil.virtual_memory().total
    weights = sum(p.numel() for p in lm.model.parameters()) * getattr(torch, config.model.dtype).itemsize
    one = _cache_bytes(config, lm, needs.longest)
    room = share * total - weights
    if room < 2 * one:  # one block is vLLM's own
        raise UserError(
            f"rollout.gpu_memory={share:g}: that share of this machine's {total / _GIB:.1f} GiB memory is "
            f"{share * total / _MIB:.2f} MiB, but the sampler needs {weights / _MIB:.2f} MiB for the weights and "
            f"{2 * one / _MIB:.2f} MiB to decode one sequence of {needs.longest} tokens; raise it or lower "
            "rollout.max_new_tokens."
        )
    return {"kv_cache_memory_bytes": int(min(room, (needs.sequences + 1) * one))}


def _cache_bytes(config: Config, lm: LanguageModel, tokens: int) -> int:
    """Keys and values of one sequence, in whole blocks."""
    text = lm.model.config.get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    blocks = -(-tokens // _CPU_BLOCK)
    return 2 * text.num_hidden_layers * heads * size * blocks * _CPU_BLOCK * getattr(torch, config.model.dtype).itemsize


def _hide_padding(model: torch.nn.Module, known: int) -> None:
    """Rows of the output layer from `known` on stand for no token: they get no probability, as in the trainer."""
    compute = model.compute_logits

    def without_padding(*args, **kwargs):
        logits = compute(*args, **kwargs)
        if logits is not None and logits.shape[-1] > known:
            logits[..., known:] = float("-inf")
        return logits

    model.compute_logits = without_padding


def _cpu_head_sizes() -> list[int]:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend.get_supported_head_sizes()


def _clean_up() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _start_failed(config: Config, directory: Path, error: Exception) -> UserError:
    reason = _first_line(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in _NO_MEMORY):
        return UserError(
            f"rollout.gpu_memory={config.rollout.gpu_memory:g}: vLLM does not fit into the memory ({reason}); free "
            "some, change that share, or lower rollout.max_new_tokens."
        )
    return UserError(
        f"rollout.engine=vllm: vLLM does not start with {directory} ({reason}); set rollout.engine=builtin."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
