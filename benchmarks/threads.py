"""What the CPU threads of engines and learner ranks bring: `python benchmarks/threads.py`.

Trains a few steps of two recipes, once with one thread in each process and once with the idle cores in each stage
(`rollout.threads`, `learner.threads` and `reward.threads` not given): the demo's, and one with random weights in the
shape of SmolLM2-135M under a function reward. Ratios are medians of the steps after the first, within this run.
"""

import json
import os
import platform
import statistics
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from c2f_ray import load_recipe, train
from c2f_ray.runtime.threads import available_cores
from c2f_ray.watch.metrics import read_metrics

RESULT = Path(__file__).parent / "results" / "threads.json"
ROLES = ("rollout", "learner", "reward")
STAGES = ("rollout", "learner", "step")
# The shape of HuggingFaceTB/SmolLM2-135M: 134.5 million parameters, embeddings tied.
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
REWARD = """
def score(samples):
    return [len(sample.response) / 100 for sample in samples]
"""


def write_model(folder: Path) -> None:
    """Writes random weights in SmolLM2-135M's shape, with one word for each token."""
    torch.manual_seed(0)
    words = {"<eos>": 0, **{f"w{number}": number for number in range(1, SHAPE["vocab_size"])}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", chat_template=template
    ).save_pretrained(folder)
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=0, pad_token_id=0, dtype="float32")
    LlamaForCausalLM(config).save_pretrained(folder)


def seconds(settings: list[str], recipe: str, name: str, threads: list[str]) -> dict[str, float]:
    """Returns the median seconds of each stage, without the first step's."""
    folder = train(load_recipe(recipe, *settings, *threads, f"run.name={name}"), fresh=True)
    lines = read_metrics(folder / "metrics.jsonl")[1:]
    return {stage: statistics.median(line[f"time/{stage}_s"] or 0.0 for line in lines) for stage in STAGES}


def main() -> None:
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "cores": available_cores(),
    }
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        write_model(Path("model"))
        Path("rewards.py").write_text(REWARD)
        prompts = [{"id": str(number), "messages": f"w{number} w{2 * number}"} for number in range(1, 65)]
        Path("prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        large = [
            "run.steps=4", "policy.model=model", "policy.chat_template=model", "prompts.source=prompts.jsonl",
            "prompts.per_step=16", "length={rule: fixed, max_tokens: 48}", "evaluate=null", "merge=null",
            "reward={kind: function, function: 'rewards:score'}", "learner.optimizer.lr=1e-6", "rollout.memory=1.0",
            "learner.tokens_per_microbatch=1024",
        ]  # fmt: skip
        for name, settings in (("demo", ["run.steps=8", "length={rule: fixed, max_tokens: 96}"]), ("135M", large)):
            roles = ROLES if name == "demo" else ROLES[:2]  # a function has no threads of its own
            one = [f"{role}.threads=1" for role in roles]
            before = seconds(settings, "tiny", f"{name}-one", one)
            after = seconds(settings, "tiny", f"{name}-idle", [])
            ratios = {stage: round(after[stage] / before[stage], 3) for stage in STAGES}
            result[name] = {"one_thread_s": before, "idle_cores_s": after, "ratio": ratios}
            print(name, json.dumps(result[name]), flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("demo", "135M"):
        ratio = result[name]["ratio"]["step"]
        print(
            f"goal {name}, step with idle cores over one thread: {ratio:.2f} (<= 1) {'ok' if ratio <= 1 else 'missed'}"
        )


if __name__ == "__main__":
    main()
