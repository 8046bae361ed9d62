"""Measured generation of a random model of a known shape, with all and with half of its experts, beside the roofline.

    python scripts/bench_decode.py                      # Qwen3-30B-A3B with 4 of its 48 layers, 128 and 64 experts
    python scripts/bench_decode.py --packed 4           # all experts, and again with experts of 4 bits that stay packed
    python scripts/bench_decode.py --small --device cpu

Weights are random, so routing is nearly even: more experts are read than by a trained model on text. Time does not
depend on which experts were pruned, so the smaller model is made with 64 experts instead of being pruned to them. With
4 layers the head is a larger part of the work than in the whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from moecli.core.model import ModelSketch, TensorSpec
from moecli.families import adapter, facts_of
from moecli.families.count import count_of
from moecli.methods.eval.speed import Speed, _measured, copy_bandwidth, device_name
from moecli.ops.pack import pack_rows, quantize_rtn
from moecli.ops.roofline import Gpu, decode, gpu_of, prefill, unique_experts
from moecli.runtime.compact_model import moe_blocks
from moecli.runtime.packed import PROJECTIONS, keep_packed, kept

QWEN3 = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 4, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
    "max_position_embeddings": 40960, "norm_topk_prob": True, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    "num_experts_per_tok": 4, "dtype": "float32",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packed", type=int, choices=(2, 3, 4))
    args = parser.parse_args()
    device, config = torch.device(args.device), QWEN3 | (SMALL if args.small else {})
    name = device_name() if device.type == "cuda" else "CPU"
    sheet, copied = gpu_of(name), copy_bandwidth(device)
    print(f"{name}: copying moves {copied / 1e9:.0f} GB/s, sheet {sheet.bandwidth / 1e9 if sheet else 0:.0f} GB/s")
    gpu = sheet or Gpu(name, copied, 1e11, "copied")
    batches = tuple(int(batch) for batch in args.batches.split(","))
    opt = Speed(batch_sizes=batches, prompt=args.prompt, new_tokens=32, repeats=args.repeats)
    rows = []
    for experts in (config["num_experts"], *(() if args.packed else (config["num_experts"] // 2,))):
        model = random_model(config | {"num_experts": experts}, device)
        rows += measured(model, config | {"num_experts": experts}, opt, gpu, device)
        if args.packed:
            pack(model, args.packed, 32 if args.small else 128)
            for row, seconds, peak in timed(model, opt, list(rows), device):
                line = {"packed_bits": args.packed, "ms": 1e3 * seconds, "as_fast": row["ms"] / (1e3 * seconds)}
                rows.append({"what": row["what"], "batch": row["batch"], **line, "peak_gib": (peak or 0) / 2**30})
                show(rows[-1])
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if out := os.environ.get("OUT"):
        with open(os.path.join(out, "bench_decode.json"), "w") as file:
            json.dump({"device": name, "copy": copied, "rows": rows}, file, indent=1)


def random_model(config: dict[str, Any], device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            adapter.parse_config(config), dtype=getattr(torch, config["dtype"])
        ).eval()


def pack(model: Any, bits: int, group_size: int) -> None:
    """Round all experts to nearest and let them stay packed."""
    for block in moe_blocks(model).values():
        for name in PROJECTIONS:
            weight = getattr(block.experts, name).data
            coded = [quantize_rtn(each, bits, group_size) for each in weight]
            shape = torch.tensor(weight.shape[1:])
            blob = kept([[(pack_rows(codes, bits), scale, shape)] for codes, scale in coded])
            setattr(block.experts, name, torch.nn.Parameter(blob, requires_grad=False))
        keep_packed(block.experts)


def timed(
    model: Any, opt: Speed, dense: list[dict[str, Any]], device: torch.device
) -> Iterator[tuple[dict[str, Any], float, int | None]]:
    """Each row of the dense model, the median seconds of this one, and its peak memory."""
    for batch in opt.batch_sizes:
        found = _measured(model, opt, batch, SimpleNamespace(device=device, seed=0))
        for row in dense:
            if row["batch"] == batch and "packed_bits" not in row:
                seconds = found.prefill_s if row["what"] == "prefill" else found.decode_s
                yield row, statistics.median(seconds), found.peak_bytes


def show(row: dict[str, Any]) -> None:
    print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)


def measured(model: Any, config: dict[str, Any], opt: Speed, gpu: Gpu, device: torch.device) -> list[dict[str, Any]]:
    specs = {n: TensorSpec(str(p.dtype).removeprefix("torch."), tuple(p.shape)) for n, p in model.state_dict().items()}
    count = count_of(ModelSketch(facts_of(config), config, specs))
    rows = []
    for batch in opt.batch_sizes:
        found = _measured(model, opt, batch, SimpleNamespace(device=device, seed=0))
        context = opt.prompt + opt.new_tokens // 2
        bounds = {"prefill": prefill(count, gpu, batch, opt.prompt), "decode": decode(count, gpu, batch, context)}
        for what, tokens, seconds in (
            ("prefill", batch * opt.prompt, found.prefill_s),
            ("decode", batch, found.decode_s),
        ):
            median = statistics.median(seconds)
            rows.append({
                "experts": config["num_experts"], "what": what, "batch": batch, "ms": 1e3 * median,
                "fastest_ms": 1e3 * min(seconds), "tokens_per_s": tokens / median,
                "floor_ms": 1e3 * bounds[what].seconds, "ratio": median / bounds[what].seconds,
                "peak_gib": (found.peak_bytes or 0) / 2**30, "estimated_gib": bounds[what].memory_bytes / 2**30,
                "unique_experts": unique_experts(config["num_experts"], count.top_k, tokens),
            })  # fmt: skip
            show(rows[-1])
    return rows


if __name__ == "__main__":
    main()
