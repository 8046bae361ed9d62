"""How fast calibration is: one table of work, time, floor, ratio and peak memory.

    python scripts/bench_calibrate.py                                       # small, on the CPU, under a minute
    python scripts/bench_calibrate.py --shape qwen3-30b-a3b --device cuda   # 128 x 2048 tokens, 4 layers, bf16

A model of random weights is written to a folder in the family's own per-expert layout and read from there. Times are
medians over the layers after the first, of one layer and all tokens. The floor of a row is the larger of its
operations at the matrix rate and its bytes at the copy rate; both rates are measured first.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moecli.engine.collectors import FORWARD, collectors
from moecli.engine.data import Batch
from moecli.engine.sweep import SweptLayer, sweep
from moecli.families import facts_of
from moecli.io.reader import FolderCheckpoint

SUMS, COSINES = ("y_mean", "gy_mean"), "gram_cos"
GRAMS, WEIGHTED = ("x_cov", "h_cov"), ("gx_cov", "gh_cov", "ph_cov", "x_cov_pool")
LIGHT = [name for name in FORWARD if name not in (*SUMS, COSINES, *GRAMS, *WEIGHTED)]
ROUTED = "forward + all statistics of routed tokens"


@dataclass(frozen=True)
class Shape:
    hidden: int
    experts: int
    top_k: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def config(self, layers: int, tokens: int, dtype: str) -> dict[str, object]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": self.vocab,
            "hidden_size": self.hidden, "intermediate_size": self.width, "moe_intermediate_size": self.width,
            "num_hidden_layers": layers, "num_experts": self.experts, "num_experts_per_tok": self.top_k,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "max_position_embeddings": tokens, "norm_topk_prob": True, "tie_word_embeddings": False,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "router_aux_loss_coef": 0.0, "dtype": dtype,
        }  # fmt: skip

    def layer_flops(self, tokens: int, length: int) -> float:
        """Operations of one layer, causal attention counted at half."""
        projections = 2 * self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        attention = 2 * length * self.heads * self.head_dim
        experts = self.top_k * 6 * self.hidden * self.width + 2 * self.hidden * self.experts
        return tokens * (projections + attention + experts)

    def all_experts_flops(self, tokens: int) -> float:
        """Every expert on every token up to the last product, which is linear: the sum is taken before it."""
        return tokens * self.experts * 4 * self.hidden * self.width

    def cosine_flops(self, tokens: int) -> float:
        """Every expert on every token, and half of the symmetric matrix of products of their outputs."""
        return tokens * self.experts * (6 * self.hidden * self.width + self.experts * self.hidden)

    def gram_flops(self, tokens: int, of_x: int = 1, of_h: int = 1, pooled: int = 0) -> float:
        """So many Gram matrices of inputs and intermediates for each expert and of all inputs, the upper halves."""
        visits = tokens * self.top_k
        return visits * (of_x * self.hidden**2 + of_h * self.width**2) + pooled * tokens * self.hidden**2

    def output_bytes(self, tokens: int, item: int) -> float:
        """The un-gated outputs of the routed experts, read once."""
        return tokens * self.top_k * self.hidden * item


SHAPES = {
    "small": Shape(hidden=256, experts=16, top_k=4, width=128, heads=8, kv_heads=2, head_dim=32, vocab=512),
    "qwen3-30b-a3b": Shape(
        hidden=2048, experts=128, top_k=8, width=768, heads=32, kv_heads=4, head_dim=128, vocab=32768
    ),
}


# --- the model --------------------------------------------------------------------------------------


def write_model(folder: Path, shape: Shape, layers: int, tokens: int, dtype: torch.dtype, device: str) -> None:
    """Random weights of unit gain, one file a layer."""
    from safetensors.torch import save_file

    source = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, generator=source, device=device) * size[-1] ** -0.5).to(dtype).cpu()

    index: dict[str, str] = {}

    def save(file: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    one = torch.ones(shape.hidden, dtype=dtype)
    save("outside.safetensors", {
        "model.embed_tokens.weight": draw(shape.vocab, shape.hidden) * shape.hidden**0.5,
        "model.norm.weight": one.clone(), "lm_head.weight": draw(shape.vocab, shape.hidden),
    })  # fmt: skip
    for layer in range(layers):
        save(f"layer-{layer:03d}.safetensors", _layer(f"model.layers.{layer}.", shape, draw, one))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(shape.config(layers, tokens, name)))


def _layer(prefix: str, shape: Shape, draw: Callable[..., Tensor], one: Tensor) -> dict[str, Tensor]:
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    head = one[:1].expand(shape.head_dim)
    found = {
        "input_layernorm.weight": one.clone(), "post_attention_layernorm.weight": one.clone(),
        "self_attn.q_norm.weight": head.clone(), "self_attn.k_norm.weight": head.clone(),
        "self_attn.q_proj.weight": draw(queries, shape.hidden), "self_attn.k_proj.weight": draw(keys, shape.hidden),
        "self_attn.v_proj.weight": draw(keys, shape.hidden), "self_attn.o_proj.weight": draw(shape.hidden, queries),
        "mlp.gate.weight": draw(shape.experts, shape.hidden),
    }  # fmt: skip
    sizes = {"gate_proj": (shape.width, shape.hidden), "up_proj": (shape.width, shape.hidden),
             "down_proj": (shape.hidden, shape.width)}  # fmt: skip
    for role, size in sizes.items():
        for expert, weight in enumerate(draw(shape.experts, *size)):
            found[f"mlp.experts.{expert}.{role}.weight"] = weight.clone()
    return {prefix + name: tensor for name, tensor in found.items()}


# --- measuring --------------------------------------------------------------------------------------


class Bench:
    """Clock and memory of one device."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    def median(self, work: Callable[[], object], repeats: int = 5) -> float:
        work()
        return statistics.median(self.seconds(work) for _ in range(repeats))

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Largest allocation on the device since the reset; on the CPU of the process since its start."""
        return (
            torch.cuda.max_memory_allocated() if self.cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        )

    def matrix_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of one large product."""
        size = 8192 if self.cuda else 1024
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self.median(lambda: a @ b)

    def copy_rate(self) -> float:
        """Bytes a second of a copy within the device's memory, read and written counted."""
        source = torch.randn((1 << 30) // 4 if self.cuda else 1 << 24, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.median(lambda: target.copy_(source))


@dataclass(frozen=True)
class Row:
    work: str
    seconds: float
    floor: float
    peak: int

    def text(self) -> str:
        return (
            f"{self.work:46} {self.seconds * 1e3:10.2f} ms {self.floor * 1e3:10.2f} ms {self.seconds / self.floor:8.2f}"
            f" {self.peak / 2**30:9.2f} GiB"
        )


def measure_layers(source: FolderCheckpoint, batches: list[Batch], bench: Bench, works: dict) -> dict[str, tuple]:
    """Median seconds and largest peak of each work, over all layers but the first."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    peaks = dict.fromkeys(works, 0)
    for layer in sweep(source, batches, device=bench.device, statistics=tuple(FORWARD)):
        for name, work in works.items():
            bench.reset_peak()
            taken = bench.seconds(lambda work=work, layer=layer: work(layer))
            if layer.index or len(source.facts.moe_layers) == 1:
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], bench.peak())
    return {name: (statistics.median(seconds[name]), peaks[name]) for name in works}


def bare(layer: SweptLayer) -> None:
    layer.replace({})
    layer.outputs()


def observing(names: Sequence[str], on_device: bool = False) -> Callable[[SweptLayer], object]:
    return lambda layer: layer.observe(collectors(names), on_device=on_device)


def main() -> None:
    args = arguments()
    shape, device = SHAPES[args.shape], args.device
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    bench = Bench(device)
    name = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    matrix, copy = bench.matrix_rate(dtype), bench.copy_rate()
    work = f"{args.layers} layers, {args.samples} x {args.length} tokens, {args.batch} sequences a batch"
    print(f"{name}, torch {torch.__version__}, {args.shape}, {dtype}, {work}")
    print(f"matrix {matrix / 1e12:.2f} TFLOP/s, copy {copy / 1e9:.0f} GB/s (measured)", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_model(Path(folder), shape, args.layers, args.length, dtype, device)
        source = FolderCheckpoint(folder, facts_of)
        ids = torch.randint(0, shape.vocab, (args.samples, args.length))
        batches = [Batch(part, torch.ones_like(part)) for part in ids.split(args.batch)]
        for row in rows(source, batches, shape, bench, dtype, matrix, copy, args.depth):
            print(row.text(), flush=True)


def rows(
    source: FolderCheckpoint, batches: list[Batch], shape: Shape, bench: Bench, dtype: torch.dtype,
    matrix: float, copy: float, depth: int,
) -> Iterator[Row]:  # fmt: skip
    tokens = sum(batch.input_ids.numel() for batch in batches)
    length = batches[0].input_ids.shape[1]
    works = {
        "forward": bare,
        "forward + counts and gate sums": observing([]),
        ROUTED: observing(LIGHT),
        "forward + x_cov and h_cov, on the device": observing(GRAMS, on_device=True),
        "forward + x_cov and h_cov": observing(GRAMS),
        "all of routed tokens, all Grams, on the device": observing([*LIGHT, *GRAMS, *WEIGHTED], on_device=True),
        "forward + y_mean and gy_mean": observing(SUMS),
        "forward + gram_cos": observing([COSINES]),
    }
    forward = shape.layer_flops(tokens, length) / matrix
    read = shape.output_bytes(tokens, dtype.itemsize) / copy
    grams, all_grams = shape.gram_flops(tokens) / matrix, shape.gram_flops(tokens, 2, 3, 1) / matrix
    floors = (
        forward, forward, forward + read, forward + grams, forward + grams, forward + read + all_grams,
        forward + shape.all_experts_flops(tokens) / matrix, forward + shape.cosine_flops(tokens) / matrix,
    )  # fmt: skip
    print(f"{'work, one layer':46} {'time':>13} {'floor':>13} {'ratio':>8} {'peak':>13}")
    found = measure_layers(source, batches, bench, works)
    for (work, (seconds, peak)), floor in zip(found.items(), floors, strict=True):
        yield Row(work, seconds, floor, peak)
    bare_s, stats_s = found["forward"][0], found[ROUTED][0]
    rate = shape.layer_flops(tokens, length) / bare_s
    print(f"bare forward {rate / 1e12:.2f} TFLOP/s, {rate / matrix:.1%} of the matrix rate")
    grams_s = found["forward + x_cov and h_cov, on the device"][0]
    print(f"statistics {stats_s / bare_s:.2f}, Grams {grams_s / bare_s:.2f} times the bare forward")
    yield from streaming(source, batches, bench, depth, found)


def streaming(source: FolderCheckpoint, batches: list[Batch], bench: Bench, depth: int, found: dict) -> Iterator[Row]:
    """The rate of weights alone, and what whole sweeps over `depth` layers take against their layers' own time."""
    layer_bytes = sum(source.spec(n).bytes for n in source.names() if n.startswith("model.layers.0."))
    few = [Batch(batches[0].input_ids[:1, :16], batches[0].attention_mask[:1, :16])]
    deep = Repeated(source.folder, depth)
    ready, alone, peak = sweep_seconds(deep, few, [], bench)
    behind = (depth - 1) * layer_bytes  # the clock starts when the first layer is there
    floor, rates = copy_floor(source, behind, bench)
    yield Row(f"weights of {depth - 1} layers, {behind / 1e9:.2f} GB", alone, floor, peak)
    print(f"weights {behind / alone / 1e9:.2f} GB/s; {rates}; ready after {ready:.2f} s")
    for work, names in (("forward", None), (ROUTED, LIGHT)):
        ready, seconds, peak = sweep_seconds(deep, batches, names, bench)
        yield Row(f"sweep of {depth} layers, {work}", seconds, depth * found[work][0], peak)
    print(f"floor of sweeps: their layers' own time; embedding and the first layer took {ready:.2f} s before that")
    print(sweep(deep, batches, device=bench.device).plan)


def sweep_seconds(
    source: FolderCheckpoint, batches: list[Batch], names: list[str] | None, bench: Bench
) -> tuple[float, float, int]:
    """Seconds until the first layer is there, seconds from there to the end of the last, and peak memory."""
    bench.reset_peak()
    start = time.perf_counter()
    for layer in sweep(source, batches, device=bench.device):
        if layer.index == 0:
            bench.wait()
            begin = time.perf_counter()
        if names is not None:
            layer.observe(collectors(names))
    bench.wait()
    return begin - start, time.perf_counter() - begin, bench.peak()


class Repeated(FolderCheckpoint):
    """A deeper model over the same files: its layers are those of the folder, again and again."""

    def __init__(self, folder: Path, depth: int) -> None:
        super().__init__(folder, facts_of)
        stored = self.facts.layers
        own = [(name.split(".", 3), entry) for name, entry in self._entries.items() if ".layers." in name]
        for layer in range(stored, depth):
            for (model, layers, index, rest), entry in own:
                if int(index) == layer % stored:
                    self._entries[f"{model}.{layers}.{layer}.{rest}"] = entry
        self.config = {**self.config, "num_hidden_layers": depth}
        self.facts = facts_of(self.config)


def copy_floor(source: FolderCheckpoint, size: int, bench: Bench) -> tuple[float, str]:
    """Seconds for these bytes at the slower of two measured rates: page cache to memory, memory to device."""
    from concurrent.futures import ThreadPoolExecutor

    threads = 8 if bench.cuda else 1
    buffers = [torch.empty(64 << 20, dtype=torch.uint8, pin_memory=bench.cuda) for _ in range(threads)]
    files = [file for file in source.files if file.stat().st_size >= threads * buffers[0].numel()] or list(source.files)

    def read(part: int) -> int:
        with files[-1].open("rb", buffering=0) as file:
            file.seek(part * min(buffers[0].numel(), files[-1].stat().st_size // threads))
            return file.readinto(buffers[part].numpy())

    with ThreadPoolExecutor(threads) as pool:
        count = sum(pool.map(read, range(threads)))
        from_cache = count / bench.median(lambda: list(pool.map(read, range(threads))))
    text = f"page cache to memory {from_cache / 1e9:.1f} GB/s with {threads} threads"
    rate = from_cache
    if bench.cuda:
        on_device = torch.empty(buffers[0].numel(), dtype=torch.uint8, device=bench.device)
        over = buffers[0].numel() / bench.median(lambda: on_device.copy_(buffers[0], non_blocking=True))
        rate, text = min(rate, over), text + f", pinned memory to device {over / 1e9:.1f} GB/s"
    return size / rate, text


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int)
    parser.add_argument(
        "--depth", type=int, help="layers of the whole sweeps, which read the same files again and again"
    )
    parser.add_argument("--samples", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a batch")
    parser.add_argument("--folder", help="where the temporary model goes")
    args = parser.parse_args()
    large = args.shape != "small"
    args.layers = args.layers or (4 if large else 3)
    args.depth = args.depth or (48 if large else args.layers)
    args.samples = args.samples or (128 if large else 8)
    args.length = args.length or (2048 if large else 256)
    return args


if __name__ == "__main__":
    main()
