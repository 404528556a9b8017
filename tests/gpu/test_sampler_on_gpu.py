"""The built-in sampler on the GPU: captured steps draw what the plain loop draws, follow the weights, and let go."""

import copy
import dataclasses
import threading

import pytest
import torch

from tests.gpu.device import DEVICE, ON_GPU, gpu_only, needs_device, pick

transformers = pytest.importorskip("transformers")
builtin = pytest.importorskip("airl_fast.rollout.builtin", reason="needs the trainer's sources")
from airl_fast.models.load import LanguageModel, wrap  # noqa: E402  (after the check that it is there)
from airl_fast.rollout.engine import SamplingParams  # noqa: E402
from airl_fast.rollout.static import Static  # noqa: E402

pytestmark = needs_device
VOCABULARY = 320
PARAMS = SamplingParams(
    temperature=1.0, top_p=1.0, max_new_tokens=pick(150, 40), end_token=3, other_ends=(17,), seed=1, batch_size=2048
)
LENGTHS = (5, 40, 1, 17)


def language_model(
    architecture: str = "qwen2", dtype=torch.float32, *, layers: int = 2, seed: int = 4
) -> LanguageModel:
    """Weights wide enough that no distribution is nearly uniform; an end every thirty tokens or so."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(
        architecture, vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=192, max_position_embeddings=1024, initializer_range=0.09,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return wrap(model.to(DEVICE, dtype), None)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def both(lm, params=PARAMS, per_prompt: int = pick(32, 4), static: Static | None = None):
    plain = builtin.sample(lm, prompts(), per_prompt, params)
    return plain, builtin.sample(lm, prompts(), per_prompt, params, static or Static())


def flat(groups):
    return [one for group in groups for one in group]


def assert_same(plain, captured, tolerance: float = 1e-4) -> None:
    """Equal samples; a rounding of the float32 logits may turn one draw in ten thousand, and what follows it, or put
    one more token into a nucleus, which lowers the others' log-probabilities."""
    pairs = list(zip(flat(plain), flat(captured), strict=True))
    same = sum(
        (a.tokens, a.finished) == (b.tokens, b.finished)
        and all(abs(x - y) <= tolerance for x, y in zip(a.logprobs, b.logprobs, strict=True))
        for a, b in pairs
    )
    assert same >= len(pairs) - max(1, len(pairs) // 50)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled", "nucleus"]
)
def test_captured_steps_draw_what_the_plain_loop_draws(architecture, changes):
    lm, static = language_model(architecture), Static()
    plain, captured = both(lm, dataclasses.replace(PARAMS, **changes), static=static)
    assert_same(plain, captured)
    assert changes.get("temperature") == 0.0 or len({one.finished for one in flat(plain)}) == 2
    if ON_GPU:
        graphs = static._decoder.graphs
        assert graphs.captured >= 1
        before = graphs.captured
        again = builtin.sample(lm, prompts(), pick(32, 4), dataclasses.replace(PARAMS, **changes), static)
        assert_same(captured, again, 1e-5)
        assert graphs.captured >= before and static._decoder.graphs is graphs


def test_bfloat16_has_the_log_probabilities_of_the_plain_loop():
    """The draws part with the first rounding that turns one; the first token's distribution is the same state's."""
    lm = language_model(dtype=torch.bfloat16)
    plain, captured = both(lm, dataclasses.replace(PARAMS, temperature=0.0))
    same = sum(a.tokens == b.tokens for a, b in zip(flat(plain), flat(captured), strict=True))
    shared = [
        next((i for i, (s, t) in enumerate(zip(a.tokens, b.tokens, strict=False)) if s != t), len(a.tokens))
        for a, b in zip(flat(plain), flat(captured), strict=True)
    ]
    print(f"bfloat16, greedy: {same} of {len(shared)} whole samples equal, equal to token {min(shared)} at least")
    assert min(shared) >= 1
    plain, captured = both(lm, dataclasses.replace(PARAMS, max_new_tokens=2))
    for a, b in zip(flat(plain), flat(captured), strict=True):
        if a.tokens == b.tokens:
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=0.1, rtol=0)


def test_captured_steps_follow_weights_changed_in_place_and_see_moved_ones():
    lm, static = language_model(), Static()
    before = both(lm, static=static)[0]
    decoder = static._decoder
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(1.05)
    plain, captured = both(lm, static=static)
    assert_same(plain, captured)
    assert plain != before and static._decoder is decoder
    for parameter in lm.model.parameters():
        parameter.data = parameter.data.clone() * 0.9
    assert_same(*both(lm, static=static))
    assert static._decoder is not decoder


def test_adapters_are_captured_as_they_are():
    pytest.importorskip("peft")
    from peft import LoraConfig

    lm = language_model()
    adapted = copy.deepcopy(lm.model)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    adapted.eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    other = dataclasses.replace(lm, model=adapted)
    plain, captured = both(other)
    assert_same(plain, captured)
    assert plain != both(lm)[0]


@gpu_only
def test_what_it_held_is_free_after_release():
    lm, static = language_model(), Static()

    both(lm)  # cuBLAS keeps a workspace for each stream, the capturing one among them
    before = torch.cuda.memory_allocated()
    both(lm, static=static)
    assert static._decoder is not None  # small: kept for the next call
    held = torch.cuda.memory_allocated() - before
    assert held > 2**24
    static.release()
    assert torch.cuda.memory_allocated() - before <= held // 10


@gpu_only
def test_another_thread_may_use_the_gpu_while_steps_are_captured():
    """As the discriminator's update does beside a rollout: it allocates, and its stream is its own."""
    lm, stop, failed = language_model(), threading.Event(), []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                numbers = torch.ones(1 << 20, device=DEVICE)
                while not stop.is_set():
                    numbers.mul(2).sum().item()
                    torch.empty(64 << 20, device=DEVICE)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for seed in range(3):
            assert_same(*both(lm, dataclasses.replace(PARAMS, seed=seed)))
    finally:
        stop.set()
        thread.join()
    assert not failed


@gpu_only
def test_a_deep_small_model_is_no_longer_bound_by_launches():
    """Launches are counted: how long they take depends on who shares the GPU, here the other tests."""
    lm, static = language_model(dtype=torch.bfloat16, layers=24), Static()
    params = dataclasses.replace(PARAMS, end_token=-1, other_ends=(), max_new_tokens=100)

    def launches(*path) -> int:
        with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as seen:
            builtin.sample(lm, prompts(), 16, params, *path)
            torch.cuda.synchronize()
        return sum(event.count for event in seen.key_averages() if "LaunchKernel" in event.key)

    builtin.sample(lm, prompts(), 16, params, static)  # captures
    captured, plain = launches(static), launches()
    print(f"24 layers, 64 rows, 100 tokens: {captured} launches besides those in graphs, {plain} step by step")
    assert plain > 24 * 100
    assert captured < plain / 10
