"""The roofline against the bound by bandwidth, and a small model counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moecli.ops.roofline import GPUS, Gpu, LayerCount, Matrix, ModelCount, decode, gpu_of, prefill, unique_experts

H100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
INT4 = 0.5195
"""Bytes of a 4-bit weight with its share of a 16-bit scale and a 4-bit zero for every 128"""


def model(layers, hidden, width, experts, top_k, heads, kv_heads, head_dim, vocab, expert_byte=2.0):
    """A model of the usual build, attention and the rest in 16 bits."""

    def matrix(inputs, outputs, size=2.0):
        return Matrix(inputs, outputs, inputs * outputs * size)

    queries, keys = heads * head_dim, kv_heads * head_dim
    layer = LayerCount(
        linears=(matrix(hidden, queries), matrix(hidden, keys), matrix(hidden, keys), matrix(queries, hidden),
                 matrix(hidden, experts)),
        experts=experts,
        expert=(*(matrix(hidden, width, expert_byte) for _ in "gu"), matrix(width, hidden, expert_byte)),
        kv_width=2 * keys, score_width=queries, value_width=queries,
    )  # fmt: skip
    return ModelCount((layer,) * layers, matrix(hidden, vocab), hidden, top_k, 0)


def olmoe(size=2.0):
    return model(16, 2048, 1024, 64, 8, 16, 16, 128, 50304, size)


def qwen3_30b(size=2.0):
    return model(48, 2048, 768, 128, 8, 32, 4, 128, 151936, size)


def mixtral(size=2.0):
    return model(32, 4096, 14336, 8, 2, 32, 8, 128, 32000, size)


BOUNDS = [
    (olmoe, 2.0, {1: 1421, 16: 4426, 64: 15731}), (olmoe, INT4, {1: 2874, 16: 14490, 64: 52376}),
    (qwen3_30b, 2.0, {1: 551, 16: 1347, 64: 3603}), (qwen3_30b, INT4, {1: 985, 16: 4409, 64: 12408}),
    (mixtral, 2.0, {1: 131, 16: 581, 64: 2302}), (mixtral, INT4, {1: 380, 16: 2050, 64: 8128}),
]  # fmt: skip
"""Tokens/s of weights alone on an H100: B * BW / (L U(B) 3 H I b + other weights)"""


@pytest.mark.parametrize(("make", "size", "bounds"), BOUNDS)
def test_decode_is_below_the_bound_by_weights_and_near_it(make, size, bounds):
    for batch, bound in bounds.items():
        found = decode(make(size), H100, batch, context=1).tokens_per_s
        assert found <= bound * 1.005  # the bounds are rounded
        assert found >= bound * (0.9 if batch == 1 else 0.55)


def test_unique_experts_at_their_ends():
    assert unique_experts(128, 8, 1) == pytest.approx(8)
    assert unique_experts(128, 8, 16) == pytest.approx(82.4, abs=0.05)
    assert unique_experts(128, 8, 64) == pytest.approx(125.9, abs=0.05)
    assert unique_experts(4, 8, 1) == 4


def test_a_layer_counted_by_hand():
    """One layer, D 8, one head of 8, F 4, E 4, k 2, vocabulary 16; B 3, context 10; operations are free."""
    small = model(1, 8, 4, 4, 2, 1, 1, 8, 16)
    found = decode(small, Gpu("slow", 1.0, 1e30, ""), 3, 10)
    read = 4 * (1 - 0.5**3)
    moved = 4 * (2 * 64 + 3 * 16 + 3 * 16) + (2 * 32 + 3 * 16 + 3 * 8)  # attention, router
    moved += (10 * 16 + 2 * 8) * 3 * 2  # cache, queries and sums
    moved += 3 * (read * 64) + 6 * 2 * (8 + 4 + 8 + 4 + 4 + 8)  # experts
    moved += 2 * 3 * 8 * 2 + 8 * 3 * 8 * 2  # weighted sum, norms and additions
    moved += 2 * 128 + 3 * 16 + 3 * 32  # head
    assert found.bytes == pytest.approx(moved)
    assert found.seconds == pytest.approx(moved)
    assert found.tokens_per_s == pytest.approx(3 / moved)
    cache, largest = 3 * 10 * 16 * 2, max(3 * 16 * 2, 2 * 3 * (4 * 8 + 4 + 8) + 2 * 6 * (4 + 4 + 8))
    assert found.memory_bytes == cache + largest
    operations = 4 * 2 * 3 * 64 + 2 * 3 * 32 + 2 * 3 * 10 * 16 + 3 * 2 * read * 16 * 32 + 2 * 3 * 2 * 8 + 16 * 3 * 8
    operations += 2 * 3 * 128
    assert found.operations == pytest.approx(operations)


def test_fewer_experts_read_and_fewer_bytes_are_faster_and_a_prompt_is_bound_by_operations():
    whole = qwen3_30b()
    half = replace(whole, layers=tuple(replace(layer, experts=64) for layer in whole.layers))
    assert decode(half, H100, 1, 100) == decode(whole, H100, 1, 100)  # a token reads its k experts either way
    assert decode(half, H100, 32, 100).seconds < decode(whole, H100, 32, 100).seconds
    assert decode(whole, H100, 32, 100, unique=16).seconds < decode(whole, H100, 32, 100).seconds
    long = prefill(whole, H100, 4, 4096)
    assert long.seconds > 0.9 * long.operations / H100.peak
    assert prefill(whole, H100, 1, 2048).tokens_per_s > 20 * decode(whole, H100, 1, 2048).tokens_per_s


def test_a_window_bounds_what_attention_reads():
    whole = olmoe()
    windowed = replace(whole, layers=tuple(replace(layer, window=128) for layer in whole.layers))
    gap = decode(whole, H100, 1, 2048).memory_bytes - decode(windowed, H100, 1, 2048).memory_bytes
    assert gap == 16 * (2048 - 128) * 4096 * 2
    assert decode(whole, H100, 1, 100) == decode(windowed, H100, 1, 100)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"), ("NVIDIA A100-PCIE-40GB", "A100 40 GB"), ("NVIDIA A40", "A40"),
        ("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA L40", "L40"), ("NVIDIA L40S", None), ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_devices_are_known_by_what_cuda_calls_them(device, name):
    assert getattr(gpu_of(device), "name", None) == name
