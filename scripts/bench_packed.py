"""Time of an MoE layer's experts in decode, packed against bfloat16, beside the bytes that must be read.

    python scripts/bench_packed.py
    python scripts/bench_packed.py --tune 4,2    # every shape of a product first, and takes the best
    for n in $(seq 0 13); do python scripts/bench_packed.py --tune 4,2 --compile $n & done; wait    # on all cores

Shape of Qwen3-30B-A3B: width 2048, 128 experts of 768 channels, 8 a token; groups of 128. Random routing without
repetition for each token. Times are those of CUDA graphs over several layers, each with its own weights and routing, so
that nothing is found in the L2 cache and no launch waits for the host: experts' products, gating and weighted sum,
without router and attention. Floor: codes and scales of the experts that are hit, once, at the data sheet's bandwidth.
`grouped_mm` sorts and multiplies as transformers does; `gather` copies the weights of every visit and multiplies
them as a batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from moecli.methods.eval.speed import copy_bandwidth, device_name
from moecli.ops import packed as twin
from moecli.ops.kernels import grouped
from moecli.ops.kernels import packed as fast
from moecli.ops.kernels.packed import Shape
from moecli.ops.packed import Packed
from moecli.ops.roofline import gpu_of

HIDDEN, WIDTH, EXPERTS, SLOTS, GROUP = 2048, 768, 128, 8, 128
LAYERS = 6
ALONE = [Shape(rows, 8, parts, parts, stages) for rows, parts, stages in (
    (16, 4, 3), (16, 4, 4), (16, 8, 1), (16, 8, 2), (16, 8, 3), (16, 8, 4), (16, 16, 1), (16, 16, 2), (32, 8, 3),
)]  # fmt: skip
COMBINED = [Shape(rows, 8, 8, 8, stages) for rows in (16, 32) for stages in (2, 3, 4, 6)]
TOGETHER = [Shape(rows, visits, 1, warps, stages) for rows, visits, warps, stages in itertools.chain(
    itertools.product((64, 128), (8, 16), (4,), (2, 3, 4)),
    [(64, 8, 1, 3), (64, 8, 2, 3), (64, 8, 2, 4), (32, 8, 1, 3), (32, 8, 1, 4), (32, 8, 2, 3), (128, 8, 8, 3),
     (128, 8, 8, 4), (256, 8, 8, 3)],
)]  # fmt: skip
MANY = [Shape(rows, visits, 1, warps, stages) for rows, visits, warps, stages in itertools.chain(
    itertools.product((64, 128), (32,), (4,), (2, 3, 4)), [(128, 32, 8, 3), (64, 16, 4, 3), (128, 16, 4, 3)],
)]  # fmt: skip
MOST = [Shape(rows, visits, 1, warps, stages) for rows, visits, warps, stages in itertools.chain(
    itertools.product((64, 128), (64, 128), (4,), (2, 3)), itertools.product((128,), (64, 128), (8,), (2, 3)),
    [(64, 32, 4, 3), (128, 32, 4, 3)],
)]  # fmt: skip
TUNED = (
    (1, "gated", ALONE), (1, "combined", COMBINED), (64, "gated", TOGETHER), (64, "plain", TOGETHER),
    (256, "gated", MANY), (256, "plain", MANY), (1024, "gated", MOST), (1024, "plain", MOST),
)  # fmt: skip
"""Tokens, kind of product, shapes to try."""


def place_of(tokens: int, kind: str) -> tuple[dict, object]:
    """Table and key of the shape that so many tokens take."""
    if tokens == 1:
        return fast.ALONE, kind
    table = fast.TOGETHER[kind]
    return table, next(most for most in table if tokens * SLOTS <= most * EXPERTS)


def random_packed(bits: int, rows: int, columns: int, experts: int = EXPERTS) -> Packed:
    blocks = columns // twin.block_of(bits)

    def words(dtype: torch.dtype) -> torch.Tensor:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        return torch.randint(low, high, (experts, blocks, rows, twin.LANES), dtype=dtype, device="cuda")

    scale = (0.5 + torch.rand(experts, columns // GROUP, rows, device="cuda")).bfloat16() / (2**bits * columns**0.5)
    third = words(torch.int16) if bits == 3 else None
    return Packed(words(torch.int32), third, scale, bits, columns, twin.span_of(bits, columns, GROUP))


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.rand(tokens, EXPERTS, device="cuda")
    weight, index = logits.softmax(-1).topk(SLOTS)
    return index, (weight / weight.sum(-1, keepdim=True)).bfloat16()


def packed_layer(gate_up: Packed, down: Packed) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        expert = index.flatten()
        visits = None if len(expert) <= fast.FEW else fast.sort_visits(expert, EXPERTS)
        return fast.combined_product(fast.gated_product(x, gate_up, expert, visits), down, expert, weight, visits)

    return run


def dense_grouped(gate_up: torch.Tensor, down: torch.Tensor) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        expert, order = torch.sort(index.flatten())
        counts = torch.histc(expert.int(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        both = torch.nn.functional.grouped_mm(x[order // SLOTS], gate_up.mT, offs=ends)
        y = torch.nn.functional.grouped_mm(grouped.silu_gate(both), down.mT, offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return (y * weight.flatten()[order][:, None])[back].view(len(x), SLOTS, -1).sum(1)

    return run


def dense_gather(gate_up: torch.Tensor, down: torch.Tensor) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        expert = index.flatten()
        both = torch.bmm(gate_up[expert], x.repeat_interleave(SLOTS, 0)[..., None])[..., 0]
        y = torch.bmm(down[expert], grouped.silu_gate(both)[..., None])[..., 0]
        return (y * weight.flatten()[:, None]).view(len(x), SLOTS, -1).sum(1)

    return run


def graph_us(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Microseconds of one call: median over replays of a graph of all."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2] * 1e3 / len(calls)


def distinct(index: torch.Tensor) -> int:
    return len(index.unique())


def product_call(kind: str, packed: Packed, tokens: int, index: torch.Tensor, sort: bool) -> Callable[[], Any]:
    expert, weight = index.flatten(), torch.rand(tokens, SLOTS, device="cuda").bfloat16()
    visits = fast.sort_visits(expert, packed.low.shape[0]) if sort else None
    x = torch.randn(tokens if kind == "gated" else tokens * SLOTS, packed.columns, device="cuda").bfloat16()
    if kind == "combined":
        return partial(fast.combined_product, x, packed, expert, weight, visits)
    return partial(fast.gated_product if kind == "gated" else fast.product, x, packed, expert, visits)


def tune(layers: list[tuple[Packed, Packed]], bandwidth: float, bits: int) -> None:
    """Each product alone: prints the shapes and keeps the best."""
    for tokens, kind, shapes in TUNED:
        routes = [routing(tokens)[0] for _ in layers]
        hit = sum(distinct(route) for route in routes) / len(layers)
        which = 0 if kind == "gated" else 1
        calls = [
            product_call(kind, pair[which], tokens, route, tokens > 1)
            for pair, route in zip(layers, routes, strict=True)
        ]
        floor = hit * layers[0][which].bytes() / bandwidth * 1e6
        table, key = place_of(tokens, kind)
        found = {}
        for shape in shapes:
            table[key] = shape
            try:
                found[shape] = graph_us(calls, 10)
            except Exception as error:  # a shape that does not fit the device is a row of the table
                print("  failed", bits, tokens, kind, tuple(shape), str(error)[:100].replace("\n", " "), flush=True)
        order = sorted(found, key=found.get)
        table[key] = order[0]
        words = "; ".join(f"{tuple(shape)} {found[shape]:.1f}" for shape in order[:6])
        print(f"W{bits} batch {tokens} {kind}, floor {floor:.1f}: {words}; worst {found[order[-1]]:.1f}", flush=True)


def crossing(layers: list[tuple[Packed, Packed]], bits: int) -> None:
    """A layer with each visit alone and with visits sorted, for few tokens."""
    before = fast.FEW
    for tokens in (1, 2, 4, 6, 8):
        routes, found = [routing(tokens) for _ in layers], []
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        for few in (1 << 20, 0):
            fast.FEW = few
            runs = [packed_layer(*pair) for pair in layers]
            found.append(graph_us([partial(r, x, *a) for r, a in zip(runs, routes, strict=True)]))
        print(f"W{bits} batch {tokens}: alone {found[0]:.1f} us, sorted {found[1]:.1f} us", flush=True)
    fast.FEW = before


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", default="", help="bits at which all shapes are tried first")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--batches", default="1,2,4,8,16,64,256,1024,4096")
    parser.add_argument("--compile", type=int, help="only fill the cache of kernels with part N of 14")
    args = parser.parse_args()
    all_bits = [int(bits) for bits in args.bits.split(",")]
    tuned = [int(bits) for bits in args.tune.split(",") if bits]
    if args.compile is not None:
        compile_part(args.compile, all_bits, tuned)
        return
    torch.manual_seed(0)
    sheet = gpu_of(device_name())
    bandwidth = sheet.bandwidth if sheet else copy_bandwidth(torch.device("cuda"))
    print(
        f"{device_name()}: sheet {bandwidth / 1e9:.0f} GB/s, copy {copy_bandwidth(torch.device('cuda')) / 1e9:.0f} GB/s"
    )
    dense = [
        (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5,
         torch.randn(EXPERTS, HIDDEN, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5)
        for _ in range(LAYERS)
    ]  # fmt: skip
    rows = []
    batches = [int(batch) for batch in args.batches.split(",")]
    routes = {batch: [routing(batch) for _ in range(LAYERS)] for batch in batches}
    inputs = {batch: torch.randn(batch, HIDDEN, device="cuda").bfloat16() for batch in batches}
    base: dict[int, dict[str, float]] = {}
    for batch in batches:
        base[batch] = {}
        for name, make in (("grouped_mm", dense_grouped), ("gather", dense_gather)):
            if name == "gather" and batch > 64:
                continue
            runs = [make(*pair) for pair in dense]
            calls = [partial(r, inputs[batch], *a) for r, a in zip(runs, routes[batch], strict=True)]
            base[batch][name] = graph_us(calls)
        print("bf16 batch", batch, {k: round(v, 1) for k, v in base[batch].items()}, flush=True)
    for bits in all_bits:
        layers = [(random_packed(bits, 2 * WIDTH, HIDDEN), random_packed(bits, HIDDEN, WIDTH)) for _ in range(LAYERS)]
        if bits in tuned:
            tune(layers, bandwidth, bits)
            crossing(layers, bits)
        for batch in batches:
            runs = [packed_layer(*pair) for pair in layers]
            calls = [partial(r, inputs[batch], *a) for r, a in zip(runs, routes[batch], strict=True)]
            us = graph_us(calls)
            hit = sum(distinct(index) for index, _ in routes[batch]) / LAYERS
            floor = hit * sum(p.bytes() for p in layers[0]) / bandwidth * 1e6
            rows.append({"bits": bits, "batch": batch, "us": us, "experts": hit, "floor_us": floor, **base[batch]})
            ratios = {name: round(value / us, 2) for name, value in base[batch].items()}
            print(f"W{bits} batch {batch}: {us:.1f} us, floor {floor:.1f} = {floor / us:.0%}, x {ratios}", flush=True)
        us = graph_us([lambda p=p: [fast.dequantized(each) for each in p] for p in layers[:2]], 5)
        print(f"W{bits} dequantizing a layer: {us:.0f} us", flush=True)
        rows.append({"bits": bits, "dequantize_us": us})
    if out := os.environ.get("OUT"):
        with open(os.path.join(out, "bench_packed.json"), "w") as file:
            json.dump({"rows": rows, "alone": fast.ALONE, "together": fast.TOGETHER}, file, indent=1)


def compile_part(part: int, all_bits: list[int], tuned: list[int]) -> None:
    """Every kernel needed, on two experts."""
    jobs = [(bits, tokens, kind, None) for bits in all_bits for tokens, kind, _ in TUNED]
    jobs += [(bits, tokens, kind, shape) for bits in tuned for tokens, kind, shapes in TUNED for shape in shapes]
    for bits, tokens, kind, shape in itertools.islice(jobs, part, None, 14):
        rows, columns = (2 * WIDTH, HIDDEN) if kind == "gated" else (HIDDEN, WIDTH)
        table, key = place_of(tokens, kind)
        before, index = dict(table), torch.arange(SLOTS, device="cuda")[None] % 2
        shape = shape or table[key]
        for each in [kind] if tokens == 1 else table:
            table[each] = shape
        try:
            product_call(kind, random_packed(bits, rows, columns, 2), 1, index, tokens > 1)()
            torch.cuda.synchronize()
        except Exception as error:  # shown again where it is timed
            print("compile", bits, kind, tuple(shape), str(error)[:100].replace("\n", " "))
        table.update(before)


if __name__ == "__main__":
    main()
