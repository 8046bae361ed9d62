"""How fast a model could run: operations and bytes counted, against the most a GPU can do. An estimate, not measured.

    time of a piece of work = max(operations / peak, bytes / bandwidth); a step is the sum of its pieces

Nothing overlaps and nothing costs a launch, as in LLM-Viewer (arXiv 2402.16363), whose rules for dense models these
are; routed experts are ours. Decode is bounded by the bytes of the weights it reads, so real programs are slower, most
of all at small batches. Weights are read as they are stored: a program that unpacks them first moves more. Activations
and KV cache have 16 bits (32 for a float32 model), so the peak is that of 16 bits, whatever the weights have.

Letters: B sequences, S tokens of context, E experts of a layer, k experts per token, U experts that a step reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

TILE = 16
"""Rows that a grouped matrix product computes at a time: an expert's tokens are rounded up to it."""


class Gpu(NamedTuple):
    """What a data sheet promises."""

    name: str
    bandwidth: float
    """bytes/s"""
    peak: float
    """operations/s of dense 16-bit matrix products with 32-bit sums"""
    source: str


_VIEWER = "LLM-Viewer's table (2402.16363)"
_SHEET = "vendor's data sheet"
GPUS: tuple[Gpu, ...] = (
    Gpu("A40", 696e9, 150e12, _VIEWER),
    Gpu("RTX A6000", 768e9, 155e12, _VIEWER),
    Gpu("L40", 864e9, 181e12, _VIEWER),
    Gpu("A100 40 GB", 1555e9, 312e12, _VIEWER),
    Gpu("A100 80 GB", 2039e9, 312e12, _VIEWER),
    Gpu("H100 PCIe", 2048e9, 756e12, _VIEWER),
    Gpu("H100 SXM", 3.35e12, 989e12, f"{_SHEET}; LLM-Viewer has 3.07e12 bytes/s"),
    Gpu("H200", 4.8e12, 989e12, _SHEET),
)
"""The GPUs that estimates are made for, by rising bandwidth."""


_WORDS = (("H100 NVL", ""), ("H100 PCIE", "H100 PCIe"), ("H100", "H100 SXM"), ("H200", "H200"), ("L40S", ""),
          ("L40", "L40"), ("A6000", "RTX A6000"), ("A40", "A40"), ("A100", "A100 40 GB"))  # fmt: skip
"""What CUDA's name of a device holds, the first that fits; "" is no GPU of the table."""


def gpu_of(device_name: str) -> Gpu | None:
    """The entry of a device as CUDA names it, such as `NVIDIA H100 80GB HBM3`; None for one that is not there."""
    text = device_name.replace("-", " ").upper()
    name = next((gpu for word, gpu in _WORDS if word in text), "")
    if name == "A100 40 GB" and "80GB" in text:
        name = "A100 80 GB"
    return next((gpu for gpu in GPUS if gpu.name == name), None)


class Matrix(NamedTuple):
    """One linear of a model: K inputs, N outputs, and what it takes as it is stored."""

    inputs: int
    outputs: int
    bytes: float


@dataclass(frozen=True, slots=True)
class LayerCount:
    """What one decoder layer is made of."""

    linears: tuple[Matrix, ...]
    """Attention, router, shared experts, dense MLP: everything that every token goes through"""
    experts: int = 0
    """E, 0 in a dense layer"""
    expert: tuple[Matrix, ...] = ()
    """Gate, up and down of one expert"""
    small_bytes: float = 0
    """Norms and biases"""
    kv_width: int = 0
    """Numbers in the cache for each token; 0 where there is no attention"""
    score_width: int = 0
    """Heads times the width of a query"""
    value_width: int = 0
    """Heads times the width of a value"""
    window: int | None = None
    """Tokens that attention looks back, None for all"""


@dataclass(frozen=True, slots=True)
class ModelCount:
    """What a model is made of."""

    layers: tuple[LayerCount, ...]
    head: Matrix
    hidden: int
    top_k: int
    stored_bytes: int
    """All tensors, embeddings among them"""
    number_bytes: int = 2
    """Of an activation and of a number in the cache"""


