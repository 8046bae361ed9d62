"""Several processes against one on the same tokens: seconds of a sweep with statistics, and whether these are equal.

    torchrun --nproc-per-node 2 scripts/bench_ranks.py                                       # small, gloo on the CPU
    torchrun --nproc-per-node 2 scripts/bench_ranks.py --shape qwen3-30b-a3b --device cuda   # 128 x 2048 tokens, bf16

A model of random weights is written by the first process, in the layout of `bench_calibrate.py`, and its few layers are
read again and again for a deeper one. The first process alone runs all tokens while the others wait, then all of
them run their shares; each way is run twice and the quicker counts. `ready` is the time until the first layer is there,
`sweep` from there to the end, `own` what of it passes inside `observe`: with the exchange of statistics, without
waiting for weights. On CUDA the processes read each layer once between them; the last line of a block is without that.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_calibrate import SHAPES, Bench, Repeated, write_model

from moecli.core.artifacts import LayerStats
from moecli.engine.collectors import collectors
from moecli.engine.data import Batch
from moecli.engine.ranks import ALONE, Ranks, joining, own_device
from moecli.engine.stats import collector_of, names_in
from moecli.engine.sweep import sweep

ROUTED = ["prob_sum", "ean_sum", "ean_sq", "gean_sum", "gean_sq", "easy", "absmax", "logit_gram"]
GRAMS = [*ROUTED, "x_cov", "h_cov"]


@dataclass
class Taken:
    """Seconds of one sweep, and what the layers found."""

    ready: float
    """until the first layer was there"""
    whole: float
    """from there to the end"""
    own: float
    """inside `observe`"""
    found: dict[int, LayerStats]


def swept(source: Repeated, batches: list[Batch], names: list[str], bench: Bench, ranks: Ranks) -> Taken:
    own, found, start = 0.0, {}, time.perf_counter()
    for layer in sweep(source, batches, device=bench.device, ranks=ranks):
        bench.wait()
        begin = time.perf_counter()
        if layer.index == 0:
            first = begin
        stats = layer.observe(collectors(names))
        if layer.index in (0, len(source.facts.moe_layers) - 1):
            found[layer.index] = stats
        bench.wait()
        own += time.perf_counter() - begin
    bench.wait()
    return Taken(first - start, time.perf_counter() - first, own, found)


def quicker(*args: object) -> Taken:
    return min((swept(*args) for _ in range(2)), key=lambda taken: taken.whole)


def agreement(one: dict[int, LayerStats], several: dict[int, LayerStats]) -> str:
    """Whether integers are equal, and the largest relative difference of anything else."""
    equal, worst = True, ("nothing", 0.0)
    for layer, stats in one.items():
        equal &= stats.tokens == several[layer].tokens
        for name in names_in(stats):
            a, b = stats[name], several[layer][name]
            if not a.is_floating_point() or collector_of(name).reduce != "sum":
                equal &= torch.equal(a, b)
            else:
                worst = max(worst, (name, float((a - b).norm() / a.norm())), key=lambda pair: pair[1])
    words = "equal" if equal else "NOT EQUAL"
    return f"integers and maxima {words}, largest relative difference of a sum {worst[1]:.1e} (`{worst[0]}`)"


def main() -> None:
    args = arguments()
    with joining(args.device) as ranks:
        bench = Bench(str(own_device(args.device)))
        torch.manual_seed(0)
        shape, dtype = SHAPES[args.shape], torch.bfloat16 if bench.cuda else torch.float32
        with tempfile.TemporaryDirectory(dir=args.folder) as own:

            def made() -> Path:
                write_model(Path(own), shape, args.layers, args.length, dtype, bench.device)
                return Path(own)

            source = Repeated(ranks.told(made), args.depth)
            ids = torch.randint(0, shape.vocab, (args.samples, args.length))
            batches = [Batch(part, torch.ones_like(part)) for part in ids.split(args.batch)]
            if ranks.leads:
                name = torch.cuda.get_device_name() if bench.cuda else "CPU"
                print(f"{ranks.size} x {name}, torch {torch.__version__}, {args.shape}, {dtype}")
                print(f"{args.depth} layers ({args.layers} on disk), {args.samples} x {args.length} tokens, "
                      f"batches of {args.batch}")  # fmt: skip
                print(f"{'statistics':28} {'processes':>9} {'ready':>9} {'sweep':>9} {'own':>9}", flush=True)
            compare("of routed tokens", ROUTED, source, batches, bench, ranks)
            shallow = Repeated(source.folder, args.layers)
            compare(f"and Grams, {args.layers} layers", GRAMS, shallow, batches, bench, ranks)
            ranks.told(lambda: None)


def compare(words: str, names: list[str], source: Repeated, batches: list[Batch], bench: Bench, ranks: Ranks) -> None:
    swept(source, batches[:1], names, bench, ALONE)  # kernels are compiled and files are read once
    ranks.gathered(None)
    one = quicker(source, batches, names, bench, ALONE) if ranks.leads else None
    ranks.told(lambda: None)
    several = quicker(source, batches, names, bench, ranks)
    slowest = slowest_of(several, ranks)
    if ranks.leads:
        print(f"{words:28} {1:9} {one.ready:8.2f}s {one.whole:8.2f}s {one.own:8.2f}s")
        print(f"{'':28} {ranks.size:9} {slowest[0]:8.2f}s {slowest[1]:8.2f}s {slowest[2]:8.2f}s")
        ratio = f"sweep {one.whole / slowest[1]:.2f} times as fast, layers' own {one.own / slowest[2]:.2f}"
        print(f"  {ratio}\n  {agreement(one.found, several.found)}", flush=True)
    if bench.cuda:
        apart = Ranks(ranks.rank, ranks.size, 1, ranks._store)  # as if each were on a machine of its own
        slowest = slowest_of(quicker(source, batches, names, bench, apart), ranks)
        if ranks.leads:
            print(f"{'  each reads all':28} {ranks.size:9} {slowest[0]:8.2f}s {slowest[1]:8.2f}s {slowest[2]:8.2f}s")


def slowest_of(taken: Taken, ranks: Ranks) -> list[float]:
    """`ready`, `whole` and `own` of the slowest process."""
    return [max(values) for values in zip(*ranks.gathered((taken.ready, taken.whole, taken.own)), strict=True)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=3, help="layers on disk")
    parser.add_argument("--depth", type=int, help="layers that are run")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int, help="sequences in a batch")
    parser.add_argument("--folder", help="where the temporary model goes")
    args = parser.parse_args()
    large = args.shape != "small"
    args.depth = args.depth or (12 if large else 4)
    args.samples = args.samples or (128 if large else 16)
    args.length = args.length or (2048 if large else 128)
    args.batch = args.batch or (8 if large else 4)
    return args


if __name__ == "__main__":
    main()
