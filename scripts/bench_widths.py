"""Experts of several widths in one layer: run by width, against padded to the widest, and to the old width.

python scripts/bench_widths.py [--hidden 1024] [--width 768] [--experts 64] [--top-k 8] [--align 64] [--device cuda]

Widths are drawn like those of a global budget: any multiple of --align, some experts empty. The floor is the time that
the arithmetic of the kept channels takes at the rate of the padded run.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

from moecli.families.adapter import decoder_layers, empty_model, moe_parts
from moecli.families.ragged import narrow_experts


def experts_of(args: argparse.Namespace) -> torch.nn.Module:
    config = {
        "model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": args.hidden, "num_experts": args.experts,
        "moe_intermediate_size": args.width, "num_experts_per_tok": args.top_k, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    parts = moe_parts(decoder_layers(empty_model(config, getattr(torch, args.dtype)))[1][0])
    assert parts is not None
    experts = parts.experts.to_empty(device=args.device)
    for value in experts.parameters():
        torch.nn.init.normal_(value, std=0.02)
    return experts


def seconds(experts: torch.nn.Module, inputs: tuple[torch.Tensor, ...], repeats: int) -> float:
    """Median of single runs."""
    taken = []
    with torch.inference_mode():
        for _ in range(repeats + 2):
            start = time.perf_counter()
            experts(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return sorted(taken[2:])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in (("hidden", 1024), ("width", 768), ("experts", 64), ("top-k", 8), ("align", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    rng = torch.Generator().manual_seed(0)
    steps = args.width // args.align
    widths = (torch.randint(0, steps + 1, (args.experts,), generator=rng) * args.align).tolist()
    old = experts_of(args)
    ragged, padded = copy.deepcopy(old), copy.deepcopy(old)
    narrow_experts(ragged, widths)
    narrow_experts(padded, [max(widths)] * args.experts)
    part = sum(widths) / (args.width * args.experts)
    shape = f"{args.experts} experts of {args.width} x {args.hidden}"
    print(f"{shape}, {len(set(widths))} widths, {part:.0%} kept, {args.dtype}")
    print("| tokens | old width | widest | by width | floor | by width / widest |\n|---|---|---|---|---|---|")
    for tokens in args.tokens:
        hidden = torch.randn(tokens, args.hidden, generator=rng).to(args.device, getattr(torch, args.dtype))
        index = torch.rand(tokens, args.experts, generator=rng).topk(args.top_k).indices.to(args.device)
        weight = torch.full(index.shape, 1 / args.top_k, device=args.device, dtype=hidden.dtype)
        times = [seconds(m, (hidden, index, weight), args.repeats) for m in (old, padded, ragged)]
        floor = times[0] * part
        cells = [f"{t * 1e3:.2f} ms" for t in (*times, floor)]
        print(f"| {tokens} | {' | '.join(cells)} | {times[2] / times[1]:.2f} |", flush=True)
    sizes = [sum(p.nbytes for p in m.parameters()) / 2**20 for m in (old, padded, ragged)]
    print(
        "MiB: "
        + ", ".join(f"{name} {size:.1f}" for name, size in zip(("old", "widest", "by width"), sizes, strict=True))
    )


if __name__ == "__main__":
    main()
