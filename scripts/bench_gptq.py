"""How fast GPTQ is: seconds a layer by part, beside the floor of each, and of a whole model.

    python scripts/bench_gptq.py                                       # small, on the CPU, under a minute
    python scripts/bench_gptq.py --shape qwen3-30b-a3b --device cuda   # 128 x 2048 tokens, 4 layers, W4 group 128, bf16

Models, shapes and clocks are those of `bench_calibrate.py`. The first run gives the time of a layer, everything in it;
the second waits for the device around each part. Floors: operations at the measured matrix rate (bf16, and fp32
for factors and solving), bytes at the measured copy rate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from bench_calibrate import SHAPES, Bench, Repeated, Shape, write_model

from moecli.core.artifacts import CalibrationText, Checkpoint
from moecli.engine.sweep import SweptLayer
from moecli.families import facts_of
from moecli.io import overlay
from moecli.io.overlay import OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.methods.quantize import gptq as module


class Work:
    """What the stage asks of its context."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device, self.ends = folder, torch.device(device), []

    def track(self, items: Any, label: str) -> Iterator[Any]:
        for item in items:
            yield item
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    def part(self, name: str, kind: Any, make: Callable[[], Any]) -> Any:
        return make()

    def writer(self, parent: Checkpoint, config: Any = None) -> OverlayWriter:
        return OverlayWriter(self.folder, parent, config)

    def note(self, text: str) -> None:
        print(text)

    def record(self, name: str, value: Any) -> None:
        print(f"{name}: {next(iter(value.values()))}")


def main() -> None:
    args = arguments()
    shape, bench = SHAPES[args.shape], Bench(args.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    matrix, exact, copy = bench.matrix_rate(dtype), bench.matrix_rate(torch.float32), bench.copy_rate()
    name = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{name}, torch {torch.__version__}, {args.shape}, {args.layers} layers, {args.samples} x {args.length} tokens"
    )
    print(f"matrix {matrix / 1e12:.1f}, fp32 {exact / 1e12:.1f} TFLOP/s, copy {copy / 1e9:.0f} GB/s", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        (root / "model").mkdir()
        write_model(root / "model", shape, args.layers, args.length, dtype, args.device)
        source = FolderCheckpoint(root / "model", facts_of)
        ids = torch.randint(0, shape.vocab, (args.samples, args.length))
        text = CalibrationText(ids, torch.ones_like(ids), "random")
        opt = module.Gptq(group_size=args.group_size, batch_size=args.batch)
        bench.reset_peak()
        run(opt, text, source, root / "warm", args.device)
        layer = run(opt, text, source, root / "plain", args.device)
        print(f"a layer, all of it: {layer:.3f} s; 48 layers: {48 * layer:.1f} s; peak {bench.peak() / 2**30:.1f} GiB")
        if args.depth:
            deep = Repeated(root / "model", args.depth)
            bench.reset_peak()
            start = time.perf_counter()
            layer = run(opt, text, deep, root / "deep", args.device)
            taken = time.perf_counter() - start
            size = sum(file.stat().st_size for file in (root / "deep").iterdir())
            print(
                f"{args.depth} layers of the files of {args.layers}, really run: {taken:.1f} s, {layer:.3f} s a layer, "
                f"{size / 1e9:.2f} GB written, peak {bench.peak() / 2**30:.1f} GiB", flush=True
            )  # fmt: skip
        parts = timed(bench)
        run(opt, text, source, root / "parts", args.device)
        table(parts, floors(shape, ids.numel(), args.length, dtype, matrix, exact, copy), args.layers)


def run(opt: module.Gptq, text: CalibrationText, source: Checkpoint, folder: Path, device: str) -> float:
    """Median seconds of a layer after the first."""
    work = Work(folder, device)
    module.gptq(opt, text, source, None, work)  # type: ignore[arg-type]
    steps = sorted(b - a for a, b in zip(work.ends, work.ends[1:], strict=False))
    return steps[len(steps) // 2] if steps else float("nan")


@dataclass
class Spent:
    seconds: float = 0.0
    peak: int = 0


def timed(bench: Bench) -> dict[str, Spent]:
    """Seconds and peak memory of each part from now on, the device waited for around each."""
    found: dict[str, Spent] = defaultdict(Spent)

    def wrap(owner: Any, name: str, label: str) -> None:
        inner = getattr(owner, name)

        @wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            box: list[Any] = []
            bench.reset_peak()
            found[label].seconds += bench.seconds(lambda: box.append(inner(*args, **kwargs)))
            found[label].peak = max(found[label].peak, bench.peak())
            return box[0]

        setattr(owner, name, outer)

    wrap(module._Layer, "_observed", "forward and Hessians")
    wrap(module, "factor", "factor")
    wrap(module, "group_scale", "scales")
    wrap(module, "solve", "solve")
    wrap(module, "pack_rows", "pack")
    wrap(module, "dequantize", "dequantize")
    wrap(overlay._Part, "put", "to the CPU")
    wrap(overlay._Part, "save", "write")
    wrap(SweptLayer, "rewrite", "new weights")
    wrap(SweptLayer, "made", "forward again")
    return found


def floors(
    shape: Shape, tokens: int, length: int, dtype: torch.dtype, matrix: float, exact: float, copy: float
) -> dict[str, float]:
    """Seconds of a layer at the measured rates."""
    forward = shape.layer_flops(tokens, length) / matrix
    inner = shape.head_dim * shape.heads
    grams = (shape.gram_flops(tokens, pooled=2) + tokens * inner**2) / matrix
    cubes = shape.experts * (shape.hidden**3 + shape.width**3) + shape.hidden**3 + inner**3
    queries = inner + 2 * shape.head_dim * shape.kv_heads
    squares = shape.experts * shape.width * shape.hidden * (2 * shape.hidden + shape.width)
    squares += queries * shape.hidden**2 + shape.hidden * inner**2
    weights = 3 * shape.experts * shape.width * shape.hidden
    item = torch.empty(0, dtype=dtype).element_size()
    return {
        "forward and Hessians": forward + grams, "factor": 2 * cubes / 3 / exact, "solve": squares / exact,
        "scales": weights * item / copy, "pack": 1.5 * weights / copy, "dequantize": (1 + item) * weights / copy,
        "new weights": 2 * item * weights / copy, "forward again": forward,
    }  # fmt: skip


def table(parts: dict[str, Spent], floor: dict[str, float], layers: int) -> None:
    print(f"{'part':24} {'a layer':>12} {'floor':>12} {'ratio':>8} {'peak':>12}")
    for name, spent in parts.items():
        seconds, least = spent.seconds / layers, floor.get(name)
        beside = f"{least * 1e3:9.2f} ms {seconds / least:8.1f}" if least else " " * 21
        print(f"{name:24} {seconds * 1e3:9.2f} ms {beside} {spent.peak / 2**30:8.2f} GiB", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--depth", type=int, default=0, help="layers of a whole model that is really run; 0: none")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--folder", help="where the model is written")
    args = parser.parse_args()
    args.samples = args.samples or (8 if args.shape == "small" else 128)
    args.length = args.length or (256 if args.shape == "small" else 2048)
    return args


if __name__ == "__main__":
    main()
