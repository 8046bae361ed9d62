"""Operations of decoding against torch's own counter on the real modules; bytes against a sum by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moecli.core.artifacts import sketch_of
from moecli.families import facts_of
from moecli.families.adapter import load_model
from moecli.families.count import count_of
from moecli.families.work import decode_bytes, decode_flops
from moecli.io.reader import FolderCheckpoint
from tests import tiny

TOKENS = 20
# The counter does not see elementwise products (linear attention) nor convolutions of one token.
LATENT = ("deepseek_v2", "deepseek_v3")
COUNTED = [name for name in tiny.FAMILIES if name not in ("qwen3_next", "lfm2_moe", *LATENT)]


def opened(folder):
    return FolderCheckpoint(folder, facts_of)


def flops(checkpoint, tokens=TOKENS):
    return decode_flops(checkpoint.config, sketch_of(checkpoint).specs, tokens)


def counted(checkpoint, steps):
    """Operations of the real modules, with plain attention and a loop over experts; `steps` share a cache."""
    network = load_model(checkpoint)
    network.config._attn_implementation = network.config._experts_implementation = "eager"
    cache, counter = None, FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        for step in steps:
            cache = network(torch.tensor([step]), past_key_values=cache, use_cache=True).past_key_values
    return counter.get_total_flops()


@pytest.mark.parametrize("model_type", COUNTED)
def test_operations_are_those_of_decoding(tiny_model, model_type):
    checkpoint = opened(tiny_model(model_type))
    made = counted(checkpoint, [[3 + step] for step in range(TOKENS)]) / TOKENS
    assert flops(checkpoint) == pytest.approx(made, rel=1e-9)


@pytest.mark.parametrize("model_type", LATENT)
def test_latent_attention_makes_keys_and_values_once(tiny_model, model_type):
    """Some versions of the stock modules make them again at every step, so the oracle is a prefill: all tokens see all
    positions, that is twice the mean cache, less the first one.
    """
    checkpoint = opened(tiny_model(model_type))
    prefill = counted(checkpoint, [list(range(3, 3 + TOKENS))]) / TOKENS
    assert 2 * flops(checkpoint) - flops(checkpoint, 1) == pytest.approx(prefill, rel=1e-9)


def test_sliding_attention_sees_its_window_only(tiny_model):
    """gpt_oss, one of its two layers slides over 16 positions: 16 of 20 tokens see fewer."""
    checkpoint = opened(tiny_model("gpt_oss"))
    core = 4 * tiny.HEADS * tiny.HEAD_DIM
    lost = core * sum(n - 16 for n in range(17, TOKENS + 1)) / TOKENS
    wide = dict(checkpoint.config) | {"sliding_window": 64}
    assert decode_flops(wide, sketch_of(checkpoint).specs, TOKENS) - flops(checkpoint) == pytest.approx(lost)


def test_the_number_of_experts_matters_to_the_router_only(tiny_model):
    assert flops(opened(tiny_model("qwen3_moe"))) == pytest.approx(
        flops(opened(tiny_model("qwen3_moe", experts=4))) + 2 * 2 * 4 * tiny.HIDDEN  # rows of two routers
    )


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_read_are_the_chosen_experts_and_one_embedding_row(tiny_model, tied):
    checkpoint = opened(tiny_model("qwen3_moe", tie_word_embeddings=tied))
    sizes = {name: checkpoint.spec(name).bytes for name in checkpoint.names()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = tiny.VOCAB * tiny.HIDDEN * 4
    found = decode_bytes(checkpoint)
    assert found.stored == sum(sizes.values())
    once = embedding - tiny.HIDDEN * 4 if not tied else 0
    assert found.read == pytest.approx(found.stored - experts * 6 / 8 - once)


@pytest.mark.parametrize("model_type", [*COUNTED, *LATENT])
def test_the_estimate_of_speed_multiplies_the_same_matrices(tiny_model, model_type):
    """`families.count` describes the same model for the roofline: matrices and widths of attention agree."""
    checkpoint = opened(tiny_model(model_type))
    count = count_of(sketch_of(checkpoint))
    products = count.head.inputs * count.head.outputs
    for layer in count.layers:
        products += sum(matrix.inputs * matrix.outputs for matrix in layer.linears)
        products += count.top_k * sum(matrix.inputs * matrix.outputs for matrix in layer.expert)
        products += layer.score_width + layer.value_width
    assert flops(checkpoint, tokens=1) == pytest.approx(2 * products)
