"""How fast gradients are: one table of work, time, floor, ratio and peak memory.

    python scripts/bench_gradients.py                                       # small, on the CPU, under a minute
    python scripts/bench_gradients.py --shape qwen3-30b-a3b --device cuda   # 128 x 2048 tokens, 4 layers, bf16

Models, shapes and clocks are those of `bench_calibrate.py`. Times are medians over the layers, of one layer and all
tokens. The floor counts operations at the measured matrix rate: those of a forward pass for the way there, twice as
many for the way back (the layer again, and the gradients of its inputs; weights have none).
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from bench_calibrate import SHAPES as FORWARD_SHAPES
from bench_calibrate import Bench, Repeated, Row, Shape, write_model

from moecli.core.artifacts import Checkpoint
from moecli.engine.backward import backward_sweep
from moecli.engine.collectors.channels import H2, Ph2, PhMax
from moecli.engine.collectors.gradients import GradientSquare
from moecli.engine.data import Batch
from moecli.families import facts_of
from moecli.io.reader import FolderCheckpoint

SHAPES = FORWARD_SHAPES | {
    "qwen2-57b-a14b": Shape(
        hidden=3584, experts=64, top_k=8, width=2560, heads=28, kv_heads=4, head_dim=128, vocab=32768
    ),
}
"""Qwen2-57B-A14B without its shared expert."""
FORWARD, CAMERA, BACK = "forward with `h2`", "forward with `ph2`, `phmax`", "back with `gh2`"


def main() -> None:
    args = arguments()
    shape, bench = SHAPES[args.shape], Bench(args.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    name = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    matrix = bench.matrix_rate(dtype)
    work = f"{args.layers} layers, {args.samples} x {args.length} tokens, {args.batch} sequences a batch"
    print(f"{name}, torch {torch.__version__}, {args.shape}, {dtype}, {work}")
    print(f"matrix {matrix / 1e12:.2f} TFLOP/s (measured)", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_model(Path(folder), shape, args.layers, args.length, dtype, args.device)
        source = FolderCheckpoint(folder, facts_of)
        ids = torch.randint(0, shape.vocab, (args.samples, args.length))
        batches = [Batch(part, torch.ones_like(part)) for part in ids.split(args.batch)]
        print(f"{'work':44} {'time':>13} {'floor':>13} {'ratio':>8} {'peak':>13}")
        for row in rows(source, batches, shape, bench, matrix):
            print(row.text(), flush=True)
        if args.depth:
            for row in whole(Repeated(Path(folder), args.depth), batches, shape, bench, matrix):
                print(row if isinstance(row, str) else row.text(), flush=True)


def rows(source: Checkpoint, batches: list[Batch], shape: Shape, bench: Bench, matrix: float) -> Iterator[Row]:
    """One layer there and back."""
    tokens, length = sum(batch.input_ids.numel() for batch in batches), batches[0].input_ids.shape[1]
    taken: dict[str, list[float]] = {"bare": [], FORWARD: [], CAMERA: [], BACK: []}
    swept = backward_sweep(source, batches, device=bench.device)
    bench.reset_peak()
    for layer in swept:
        layer.outputs()
        taken[FORWARD].append(bench.seconds(lambda layer=layer: layer.observe([H2()])))
        taken[CAMERA].append(bench.seconds(lambda layer=layer: layer.observe([Ph2(), PhMax()])))
        layer.replace({})
        taken["bare"].append(bench.seconds(layer.outputs))
    peaks = {FORWARD: bench.peak()}
    bench.reset_peak()
    start, head = time.perf_counter(), 0.0
    for layer in swept.back():
        if not head:
            bench.wait()
            head = time.perf_counter() - start
        taken[BACK].append(bench.seconds(lambda layer=layer: layer.observe([GradientSquare()])))
    peaks |= {BACK: bench.peak(), "bare": peaks[FORWARD], CAMERA: peaks[FORWARD]}
    median = {name: statistics.median(values[1:] or values) for name, values in taken.items()}
    flops = shape.layer_flops(tokens, length) / matrix
    for name, floor in (("bare", flops), (FORWARD, flops), (CAMERA, flops), (BACK, 2 * flops)):
        yield Row(name, median[name], floor, peaks[name])
    yield Row("head: loss and its gradient", head, 6 * tokens * shape.hidden * shape.vocab / matrix, peaks[BACK])
    both = median[FORWARD] + median[BACK]
    print(f"there and back {both / median['bare']:.2f} times the bare forward")
    print(f"loss {swept.loss / swept.targets:.3f} a token, {math.log(shape.vocab):.3f} would be chance")
    for line in swept.report():
        print(line)


def whole(source: Checkpoint, batches: list[Batch], shape: Shape, bench: Bench, matrix: float) -> Iterator[Row | str]:
    """A whole model there and back, weights read from files."""
    tokens, length, layers = (
        sum(b.input_ids.numel() for b in batches),
        batches[0].input_ids.shape[1],
        source.facts.layers,
    )
    flops = layers * shape.layer_flops(tokens, length) / matrix
    bench.reset_peak()
    swept = backward_sweep(source, batches, device=bench.device)
    yield Row(f"{layers} layers: {FORWARD}", bench.seconds(lambda: observe(swept, H2)), flops, bench.peak())
    head = 6 * tokens * shape.hidden * shape.vocab / matrix
    back = bench.seconds(lambda: observe(swept.back(), GradientSquare))
    yield Row(f"{layers} layers: head, {BACK}", back, 2 * flops + head, bench.peak())
    yield from swept.report()


def observe(layers: Iterable, kind: type) -> None:
    for layer in layers:
        layer.observe([kind()])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--depth", type=int, default=0, help="layers of the whole model that is timed; 0: none")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--folder", help="where the model is written")
    args = parser.parse_args()
    small = args.shape == "small"
    args.samples, args.length = args.samples or (16 if small else 128), args.length or (128 if small else 2048)
    return args


if __name__ == "__main__":
    main()