class Estimate(NamedTuple):
    """Of one step: B tokens in decode, B prompts in prefill."""

    seconds: float
    tokens_per_s: float
    operations: float
    bytes: float
    """Read and written"""
    memory_bytes: float
    """Weights, cache, and the activations of the largest layer"""


class _Work(NamedTuple):
    operations: float
    bytes: float
    stored: float = 0
    """Bytes of activations that are written"""


def unique_experts(experts: int, top_k: int, tokens: float) -> float:
    """U = E (1 - (1 - k/E)^B), experts that B tokens choose together when they choose independently. Real routing is
    skewed and needs fewer.
    """
    return experts * (1 - (1 - min(1.0, top_k / experts)) ** tokens) if experts else 0.0


def decode(model: ModelCount, gpu: Gpu, batch: int, context: int, unique: float | None = None) -> Estimate:
    """One new token for each of `batch` sequences of `context` tokens. `unique` is a measured U of a layer."""
    return _estimate(model, gpu, batch, 1, context, unique)


def prefill(model: ModelCount, gpu: Gpu, batch: int, prompt: int) -> Estimate:
    """`batch` prompts of `prompt` tokens, logits of the last one only; attention sees half of the prompt on average."""
    return _estimate(model, gpu, batch, prompt, prompt, None)


def _estimate(model: ModelCount, gpu: Gpu, batch: int, new: int, context: int, unique: float | None) -> Estimate:
    by_layer = [list(_layer(layer, model, batch, new, context, unique)) for layer in model.layers]
    head = _linear(model.head, batch, model.number_bytes)
    works = [*(work for layer in by_layer for work in layer), head]
    seconds = sum(max(work.operations / gpu.peak, work.bytes / gpu.bandwidth) for work in works)
    largest = max([head.stored, *(sum(work.stored for work in layer) for layer in by_layer)])
    cache = sum(layer.kv_width * min(context, layer.window or context) for layer in model.layers)
    memory = model.stored_bytes + batch * cache * model.number_bytes + largest
    return Estimate(
        seconds, batch * new / seconds, sum(w.operations for w in works), sum(w.bytes for w in works), memory
    )


def _layer(
    layer: LayerCount, model: ModelCount, batch: int, new: int, context: int, unique: float | None
) -> Iterator[_Work]:
    tokens, size = batch * new, model.number_bytes
    for matrix in layer.linears:
        yield _linear(matrix, tokens, size)
    if layer.kv_width:
        yield _attention(layer, batch, new, context, size)
    if layer.experts:
        read = unique_experts(layer.experts, model.top_k, tokens) if unique is None else unique
        for matrix in layer.expert:
            yield _routed(matrix, tokens * model.top_k, read, size)
        yield _Work(2 * tokens * model.top_k * model.hidden, 2 * tokens * model.hidden * size)
    # Two norms (7 operations a number), two additions, each reading and writing the stream.
    yield _Work(16 * tokens * model.hidden, 8 * tokens * model.hidden * size + layer.small_bytes)


def _linear(matrix: Matrix, tokens: int, size: int) -> _Work:
    stored = tokens * matrix.outputs * size
    operations = 2 * tokens * matrix.inputs * matrix.outputs
    return _Work(operations, matrix.bytes + tokens * matrix.inputs * size + stored, stored)


def _attention(layer: LayerCount, batch: int, new: int, context: int, size: int) -> _Work:
    """Scores and values; keys and values are read once for each sequence, new ones were written by their linears."""
    seen = min(context, layer.window or context)
    looked = seen if new == 1 else (seen + 1) / 2
    widths = layer.score_width + layer.value_width
    operations = 2 * batch * new * looked * widths
    return _Work(
        operations, batch * (seen * layer.kv_width + new * widths) * size, batch * new * layer.value_width * size
    )


def _routed(matrix: Matrix, visits: float, read: float, size: int) -> _Work:
    """One projection of all experts that are read; each computes its tokens, rounded up to whole tiles."""
    rows = read * math.ceil(visits / read / TILE) * TILE
    stored = visits * matrix.outputs * size
    return _Work(
        2 * rows * matrix.inputs * matrix.outputs, read * matrix.bytes + visits * matrix.inputs * size + stored, stored
    )
