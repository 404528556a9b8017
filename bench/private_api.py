"""What we use of torch, transformers and Triton that their documentation promises to nobody, and what we expect of it.

`problems()` compares each entry with the installed versions; a test compares the list with the sources. Entries:

- Operator: a torch operator. positional: its first arguments, in the order in which we give them; named: those that
  we give by name.
- Thing: a function, class or attribute, by where it is. named: parameters that we give it.
"""

import importlib
import inspect
import operator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """path: torch.ops.NAMESPACE.NAME. overload: of its schemas."""

    path: str
    positional: tuple[str, ...]
    named: tuple[str, ...] = ()
    overload: str = "default"

    def problem(self) -> str | None:
        import torch

        try:
            schema = operator.attrgetter(f"{self.path.removeprefix('torch.')}.{self.overload}")(torch)._schema
        except AttributeError:
            return f"{self.path} has no overload {self.overload}"
        have = [argument.name for argument in schema.arguments]
        if tuple(have[: len(self.positional)]) != self.positional:
            return f"{self.path} takes {', '.join(have)}; we give {', '.join(self.positional)}"
        missing = [name for name in self.named if name not in have]
        return f"{self.path} has no argument {', '.join(missing)}" if missing else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    path: str
    named: tuple[str, ...] = ()

    def problem(self) -> str | None:
        try:
            found = _resolve(self.path)
        except (ImportError, AttributeError) as error:
            return f"{self.path} is not there: {error}"
        if not self.named:
            return None
        have = inspect.signature(found).parameters
        missing = [name for name in self.named if name not in have]
        return f"{self.path} has no parameter {', '.join(missing)}" if missing else None


def _resolve(path: str) -> object:
    """The longest prefix that is a module, then attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return operator.attrgetter(".".join(parts[cut:]))(found) if cut < len(parts) else found
    raise ImportError(f"no module {parts[0]}")


_FLASH = ("cum_seq_q", "cum_seq_k", "max_q", "max_k")
_BACKWARD = ("grad_out", "query", "key", "value", "out", "logsumexp")
_ATEN = "torch.ops.aten."
_CPU_FLASH = f"{_ATEN}_scaled_dot_product_flash_attention_for_cpu"
LISTED: tuple[Operator | Thing, ...] = (
    Operator(
        path=f"{_ATEN}_flash_attention_forward",
        positional=("query", "key", "value", *_FLASH, "dropout_p", "is_causal", "return_debug_mask"),
        named=("scale",),
    ),
    Operator(
        path=f"{_ATEN}_flash_attention_backward",
        positional=(*_BACKWARD, *_FLASH, "dropout_p", "is_causal", "rng_state", "unused"),
        named=("scale",),
    ),
    Operator(path=_CPU_FLASH, positional=("query", "key", "value", "dropout_p", "is_causal"), named=("scale",)),
    Operator(
        path=f"{_CPU_FLASH}_backward",
        positional=(*_BACKWARD, "dropout_p", "is_causal"),
        named=("scale",),
    ),
    Operator(  # torch.addmm(..., out_dtype=, out=)
        path=f"{_ATEN}addmm",
        overload="dtype_out",
        positional=("self", "mat1", "mat2", "out_dtype"),
        named=("beta", "out"),
    ),
    Operator(path=f"{_ATEN}_local_scalar_dense", positional=("self",)),
    Operator(path=f"{_ATEN}_index_put_impl_", positional=("self", "indices", "values"), named=("accumulate", "unsafe")),
    Thing(path="torch._dynamo.reset"),
    Thing(path="torch._subclasses.FakeTensor"),
    Thing(path="torch.cuda._sleep"),
    Thing(path="torch.utils._python_dispatch.is_traceable_wrapper_subclass"),
    Thing(path="triton.runtime.interpreter._patch_lang", named=("fn",)),
    # bench/pretend.py, bench/recording.py and bench/stubs.py
    Thing(path="torch._C.TensorBase"),
    Thing(path="torch.ops.aten.mm.default._schema"),
    Thing(path="torch.utils._python_dispatch.TorchDispatchMode"),
    Thing(path="triton.knobs"),
    Thing(path="triton.runtime.jit.JITFunction.preload", named=("specialization_data",)),
    Thing(path="triton.runtime.jit.JITFunction.run", named=("grid", "warmup")),
    Thing(path="triton.runtime.driver.driver._active"),
    Thing(path="triton.compiler.CompiledKernel._init_handles"),
    Thing(path="triton.runtime.cache.triton_key"),
    Thing(path="triton.runtime.build._build", named=("name", "src")),
    Thing(path="triton.runtime.build._load_module_from_path", named=("name", "path")),
    Thing(path="triton.backends.compiler.GPUTarget"),
    Thing(path="triton.backends.nvidia.driver"),
    # the trainer's hold on transformers
    Thing(path="transformers.AttentionInterface.register", named=("key", "value")),
    Thing(path="transformers.AttentionMaskInterface.register", named=("key", "value")),
    Thing(
        path="transformers.integrations.sdpa_attention.sdpa_attention_forward",
        named=("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    ),
    Thing(path="transformers.masking_utils.sdpa_mask"),
    Thing(path="transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE"),
    Thing(path="transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES"),
    Thing(path="transformers.models.auto.tokenization_auto.tokenizer_class_from_name"),
    Thing(path="transformers.utils.import_utils.DummyObject"),
    Thing(path="transformers.modeling_layers.GradientCheckpointingLayer"),
    Thing(path="transformers.utils.logging.disable_progress_bar"),
    Thing(path="transformers.PreTrainedModel._hf_peft_config_loaded"),
    Thing(path="transformers.PreTrainedModel._can_set_attn_implementation"),
    Thing(path="transformers.PreTrainedModel.set_attn_implementation"),
    Thing(path="transformers.PretrainedConfig._attn_implementation"),
)
# Private names that need no entry: of Python itself, of every torch module (which makes them when it is made), and of
# a package that need not be there (its absence is said).
EXEMPT = {
    "_asdict",
    "_exit",
    "_SubParsersAction",
    "_forward_pre_hooks",
    "_wrapped_flash_attn_varlen_forward",
    "_wrapped_flash_attn_varlen_backward",
}


def problems() -> list[str]:
    """A sentence per entry that the installed versions do not hold to."""
    return [found for entry in LISTED if (found := entry.problem()) is not None]
