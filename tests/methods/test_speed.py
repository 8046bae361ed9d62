"""What is timed is the model's own generation; the numbers are those of the clock."""

from __future__ import annotations

import statistics

import pytest
import torch

from moecli.core.errors import StageFailed
from moecli.families.adapter import load_model
from moecli.methods.eval import speed as module
from moecli.methods.eval.speed import Speed, copy_bandwidth, speed
from moecli.methods.quantize.rtn import Rtn, rtn
from moecli.runtime.packed import PackedProjection

SMALL = Speed(batch_sizes=(1, 3), prompt=8, new_tokens=5, repeats=3)


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is one second after the last, and two after every third."""
    now = {"calls": 0, "time": 0.0}

    def tick(device):
        now["calls"] += 1
        now["time"] += 2.0 if now["calls"] % 3 == 0 else 1.0
        return now["time"]

    monkeypatch.setattr(module, "_now", tick)


def test_rates_are_tokens_over_the_median_of_the_runs_that_count(checkpoint, context, clock, monkeypatch):
    monkeypatch.setattr(module, "copy_bandwidth", lambda device: 5e9)
    found = speed(SMALL, checkpoint(), context())
    values = {m.metric: m.value for m in found.metrics}
    # A run looks three times: start (+1), after the prompt (+1), after decode (+2).
    assert values == {
        "prefill tokens/s, batch 1": 8, "decode tokens/s, batch 1": 1 / (2 / 5),
        "prefill tokens/s, batch 3": 24, "decode tokens/s, batch 3": 3 / (2 / 5),
    }  # fmt: skip
    assert all(m.samples == 3 and m.stderr == 0 and m.higher_is_better for m in found.metrics)
    assert found.settings["device"].endswith("CPU")


def test_the_record_says_what_was_measured_where(checkpoint, context):
    ctx = context()
    found = speed(SMALL, checkpoint(), ctx)
    assert ctx.records["speed"]["prompt"] == 8
    assert ctx.records["speed"]["bandwidth"]["measured"] > 1e8
    assert ctx.records["speed"]["bandwidth"]["sheet"] is None
    assert all(m.value > 0 for m in found.metrics)
    assert any("copying moves" in note for note in ctx.notes)


def test_decode_goes_on_from_the_cache_as_generate_does(checkpoint, monkeypatch):
    model = load_model(checkpoint())
    prompt = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **kwargs: seen.append(kwargs["input_ids"]) or forward(**kwargs))
    with torch.inference_mode():
        module._run(model, prompt, 4, torch.device("cpu"))
    monkeypatch.undo()
    wanted = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, min_new_tokens=4, do_sample=False,
        repetition_penalty=1.0, pad_token_id=0,
    )  # fmt: skip
    assert torch.cat(seen, 1).tolist() == wanted.tolist()


def test_bandwidth_is_bytes_read_and_written_over_the_best_time(monkeypatch):
    times = iter([0, 4, 4, 5, 5, 9, 9, 12, 12, 20, 20, 28])
    monkeypatch.setattr(module, "_now", lambda device: float(next(times)))
    monkeypatch.setattr(module, "COPY_BYTES", 1600)
    assert copy_bandwidth(torch.device("cpu")) == 2 * 100 / 1


def test_the_error_is_that_of_a_median():
    found = {m.metric: m for m in module._metrics(2, module.Times((1.0, 2.0, 4.0), (1.0,), 2**30), SMALL)}
    rates = [16 / s for s in (1.0, 2.0, 4.0)]
    assert found["prefill tokens/s, batch 2"].value == 8
    assert found["prefill tokens/s, batch 2"].stderr == pytest.approx(1.2533 * statistics.stdev(rates) / 3**0.5)
    assert found["decode tokens/s, batch 2"].stderr is None
    assert found["peak memory GiB, batch 2"].value == 1


def test_a_prompt_longer_than_the_positions_is_refused(checkpoint):
    facts = checkpoint().facts
    [problem] = Speed(prompt=facts.max_positions, new_tokens=8).problems(facts)
    assert problem.hint == f"write `prompt: {facts.max_positions - 8}`"


def test_measurements_of_other_devices_have_other_keys(monkeypatch):
    assert SMALL.identity(str)["device"] == module.device_name()
    monkeypatch.setattr(module, "device_name", lambda: "another")
    assert SMALL.identity(str) == {"device": "another"}


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_experts_that_stay_packed_compute_what_the_dense_model_computes(checkpoint, context, monkeypatch, family):
    model = checkpoint(family, dtype="bfloat16")
    ctx = context("quantize")
    packed = rtn(Rtn(bits=4, group_size=32), model, None, ctx)
    ids, seen = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0)), []

    def measured(loaded, opt, batch, ctx):
        seen.append((loaded, loaded(input_ids=ids).logits))
        return module.Times((1.0,), (1.0,), None)

    monkeypatch.setattr(module, "_measured", measured)
    for memory, each in (("dense", packed), ("packed", packed), ("packed", model)):
        with torch.no_grad():
            speed(SMALL.model_copy(update={"memory": memory, "batch_sizes": (1,)}), each, ctx)
    (dense, wanted), (kept, found), (source, _) = seen
    assert torch.equal(found, wanted)
    layers = len(model.facts.moe_layers)
    assert sum(isinstance(part, PackedProjection) for part in kept.modules()) == 2 * layers
    assert not any(isinstance(part, PackedProjection) for loaded in (dense, source) for part in loaded.modules())
    notes = [note for note in ctx.notes if "packed" in note]
    assert notes == [f"experts of {layers} layers stay packed", "no experts are packed: all weights are dense"]


def test_what_cannot_stay_packed_is_said(checkpoint, context):
    ctx = context("quantize")
    packed = rtn(Rtn(bits=8, group_size=32), checkpoint(), None, ctx)
    with pytest.raises(StageFailed, match="experts of 8 bits cannot stay packed") as caught:
        speed(SMALL.model_copy(update={"memory": "packed"}), packed, ctx)
    assert caught.value.hint == "write `memory: dense`"
