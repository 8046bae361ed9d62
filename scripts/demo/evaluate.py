"""Measure the demo model with lm-eval: as it is, and with a random half of its experts dropped.

    python -m scripts.demo.evaluate --model moecli/demo/model --tasks moecli/demo/tasks

`--seeds 0` measures the model alone; by default 8 of 16 experts stay, chosen by three seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo.dropping import drop_experts

TASKS = ["demo", "demo_perplexity"]


def load(folder: Path) -> torch.nn.Module:
    """The model in float32, which CPUs run several times faster than bfloat16."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"{folder} does not load cleanly: {info}")
    return model.eval()


def measure(model: torch.nn.Module, tokenizer, tasks: Path) -> dict[str, float]:
    """Accuracy of each task and of the group, bits per byte of the text."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, max_length=512, device="cpu")
    manager = TaskManager(include_path=[str(tasks)], include_defaults=False)
    found = simple_evaluate(model=lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)
    figures = {}
    for task, values in found["results"].items():
        for metric in ("acc,none", "bits_per_byte,none"):
            if metric in values:
                figures[task] = round(float(values[metric]), 4)
    return figures


def main() -> None:
    """Measure and print one JSON object per variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=8, help="experts left per layer when dropping")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    variants = ["base", *(f"keep {options.keep}, seed {i}" for i in range(options.seeds))]
    for seed, name in enumerate(variants, start=-1):
        model, started = load(options.model), time.monotonic()
        if seed >= 0:
            drop_experts(model, options.keep, seed)
        figures = measure(model, tokenizer, options.tasks)
        seconds = round(time.monotonic() - started, 1)
        print(json.dumps({"variant": name, "seconds": seconds, **figures}), flush=True)


if __name__ == "__main__":
    main()
