"""GRPO with TRL on airl_kernels. The one line that TRL's own example lacks is `patch()`.

python docs/examples/trl_grpo.py                  # five steps of a tiny model made here, on the CPU
python docs/examples/trl_grpo.py --model DIR      # your model: a local directory or a name on the hub
python docs/examples/trl_grpo.py --lora           # adapters: the output layer is frozen
python docs/examples/trl_grpo.py --compare        # time and memory, with and without the patch
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time

from airl_kernels.integrations import trl as airl_trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TrainerCallback,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

PROMPTS = [f"Count from {a} to {b}." for a in range(4) for b in range(10, 18)]


def even_tokens(completion_ids, **_):
    """The reward: the share of a completion's tokens with an even id."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


class Clock(TrainerCallback):
    """Processor seconds of every step: unlike wall time, nearly the same on a busy machine."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.process_time()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.process_time() - self.began)


def make_model(vocab, hidden, layers):
    """A directory with a Qwen2 of random weights and a tokenizer of single bytes, so that nothing is downloaded."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<end>", *letters])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    folder = tempfile.mkdtemp(prefix="trl-grpo-")
    set_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory or hub name; else a tiny one is made")
    parser.add_argument("--vocab", type=int, default=320, help="of the model made here")
    parser.add_argument("--hidden", type=int, default=64, help="of the model made here")
    parser.add_argument("--layers", type=int, default=2, help="of the model made here")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="completions a step, four to a prompt")
    parser.add_argument("--tokens", type=int, default=16, help="the longest completion")
    parser.add_argument("--lora", action="store_true", help="train adapters of rank 8 instead of every weight")
    parser.add_argument("--unpatched", action="store_true", help="TRL as published")
    parser.add_argument("--compare", action="store_true", help="run both at --vocab 32768 --hidden 256 and print")
    chosen = parser.parse_args()
    if chosen.compare:
        return compare(chosen)

    if not chosen.unpatched:
        airl_trl.patch()  # the one line

    clock = Clock()
    model = chosen.model or make_model(chosen.vocab, chosen.hidden, chosen.layers)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=even_tokens,
        args=GRPOConfig(
            output_dir=tempfile.mkdtemp(prefix="trl-grpo-out-"), max_steps=chosen.steps, num_iterations=2,
            per_device_train_batch_size=chosen.batch, num_generations=4, max_completion_length=chosen.tokens,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, seed=0,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[clock],
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM") if chosen.lora else None,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    trainer.train()
    steps = [log for log in trainer.state.log_history if "step_time" in log]
    # Each generation serves two steps: the second holds an update and nothing else. The first pair warms up.
    updates = slice(3, None, 2) if len(steps) > 3 else slice(-1, None)
    calls = airl_trl.calls()
    if not chosen.unpatched and not calls.linear_logprob:
        raise SystemExit("TRL did not come through the patched function")
    report = {
        "update_s": round(statistics.median(log["step_time"] for log in steps[updates]), 3),
        "update_processor_s": round(statistics.median(clock.seconds[updates]), 3),
        "peak_mib_before_training": round(before),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "loss": [round(log["loss"], 5) for log in steps],
        "linear_logprob_calls": calls.linear_logprob,
    }
    print(json.dumps(report))


def compare(chosen):
    """Each way in a process of its own, because a process remembers its highest memory."""
    size = ["--vocab=32768", "--hidden=256", "--layers=2", "--steps=6", "--batch=16", "--tokens=32"]
    for lora in ([], ["--lora"]):
        for patch in (["--unpatched"], []):
            command = [sys.executable, __file__, *size, *lora, *patch]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print("LoRA       " if lora else "all weights", "published" if patch else "patched  ", end=" ")
            print(output.splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
