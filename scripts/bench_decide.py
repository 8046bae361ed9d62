"""How fast another method or ratio is from stored statistics: seconds a layer for the decision and for the weights.

    python scripts/bench_decide.py                                       # small, on the CPU, seconds
    python scripts/bench_decide.py --shape qwen3-30b-a3b --device cuda   # half of 128 experts, 2 layers, under a minute

Models and shapes are those of `bench_calibrate.py`. Statistics of the right shapes and random values stand for a
calibration: nothing is run through the model. Expert outputs lie around `keep` random centres, so that clusters exist.

Pruning stages are timed whole: scores, choice, and an overlay that renames experts and holds new router rows. Merging
stages are timed whole as well: weights read, merged, written. What is left of either is one streaming pass that makes
the folder; its floor is its bytes at the rate of a plain copy of the source's largest file to the same folder.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bench_calibrate import SHAPES, Bench, Shape, write_model
from torch import Tensor

from moecli.core.artifacts import CalibrationStats, Checkpoint, LayerStats
from moecli.core.stage import Options, Stage
from moecli.engine.collectors import CATALOGUE
from moecli.families import facts_of
from moecli.io.overlay import OverlayCheckpoint, OverlayWriter
from moecli.io.reader import FolderCheckpoint
from moecli.io.store import StageFolder
from moecli.runner import lookup
from moecli.runner.export import export

Given = Mapping[str, Any]
PRUNING: tuple[tuple[str, Given], ...] = (
    ("prune/reap", {}), ("prune/ean", {}), ("prune/frequency", {}), ("prune/easy-ep", {}),
    ("prune/naee", {"search": "greedy"}),
)  # fmt: skip
CLUSTERING: tuple[tuple[str, Given], ...] = (
    ("cluster/m-smoe", {}), ("cluster/hc-smoe", {}), ("cluster/ream", {}),
    ("cluster/sub-moe", {"alloc": "uniform"}), ("cluster/sub-moe", {"alloc": "cost_curve"}),
    ("cluster/m-smoe", {"metric": "weight_cos"}),
)  # fmt: skip
MERGING: tuple[tuple[str, Given], ...] = (
    ("merge/weighted", {}), ("merge/merge-moe", {"align": "none"}), ("merge/merge-moe", {}),
)  # fmt: skip


SLOW = ("prune/naee", "cluster/sub-moe")
"""Stages that are not run once before they are timed."""


class Work:
    """What a stage asks of its context."""

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = StageFolder(folder)
        self.folder.begin()
        self.device, self.rng = torch.device(device), torch.Generator().manual_seed(0)
        self.notes: list[str] = []

    def track(self, items: Any, label: str) -> Iterator[Any]:
        return iter(items)

    def writer(self, parent: Checkpoint, config: Any = None) -> OverlayWriter:
        return OverlayWriter(self.folder.work, parent, config)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def record(self, name: str, value: Any) -> None:
        pass

    def checkpoint(self, parent: FolderCheckpoint) -> OverlayCheckpoint:
        """What the stage wrote."""
        self.folder.finish({})
        return OverlayCheckpoint(self.folder.path, parent)


def made_up(model: FolderCheckpoint, keep: int, tokens: int = 262_144) -> CalibrationStats:
    """Statistics of `tokens` tokens, with the names and shapes that `calibrate/statistics` gives."""
    return CalibrationStats({layer: _layer(model, keep, tokens, layer) for layer in model.facts.moe_layers})


def _layer(model: FolderCheckpoint, keep: int, tokens: int, layer: int) -> LayerStats:
    facts, rng = model.facts, torch.Generator().manual_seed(layer)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64)

    share_E = normal(facts.experts).exp()
    count_E = (tokens * facts.top_k * share_E / share_E.sum()).long().clamp(min=1)
    norm_E = normal(facts.experts).exp()
    centre_E = torch.arange(facts.experts) % keep
    output_ED = normal(keep, facts.hidden)[centre_E] + 0.5 * normal(facts.experts, facts.hidden)
    unit_ED = torch.nn.functional.normalize(output_ED, dim=-1)
    logit_EX = normal(facts.experts, 4 * facts.experts)
    sample = CATALOGUE["tok_reservoir"].tokens  # type: ignore[attr-defined]
    extra = {
        "ean_sum": count_E * norm_E, "gean_sum": count_E * norm_E / facts.top_k, "easy": count_E * norm_E * 1e-3,
        "absmax": norm_E.float(), "y_mean": tokens * output_ED, "gy_mean": output_ED * count_E[:, None],
        "gram_cos": tokens * (unit_ED @ unit_ED.T), "logit_gram": logit_EX @ logit_EX.T,
        "tok_reservoir": normal(sample, facts.hidden).to(getattr(torch, facts.dtype)),
        "tok_reservoir_key": torch.arange(sample),
    }  # fmt: skip
    return LayerStats(tokens, count_E, count_E.double() / facts.top_k, extra)


def main() -> None:
    args = arguments()
    shape, bench = SHAPES[args.shape], Bench(args.device)
    keep = args.keep or shape.experts // 2
    dtype = torch.bfloat16 if bench.cuda else torch.float32
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {args.shape}, {keep} of {shape.experts} experts, {args.layers} layers")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = Path(folder)
        (root / "model").mkdir()
        write_model(root / "model", shape, args.layers, 4096, dtype, args.device)
        model = FolderCheckpoint(root / "model", facts_of)
        stats = made_up(model, keep)
        print(f"statistics {_bytes(stats) / args.layers / 2**20:.1f} MiB a layer; ready after "
              f"{time.perf_counter() - begin:.1f} s", flush=True)  # fmt: skip
        pruned = decisions(model, stats, keep, root, bench)
        merged = merges(model, stats, keep, root, bench, shape)
        passes({"prune/reap": pruned, "merge/weighted": merged}, model, root, args.layers)
    print(f"all of it: {time.perf_counter() - begin:.0f} s")


def decisions(model: FolderCheckpoint, stats: CalibrationStats, keep: int, root: Path, bench: Bench) -> Checkpoint:
    """A line for each pruning and clustering stage; the model that the first one made."""
    first: Checkpoint | None = None
    print(f"{'decision':46} {'a layer':>12} {'48 layers':>12}")
    for at, (name, given) in enumerate((*PRUNING, *CLUSTERING)):
        stage, opt = _stage(name, {"keep": keep, **given})
        if name not in SLOW:
            _run(stage, opt, Work(root / f"warm-{at}", bench.device), model=model, stats=stats)
        work = Work(root / f"decide-{at}", bench.device)
        seconds = bench.seconds(lambda s=stage, o=opt, w=work: _run(s, o, w, model=model, stats=stats))
        _line(name, given, seconds / len(stats))
        if first is None:
            first = work.checkpoint(model)
    if first is None:
        raise RuntimeError("nothing was decided")
    return first


def merges(
    model: FolderCheckpoint, stats: CalibrationStats, keep: int, root: Path, bench: Bench, shape: Shape
) -> Checkpoint:
    """A line for each merging stage, on the clusters of `cluster/m-smoe`; the model that the first one made."""
    stage, opt = _stage("cluster/m-smoe", {"keep": keep})
    plan = _run(stage, opt, Work(root / "plan", bench.device), model=model, stats=stats)
    layer_bytes = shape.experts * 3 * shape.width * shape.hidden * torch.empty(0, dtype=_dtype(model)).element_size()
    print(f"{'merge: read, merge, write':46} {'a layer':>12} {'48 layers':>12}   ({layer_bytes / 1e9:.2f} GB read, "
          f"{layer_bytes * keep / shape.experts / 1e9:.2f} GB written)")  # fmt: skip
    first: Checkpoint | None = None
    for at, (name, given) in enumerate(MERGING):
        stage, opt = _stage(name, given)
        work = Work(root / f"merge-{at}", bench.device)
        bench.reset_peak()
        seconds = bench.seconds(lambda s=stage, o=opt, w=work: _run(s, o, w, model=model, stats=stats, plan=plan))
        _line(name, given, seconds / len(stats), f"   peak {bench.peak() / 2**30:.2f} GiB")
        if first is None:
            first = work.checkpoint(model)
        else:
            shutil.rmtree(work.folder.work)
    if first is None:
        raise RuntimeError("nothing was merged")
    return first


def passes(found: Mapping[str, Checkpoint], model: FolderCheckpoint, root: Path, layers: int) -> None:
    """The streaming pass that makes the folder of each model, beside a plain copy."""
    largest = max(model.files, key=lambda file: file.stat().st_size)
    start = time.perf_counter()
    shutil.copyfile(largest, root / "copy")
    rate = largest.stat().st_size / (time.perf_counter() - start)
    print(f"streaming pass; a plain copy runs at {rate / 1e9:.2f} GB/s")
    for name, checkpoint in found.items():
        start = time.perf_counter()
        export(checkpoint, root / f"export-{name.replace('/', '-')}")
        seconds = time.perf_counter() - start
        size = sum(f.stat().st_size for f in (root / f"export-{name.replace('/', '-')}").glob("*.safetensors"))
        print(f"{'after ' + name:46} {seconds / layers:10.3f} s {48 * seconds / layers:10.1f} s   "
              f"({size / 1e9:.2f} GB at {size / seconds / 1e9:.2f} GB/s)", flush=True)  # fmt: skip


def _stage(name: str, given: Given) -> tuple[Stage, Options]:
    stage = lookup.find(name)
    return stage, stage.options(**given)


def _run(stage: Stage, opt: Options, work: Work, **artifacts: Any) -> Any:
    return stage(opt, **{name: artifacts[name] for name in stage.inputs}, ctx=work)


def _line(name: str, given: Given, seconds: float, more: str = "") -> None:
    words = f"{name} {', '.join(f'{key}: {value}' for key, value in given.items())}"
    print(f"{words:46} {seconds:10.3f} s {48 * seconds:10.1f} s{more}", flush=True)


def _bytes(stats: CalibrationStats) -> int:
    return sum(tensor.nbytes for layer in stats.values() for tensor in (layer.count_E, *layer.extra.values()))


def _dtype(model: FolderCheckpoint) -> torch.dtype:
    found: torch.dtype = getattr(torch, model.facts.dtype)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--keep", type=int, help="experts left per layer; half of them without it")
    parser.add_argument("--folder", help="where the temporary model goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
