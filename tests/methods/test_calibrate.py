"""The calibrate stage: parts that recipes share, experts with few tokens, data sets in a recipe."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moecli.core.artifacts import CalibrationStats
from moecli.core.errors import RecipeError, StageFailed, SurroundingsError
from moecli.engine.data import RULES, batches_of, tokenise
from moecli.engine.stats import names_in
from moecli.io.store import RunFolder
from moecli.methods.calibrate import statistics as module
from moecli.methods.calibrate.statistics import Statistics
from moecli.recipe.schema import resolved_yaml
from moecli.runner.execute import Execution
from moecli.runner.execute import run as run_plan
from moecli.runner.open import open_recipe

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIZE = {"samples": 3, "tokens_per_sample": 16}


@pytest.fixture
def text(tmp_path):
    """A file whose documents have letters of their own, so that routing is not even."""
    rows = [" ".join(chr(97 + (i * j) % 26) * (1 + j % 5) for j in range(40)) for i in range(1, 20)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def observed(monkeypatch):
    """Which statistics each layer was asked for, in order."""
    asked = []

    def spy(names):
        asked.append(list(names))
        return collectors(names)

    collectors = module.collectors
    monkeypatch.setattr(module, "collectors", spy)
    return asked


def options(text, **given):
    values = {"dataset": str(text), "statistics": ["gean_sum", "absmax", "prob_sum"], **SIZE, **given}
    return Statistics.model_validate_json(json.dumps(values))


def same(first, second):
    return list(first) == list(second) and all(
        torch.equal(first[layer][name], second[layer][name]) for layer in first for name in names_in(first[layer])
    )


def run_recipe(folder, model, stages):
    """All steps of a recipe in `folder`; the statistics of its first one."""
    path = folder / "recipe.yaml"
    folder.mkdir(exist_ok=True)
    path.write_text(json.dumps({"recipe": 1, "model": str(model), "stages": stages}))
    opened = open_recipe(path)
    run = RunFolder(folder / "run")
    execution = Execution(opened, run, torch.device("cpu"))
    with run.lock():
        for index in range(len(opened.plan.steps)):
            execution.step(index)
    return execution.artifact(0, CalibrationStats), opened, run


# -- parts


def test_one_more_statistic_observes_only_that_one(tiny_model, text, tmp_path, observed):
    calibrate = {"run": "calibrate/statistics", "with": {"dataset": str(text), **SIZE}}
    keep = {"with": {"keep": 4, "protect": "none"}}
    first, _, _ = run_recipe(tmp_path / "a", tiny_model("qwen3_moe"), [calibrate, {"run": "prune/reap", **keep}])
    assert observed == [["count", "gean_sum"]] * 2
    observed.clear()
    calibrate["with"]["statistics"] = ["gean_sum", "absmax"]
    second, _, run = run_recipe(tmp_path / "a", tiny_model("qwen3_moe"), [calibrate])
    assert observed == [["absmax"]] * 2
    assert list(second[0].extra) == ["gean_sum", "absmax"]
    assert torch.equal(first[1]["gean_sum"], second[1]["gean_sum"])
    alone, _, _ = run_recipe(tmp_path / "b", tiny_model("qwen3_moe"), [calibrate])
    assert same(second, alone)
    assert len(list(run.parts.path.glob("statistic-*.json"))) == 2 * 3
    assert len(list(run.parts.path.glob("tokens-*.json"))) == 1


def test_fewer_statistics_run_nothing(checkpoint, text, context, observed, monkeypatch):
    ctx = context()
    module.statistics(options(text), checkpoint(), ctx)
    observed.clear()
    monkeypatch.setattr(module, "sweep", None)
    found = module.statistics(options(text, statistics=["absmax"]), checkpoint(), context("other"))
    assert observed == []
    assert list(found[0].extra) == ["absmax"]


def test_tensors_with_names_of_their_own_find_their_part():
    class Named:
        def __init__(self, name, tensors):
            self.name, self.tensors = name, tensors

        def result(self):
            return dict.fromkeys(self.tensors, torch.ones(1))

    made = [Named("hgh", ["hgh", "hgh_sq"]), Named("count", ["count"]), Named("hgh_max", ["hgh_max"])]
    extra = {name: torch.ones(1) for name in ("hgh", "hgh_sq", "hgh_max")}
    expected = {"hgh": ["hgh", "hgh_sq"], "count": [], "hgh_max": ["hgh_max"]}
    assert {c: list(t) for c, t in module._by_collector(made, extra).items()} == expected
    odd = [Named("sample", ["rows", "kept"]), Named("hgh", ["hgh"])]
    found = module._by_collector(odd, {"hgh": torch.ones(1), "kept": torch.ones(1), "rows": torch.ones(1)})
    assert {c: list(t) for c, t in found.items()} == {"sample": ["kept", "rows"], "hgh": ["hgh"]}


def test_redo_forgets_the_parts_too(tiny_model, text, tmp_path, observed):
    stages = [{"run": "calibrate/statistics", "with": {"dataset": str(text), **SIZE}}]
    run_recipe(tmp_path, tiny_model("qwen3_moe"), stages)
    observed.clear()
    run_plan(open_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", redo="calibrate")
    assert observed == [["count"]] * 2


@pytest.mark.parametrize(
    "change", [{"samples": 4}, {"packing": "truncate"}, {"dataset": "demo"}, {"seed": 1}, {"model": "x"}]
)
def test_other_text_another_model_or_seed_shares_nothing(change, checkpoint, text, context, observed):
    module.statistics(options(text), checkpoint(), context())
    ctx = context("other")
    ctx.seed = change.pop("seed", 0)
    ctx.input_keys["model"] = change.pop("model", ctx.input_keys["model"])
    observed.clear()
    module.statistics(options(text, **change), checkpoint(), ctx)
    assert observed == [["count", "gean_sum", "absmax", "prob_sum"]] * 2


def test_a_crash_keeps_finished_layers(checkpoint, text, context, observed, monkeypatch):
    def give_up(layer, *rest):
        if layer.index == 1:
            raise KeyboardInterrupt
        observe(layer, *rest)

    observe = module._observe
    with monkeypatch.context() as patch:
        patch.setattr(module, "_observe", give_up)
        with pytest.raises(KeyboardInterrupt):
            module.statistics(options(text), checkpoint(), context())
    observed.clear()
    found = module.statistics(options(text), checkpoint(), context())
    assert len(observed) == 1, "layer 0 was there"
    assert same(found, module.statistics(options(text), checkpoint(), context()))


def test_statistics_are_those_of_a_sweep(checkpoint, text, context):
    from moecli.engine.collectors import collectors
    from moecli.engine.sweep import sweep

    model, opt = checkpoint(), options(text)
    batches = batches_of(tokenise(str(text), model, **SIZE), 8)
    expected = {layer.index: layer.observe(collectors(opt.statistics)) for layer in sweep(model, batches)}
    found = module.statistics(opt, model, context())
    assert found[0].tokens == 48
    assert same(found, CalibrationStats(expected))
    assert found.source["dataset"] == str(text)
    assert (found.source["dtype"], found.source["model_type"]) == ("float32", "qwen3_moe")


# -- gradients


def test_gradients_are_collected_on_the_way_back_of_the_same_sweep(checkpoint, text, context, observed):
    from moecli.engine.backward import backward_sweep
    from moecli.engine.collectors import collectors

    model, opt = checkpoint(), options(text, statistics=["h2", "gh2", "gean_sum", "hgh"])
    found = module.statistics(opt, model, context())
    assert observed == [["count", "h2", "gean_sum"]] * 2 + [["gh2", "hgh"]] * 2
    swept = backward_sweep(model, batches_of(tokenise(str(text), model, **SIZE), 8))
    there = {layer.index: layer.observe(collectors(["h2", "gean_sum"])).extra for layer in swept}
    back = {layer.index: layer.observe(collectors(["gh2", "hgh"])) for layer in swept.back()}
    for layer, stats in found.items():
        assert list(stats.extra) == ["h2", "gh2", "gean_sum", "hgh"]
        expected = there[layer] | dict(back[layer].extra)
        assert all(torch.equal(stats[name], value) for name, value in expected.items())
        assert torch.equal(stats.count_E, back[layer].count_E)


def test_only_missing_gradients_are_collected(checkpoint, text, context, observed):
    module.statistics(options(text, statistics=["h2", "gh2"]), checkpoint(), context())
    observed.clear()
    module.statistics(options(text, statistics=["h2", "gh2"]), checkpoint(), context("again"))
    assert observed == []
    found = module.statistics(options(text, statistics=["h2", "gh2", "hgh2"]), checkpoint(), context("more"))
    assert observed == [["hgh2"]] * 2
    assert list(found[0].extra) == ["h2", "gh2", "hgh2"]


def test_gradients_in_float16_are_refused_before_anything_runs(checkpoint, text):
    (problem,) = options(text, statistics=["gh2"], dtype="float16").problems(checkpoint().facts)
    assert (problem.option, problem.hint) == ("dtype", "write `dtype: bfloat16`")
    assert problem.message == "the statistic `gh2` is one of gradients, which leave the range of float16"
    half = dataclasses.replace(checkpoint().facts, dtype="float16")
    (problem,) = options(text, statistics=["gh2"]).problems(half)
    assert problem.option == ""
    assert list(options(text, statistics=["gh2"], dtype="bfloat16").problems(half)) == []


# -- experts with few tokens


def test_coverage_is_always_reported(checkpoint, text, context):
    ctx = context()
    found = module.statistics(options(text), checkpoint(), ctx)
    assert ctx.records["load"] == {str(layer): s.count_E.tolist() for layer, s in found.items()}
    assert not any("fewer than" in note for note in ctx.notes)


def test_warn_notes_layers_and_experts(checkpoint, text, context):
    plain = module.statistics(options(text), checkpoint(), context())
    ctx = context("warned")
    least = int(plain[1].count_E.min()) + 1
    found = module.statistics(options(text, min_tokens_per_expert={"n": least}), checkpoint(), ctx)
    starved = [(layer, e) for layer in (0, 1) for e in range(8) if plain[layer].count_E[e] < least]
    (note,) = [note for note in ctx.notes if "fewer than" in note]
    assert note.startswith(f"{len(starved)} of 16 experts got fewer than {least} tokens: layer ")
    for layer, expert in starved[:8]:
        assert f"expert {expert} ({int(plain[layer].count_E[expert])} tokens)" in note
    assert same(found, plain)


def test_fail_stops_with_counts_and_keeps_the_parts(checkpoint, text, context, observed):
    with pytest.raises(
        StageFailed, match=r"^16 of 16 experts got fewer than 1000 tokens: layer 0: expert 0 \("
    ) as caught:
        module.statistics(
            options(text, min_tokens_per_expert={"n": 1000, "action": "fail"}), checkpoint(), context()
        )  # fmt: skip
    assert caught.value.message.endswith("; and 8 more")
    assert caught.value.hint == "raise `samples`, or write `action: top_up`"
    observed.clear()
    module.statistics(options(text), checkpoint(), context("again"))
    assert observed == []


def test_top_up_feeds_starved_experts_only(checkpoint, text, context):
    opt = options(text, statistics=["gean_sum", "absmax", "prob_sum", "y_mean"])
    model = checkpoint()
    before = module.statistics(opt, model, context())
    least = int(before[0].count_E.float().median())
    more = {"n": least, "action": "top_up", "draws": 3}
    ctx = context("fed")
    after = module.statistics(opt.model_copy(update={"min_tokens_per_expert": module.MinTokens(**more)}), model, ctx)
    draws = [
        module.statistics(opt, model, _of_draw(context(f"draw-{number}"), number, opt, model)) for number in (1, 2, 3)
    ]
    touched = 0
    for layer, old in before.items():
        expected = {name: old[name].clone() for name in ("count", "gate_sum", "gean_sum", "absmax")}
        for draw in draws:
            hungry = [e for e in range(8) if expected["count"][e] < least]
            touched += len(hungry)
            for name, value in expected.items():
                x, y = value[hungry], draw[layer][name][hungry]
                value[hungry] = torch.maximum(x, y) if name == "absmax" else x + y
        for name, value in expected.items():
            assert torch.equal(after[layer][name], value), name
        fed = [e for e in range(8) if old.count_E[e] >= least]
        for name in expected:
            assert torch.equal(after[layer][name][fed], old[name][fed])
        assert bool((after[layer].count_E >= old.count_E).all())
        assert after[layer].tokens == old.tokens
        assert torch.equal(after[layer]["prob_sum"], old["prob_sum"])
        assert torch.equal(after[layer]["y_mean"], old["y_mean"])
    assert touched > 0
    (note,) = [note for note in ctx.notes if "further samples were run" in note]
    assert "`count`, `gate_sum`, `gean_sum`, `absmax` take part" in note
    assert "`prob_sum`, `y_mean` stay those of the first draw" in note
    assert ctx.records["load"] == {str(layer): s.count_E.tolist() for layer, s in before.items()}
    for layer, experts in ctx.records["top_up"].items():
        for expert, (was, now) in experts.items():
            assert was == before[int(layer)].count_E[int(expert)] < least
            assert now == after[int(layer)].count_E[int(expert)]


def _of_draw(ctx, number, opt, model):
    """A context in which draw 0 is another draw of the same text."""
    tokens = tokenise(opt.dataset, model, samples=opt.samples, tokens_per_sample=opt.tokens_per_sample, draw=number)
    part = ctx.shared_part
    ctx.shared_part = lambda key, kind, make: tokens if key.startswith("tokens-") else part(key, kind, make)
    return ctx


def test_top_up_ends_with_the_text(checkpoint, text, context):
    ctx = context()
    floor = {"n": 100_000, "action": "top_up", "draws": 10_000}
    found = module.statistics(options(text, samples=40, min_tokens_per_expert=floor), checkpoint(), ctx)
    assert int(found[0].count_E.sum()) == 2 * _tokens_in(text), "every token, two experts each"
    assert found[0].tokens == 40 * 16
    assert "; still below: layer 0: expert 0 (" in ctx.notes[-1]


def _tokens_in(path):
    """One token a byte and EOS behind each document, whole blocks of 16."""
    rows = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return sum(len(row) + 1 for row in rows) // 16 * 16


def test_top_up_of_a_statistic_nobody_knows(text, checkpoint, monkeypatch):
    monkeypatch.setitem(module.CATALOGUE, "from_the_future", type("New", (), {"name": "from_the_future"}))
    opt = options(text, statistics=["from_the_future"], min_tokens_per_expert={"n": 1, "action": "top_up"})
    (problem,) = opt.problems(checkpoint().facts)
    assert problem.message == "`top_up` cannot be used with the statistic `from_the_future`"


# -- data sets in a recipe


def plan_of(folder, model, **given):
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps({"recipe": 1, "model": str(model), "stages": [{"run": "calibrate/statistics", "with": given}]})
    )
    return open_recipe(path).plan


def test_keys_hold_content_not_names(tiny_model, text, tmp_path):
    model, copy = tiny_model("qwen3_moe"), tmp_path / "copy.jsonl"
    copy.write_bytes(text.read_bytes())

    def key(dataset, **given):
        return plan_of(tmp_path, model, dataset=dataset, **SIZE, **given).steps[0].key

    assert key(str(text)) == key(str(copy)) == key([{"dataset": str(text)}])
    assert key(f"{text}:5*2, demo") == key([{"dataset": str(copy), "rows": 5, "weight": 2}, {"dataset": "demo"}])
    assert len({key(str(text)), key(f"{text}:5"), key(f"{text}:6"), key(f"{text}, demo")}) == 4
    before = key(f"{text}:5")
    text.write_text(text.read_text().replace("a", "b"))
    assert key(f"{text}:5") != before


def test_the_resolved_recipe_names_the_commit(tiny_model, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = tiny_model("qwen3_moe")
    unknown = plan_of(tmp_path, model, dataset="org/b", **SIZE)
    ref = tmp_path / "datasets--org--b" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text(COMMIT)
    text = plan_of(tmp_path, model, dataset="org/b[cfg], demo", **SIZE)
    fields = plan_of(tmp_path, model, dataset=[{"dataset": "org/b", "config": "cfg"}, {"dataset": "demo"}], **SIZE)
    assert f"dataset: org/b[cfg]@{COMMIT}, demo" in resolved_yaml(text.recipe, text.options)
    assert f"revision: {COMMIT}" in resolved_yaml(fields.recipe, fields.options)
    assert text.steps[0].key == fields.steps[0].key
    assert unknown.options[0].dataset == "org/b"


def test_hub_data_without_a_commit_is_not_run(checkpoint, context):
    with pytest.raises(SurroundingsError, match="the data set `org/b` is not in the hub's cache"):
        module.statistics(options("org/b"), checkpoint(), context())


def test_missing_text_is_said_before_anything_runs(text):
    options(text).ready()
    with pytest.raises(SurroundingsError, match=r"the data set `nowhere.jsonl` does not exist"):
        options(f"{text}, nowhere.jsonl").ready()
    with pytest.raises(SurroundingsError, match=r"`.*recipe.yaml` is none of .json"):
        (text.parent / "recipe.yaml").touch()
        options(text.parent / "recipe.yaml").ready()


def test_a_preset_brings_its_own_numbers():
    opt = Statistics.model_validate_json('{"packing": "super_c4"}')
    assert (opt.samples, opt.tokens_per_sample) == (256, 2048)
    assert opt.dataset == "allenai/c4[en/c4-validation.00000-of-00008.json.gz]"
    opt = Statistics.model_validate_json('{"packing": "super_c4", "samples": 2, "dataset": "a.txt"}')
    assert (opt.samples, opt.tokens_per_sample, opt.dataset) == (2, 2048, "a.txt")
    assert set(Statistics.model_fields["packing"].annotation.__args__) == set(RULES)


def test_a_preset_on_local_text(checkpoint, text, context):
    found = module.statistics(options(text, packing="gptq_c4"), checkpoint(), context())
    assert found[0].tokens == 48
    assert found.source["packing"] == "gptq_c4"
    assert found.source["digest"] == tokenise(str(text), checkpoint(), **SIZE, packing="gptq_c4").digest


def test_samples_of_each_data_set(text):
    opt = Statistics.model_validate_json(
        json.dumps({"dataset": [{"dataset": str(text), "samples": 5}, {"dataset": "demo", "samples": 2}]})
    )
    assert opt.samples == 7


@pytest.mark.parametrize(
    ("given", "option", "message"),
    [
        ({"dataset": "org/a("}, "dataset", "`org/a(` is no file and does not read as"),
        ({"dataset": []}, "dataset", "`dataset` names no data set"),
        ({"dataset": "a.txt*9, b.txt"}, "dataset", "`b.txt` gets none of 3 samples"),
        ({"dataset": [{"dataset": "a", "samples": 5}]}, "samples", "the data sets ask for 5 samples, `samples` is 3"),
        ({"dataset": [{"dataset": "a", "samples": 2}]}, "samples", "the data sets ask for 2 samples, `samples` is 3"),
        ({"dataset": "demo", "statistics": ["eansum"]}, "statistics", "unknown statistic `eansum`"),
        ({"dataset": "demo", "tokens_per_sample": 300}, "tokens_per_sample", "at most the model's 256 positions"),
    ],
)  # fmt: skip
def test_problems_are_found_before_anything_runs(given, option, message, checkpoint):
    opt = options("", **given)
    (problem,) = opt.problems(checkpoint().facts)
    assert problem.option == option
    assert message in problem.message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": [{"datset": "a.txt"}]}, "unknown option `datset`"),
        ({"dataset": "demo", "min_tokens_per_expert": {"n": 0}}, "`n` must be"),
        ({"dataset": "demo", "min_tokens_per_expert": {"n": 4, "action": "topup"}}, "`action` must be"),
        ({"dataset": "demo", "packing": "heapr"}, "`packing` must be"),
        ({}, "`calibrate/statistics` needs `dataset`"),
    ],
)
def test_wrong_values_are_told_in_the_recipe(given, message, tiny_model, tmp_path):
    with pytest.raises(RecipeError) as caught:
        plan_of(tmp_path, tiny_model("qwen3_moe"), **given)
    assert message in "\n".join(d.message for d in caught.value.diagnostics)


# -- special tokens and precision


def test_special_tokens_run_and_are_not_counted(checkpoint, text, context):
    """Against a plain loop: the whole model runs all tokens, and only the others enter the sums."""
    from moecli.families import adapter

    model = checkpoint()
    opt = options(text, tokens_per_sample=200, statistics=["ean_sum"], mask_special_tokens=True)
    ctx = context()
    found = module.statistics(opt, model, ctx)
    special = set(adapter.load_tokenizer(model).all_special_ids)
    ids, mask = found.text.ids, found.text.mask
    counted = [mask[n, t] == 1 and int(ids[n, t]) not in special for n in range(len(ids)) for t in range(ids.shape[1])]
    assert 0 < sum(counted) < int(mask.sum()), "there are special tokens in the text"
    whole, seen = adapter.load_model(model), []
    layer = adapter.decoder_layers(whole)[1][1]
    experts = adapter.moe_parts(layer).experts
    hook = experts.register_forward_hook(lambda module, args, out: seen.append(args))
    with torch.no_grad():
        whole(input_ids=ids, attention_mask=mask)
        hook.remove()
        (hidden, index, weight), count, gate = seen[0], [0] * 8, [0.0] * 8
        ean, one = [0.0] * 8, torch.ones(1, 1)
        for row, takes_part in enumerate(counted):
            for slot in range(index.shape[-1] if takes_part else 0):
                expert = int(index[row, slot])
                count[expert] += 1
                gate[expert] += float(weight[row, slot])
                ean[expert] += float(experts(hidden[row : row + 1], index[row : row + 1, slot : slot + 1], one).norm())
    assert found[1].tokens == sum(counted)
    assert found[1].count_E.tolist() == count
    assert found[1].gate_sum_E.tolist() == pytest.approx(gate, rel=1e-5)
    assert found[1]["ean_sum"].tolist() == pytest.approx(ean, rel=1e-5)
    assert found.source["mask_special_tokens"] is True
    other = module.statistics(opt.model_copy(update={"mask_special_tokens": False}), model, context("all"))
    assert other[1].tokens == int(mask.sum()), "another key: nothing is taken from the masked parts"


def test_precision_is_an_option_and_enters_the_keys(checkpoint, text, context, observed):
    from moecli.engine.collectors import collectors
    from moecli.engine.data import batches_of
    from moecli.engine.sweep import sweep

    model = checkpoint(dtype="bfloat16")
    wide = module.statistics(options(text, dtype="float32"), model, context())
    batches = batches_of(wide.text, 8)
    expected = {
        layer.index: layer.observe(collectors(["gean_sum", "absmax", "prob_sum"]))
        for layer in sweep(model, batches, dtype=torch.float32)
    }
    assert same(wide, CalibrationStats(expected))
    assert wide.source["dtype"] == "float32"
    observed.clear()
    own = module.statistics(options(text), model, context("own"))
    assert observed == [["count", "gean_sum", "absmax", "prob_sum"]] * 2, "nothing is shared"
    assert own.source["dtype"] == "bfloat16"
    assert not torch.equal(own[1]["gean_sum"], wide[1]["gean_sum"])
    observed.clear()
    module.statistics(options(text, dtype="bfloat16"), model, context("named"))
    assert observed == [], "`auto` and its name are one"


def test_text_that_ends_early_says_how_much_there_is(checkpoint, text, context):
    with pytest.raises(SurroundingsError, match=r"^asked for 900 samples of 16 tokens, the text gives \d+$") as caught:
        module.statistics(options(text, samples=900), checkpoint(), context())
    have = caught.value.message.split()[-1]
    assert caught.value.hint == f"write `samples: {have}`, or name more text"
    module.statistics(options(text, samples=int(have), statistics=[]), checkpoint(), context("fewer"))
