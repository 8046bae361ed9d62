"""Perplexity, bits per character and Information Capacity against plain loops over the whole model."""

import json
import math
import shutil

import pytest
import torch

from moecli.core.artifacts import sketch_of
from moecli.core.errors import StageFailed
from moecli.families import facts_of
from moecli.families.adapter import load_model, load_tokenizer
from moecli.families.work import decode_bytes, decode_flops
from moecli.io.reader import FolderCheckpoint
from moecli.methods.eval.bits_per_character import BitsPerCharacter, bits_per_character
from moecli.methods.eval.information_capacity import InformationCapacity, information_capacity
from moecli.methods.eval.perplexity import Perplexity, perplexity
from moecli.methods.quantize.rtn import Rtn, rtn

TEXTS = [" ".join(f"w{i * j % 37}" for j in range(2, 40)) for i in (3, 5, 7)] + ["short one", "é"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def values(evaluation):
    return {m.metric: m.value for m in evaluation.metrics}


EVALUATIONS = {
    "perplexity": (perplexity, lambda texts, **more: Perplexity(dataset=texts, window=32, **more)),
    "bits-per-character": (
        bits_per_character, lambda texts, **more: BitsPerCharacter(dataset=texts, window=40, stride=16, **more),
    ),
    "information-capacity": (
        information_capacity, lambda texts, **more: InformationCapacity(dataset=texts, tokens=48, **more),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_streamed_numbers_are_those_in_memory(checkpoint, context, texts, model_type, name):
    run, options = EVALUATIONS[name]
    model = checkpoint(model_type)
    found = [
        run(options(texts, batch_size=3, backend=backend), model, context(backend))
        for backend in ("memory", "streamed")
    ]
    assert values(found[0]) == pytest.approx(values(found[1]), rel=1e-6)
    assert found[0].settings == found[1].settings


@pytest.mark.parametrize("name", EVALUATIONS)
def test_nan_names_its_text(checkpoint, context, texts, tmp_path, name):
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint().folder, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    run, options = EVALUATIONS[name]
    with pytest.raises(StageFailed, match=r"the model's logits are NaN in \w+ 0, which begins `w6 w9 w12"):
        run(options(texts), FolderCheckpoint(tmp_path / "nan", facts_of), context())


def test_rolling_numbers_are_lm_evals_with_a_tokenizer_that_adds_bos(checkpoint, context, texts, tmp_path):
    from tokenizers.processors import TemplateProcessing

    from moecli.methods.eval.lm_eval import LmEval, lm_eval
    from tests import tiny

    folder = tmp_path / "bos"
    shutil.copytree(checkpoint().folder, folder)
    tokenizer = tiny.make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save_pretrained(folder)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "roll.yaml").write_text(
        f"task: roll\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {texts}}}}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetadata: {version: 1}\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    model = FolderCheckpoint(folder, facts_of)
    theirs = lm_eval(LmEval(tasks=["roll"], include=str(tmp_path / "tasks"), max_length=32), model, context("a"))
    ours = values(perplexity(Perplexity(dataset=texts, window=32), model, context("b")))
    for name, value in values(theirs).items():
        assert ours[f"{name} (rolling)"] == pytest.approx(value, rel=1e-6)


def test_perplexity_keeps_its_documents(checkpoint, context, texts):
    found = perplexity(Perplexity(dataset=texts, window=32), checkpoint(), context())
    (items,) = found.items
    assert [name.split(":")[0] for name in items.docs] == ["0", "1", "2", "3", "4"]
    for name, column in items.columns.items():
        assert column.total() == pytest.approx(values(found)[name], rel=1e-12)
    assert items.columns["bits_per_byte (rolling)"].weights == tuple(len(text.encode()) for text in TEXTS)


def test_a_text_shorter_than_a_window_is_refused(checkpoint, context, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("tiny")
    with pytest.raises(StageFailed, match=r"short.txt` has 4 tokens, a window is 32") as caught:
        perplexity(Perplexity(dataset=str(path), window=32), checkpoint(), context("a"))
    assert caught.value.hint == "lower `window`"
    with pytest.raises(StageFailed, match=r"short.txt` has 4 tokens, the first window needs 41"):
        bits_per_character(BitsPerCharacter(dataset=str(path), window=40, stride=16), checkpoint(), context("b"))
    path.write_text("x")
    with pytest.raises(StageFailed, match=r"no document of `.*short.txt` has two tokens"):
        information_capacity(InformationCapacity(dataset=str(path), tokens=48), checkpoint(), context("c"))


# --- bits per character ---------------------------------------------------------------------------


def nats(network, inputs, targets):
    with torch.no_grad():
        rows = network(torch.tensor([inputs])).logits[0, -len(targets) :].double().log_softmax(-1)
    return -sum(rows[i, target].item() for i, target in enumerate(targets))


def test_bits_per_character_is_a_direct_windowed_sum(checkpoint, context, texts):
    model = checkpoint(max_position_embeddings=512)
    network, tokenizer = load_model(model), load_tokenizer(model)
    window, stride = 40, 16
    stream = [token for text in TEXTS for token in tokenizer.encode(text)]
    published, start = 0.0, 0
    while start + window + 1 <= len(stream):  # the published loop: whole windows of window + 1 tokens
        chunk = stream[start : start + window + 1]
        published += nats(network, chunk[:-1], chunk[1:] if start == 0 else chunk[-stride:])
        start += stride
    scored = start - stride + window + 1
    tail = nats(network, stream[-window - 1 : -1], stream[scored:]) if scored < len(stream) else 0.0
    assert 0 < len(stream) - scored < stride, "the text has a tail"
    characters = sum(len(text) for text in TEXTS)
    options = BitsPerCharacter(dataset=texts, window=window, stride=stride)
    found = values(bits_per_character(options, model, context()))
    assert found["bits_per_character (as published)"] == pytest.approx(published / math.log(2) / characters, rel=1e-6)
    assert found["bits_per_character"] == pytest.approx((published + tail) / math.log(2) / characters, rel=1e-6)


def test_the_published_sizes_are_the_default():
    options = BitsPerCharacter(dataset="x")
    assert (options.window, options.stride) == (1900, 512)


def test_windows_beyond_the_models_positions_are_refused(checkpoint):
    facts = checkpoint().facts
    said = [p.message for p in BitsPerCharacter(dataset="x").problems(facts)]
    assert said == ["`window` must be between 2 and the model's 256 positions, got 1900"]
    said = [p.message for p in BitsPerCharacter(dataset="x", window=100, stride=101).problems(facts)]
    assert said == ["`stride` must be at most `window` (100), got 101"]
    said = [p.message for p in InformationCapacity(dataset="x").problems(facts)]
    assert said == ["`tokens` must be at most the model's 256 positions, got 1024"]


# --- information capacity -------------------------------------------------------------------------


def test_information_capacity_is_its_formula(checkpoint, context, texts):
    model = checkpoint()
    network, tokenizer = load_model(model), load_tokenizer(model)
    assert len(tokenizer) < model.facts.vocab, "the cut of the softmax shows"
    sizes, bits, count = [], 0.0, 0
    for text in TEXTS:
        ids = tokenizer.encode(text)[:48]
        if len(ids) < 2:
            continue
        sizes.append(8 * len(tokenizer.decode(ids[1:]).encode("utf-8")) / len(ids[1:]))
        with torch.no_grad():
            rows = network(torch.tensor([ids])).logits[0, :-1, : len(tokenizer)].double().log_softmax(-1)
        bits -= sum(rows[i, ids[i + 1]].item() for i in range(len(ids) - 1)) / math.log(2)
        count += len(ids) - 1
    gain = sum(sizes) / len(sizes) - bits / count
    for corpus, b in (("mixed_text", -24), ("ch_fineweb_edu", -18.7), ("other", -27)):
        options = InformationCapacity(dataset=texts, tokens=48, corpus=corpus)
        found = values(information_capacity(options, model, context(corpus)))
        flops = decode_flops(model.config, sketch_of(model).specs, 48)
        weights = decode_bytes(model)
        assert found["information_capacity"] == pytest.approx((gain + b) / math.log2(flops), rel=1e-6)
        read, stored = (found[f"information_capacity per bytes {how} (ours)"] for how in ("read", "stored"))
        assert read == pytest.approx((gain + b) / math.log2(weights.read), rel=1e-6)
        assert stored == pytest.approx((gain + b) / math.log2(weights.stored), rel=1e-6)
        assert found["decode GFLOPs per token"] == pytest.approx(flops / 1e9)


def test_packed_weights_cost_bytes_and_no_operations(checkpoint, context, texts):
    model, ctx = checkpoint(), context("rtn")
    rtn(Rtn(bits=4, group_size=16), model, None, ctx)
    packed = ctx.finish(model)
    before, after = decode_bytes(model), decode_bytes(packed)
    experts = sum(packed.spec(name).bytes for name in packed.names() if ".experts." in name)
    other = sum(packed.spec(name).bytes for name in packed.names()) - experts
    assert after.read == pytest.approx(other - 127 * 64 * 4 + experts * 2 / 8)  # all but one row of 128 embeddings
    assert after.read < before.read / 2 and after.stored < before.stored / 2
    options = InformationCapacity(dataset=texts, tokens=48)
    found = [values(information_capacity(options, m, context(str(i)))) for i, m in enumerate((model, packed))]
    assert found[0]["decode GFLOPs per token"] == found[1]["decode GFLOPs per token"]
    assert found[0]["text_size (bits per token)"] == found[1]["text_size (bits per token)"]


def test_the_error_of_the_gain_is_that_of_simulated_samples():
    import random

    from moecli.methods.eval.information_capacity import _error

    rng, gains, errors = random.Random(0), [], []
    for _ in range(400):
        counts = [rng.randint(20, 60) for _ in range(50)]
        sizes = [rng.gauss(30, 3) for _ in counts]
        bits = [n * rng.gauss(5, 1) for n in counts]
        size, nll = sum(sizes) / len(sizes), sum(bits) / sum(counts)
        gains.append(size - nll)
        errors.append(_error(sizes, bits, counts, size, nll))
    mean = sum(gains) / len(gains)
    spread = math.sqrt(sum((g - mean) ** 2 for g in gains) / (len(gains) - 1))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)
    assert _error([1.0], [1.0], [1], 1.0, 1.0) is None
