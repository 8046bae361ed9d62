"""eval/fidelity against both whole models with plain hooks and loops over tokens."""

import json
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from moecli.core.artifacts import Evaluation, ExpertPlan, LayerPlan
from moecli.core.errors import StageFailed
from moecli.families import alias_config, facts_of, family_of
from moecli.families.adapter import decoder_layers, load_model, load_tokenizer, moe_parts
from moecli.io.reader import FolderCheckpoint
from moecli.methods.eval.fidelity import Fidelity, fidelity, row_map
from moecli.ops.scoring import rolling_windows

TEXTS = ["A first document about cats, long enough for two windows.", "Second!", "x"]
LENGTH = 24


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def pruned(checkpoint, context):
    """`pruned(model_type, kept)`: a toy model with these experts and their router rows left."""

    def make(model_type, kept):
        model, ctx = checkpoint(model_type), context(f"prune-{model_type}")
        family = family_of(model.config)

        def write(part, layer):
            family.keep_experts(part, model, layer, kept)
            family.keep_router_rows(part, model, layer, kept)

        with ctx.writer(model, config=family.shrink_config(model.config, len(kept))) as out:
            for layer in model.facts.moe_layers:
                out.part(f"layer-{layer}", lambda part, layer=layer: write(part, layer))
        return model, ctx.finish(model)

    return make


GROUPS = [0, 1, 0, 2, 1, 3, 2, 0]
LEADS = [0, 1, 3, 5]


def plan_of(model):
    layer = LayerPlan(torch.tensor(GROUPS), torch.tensor([1 / GROUPS.count(g) for g in GROUPS]), torch.tensor(LEADS))
    return ExpertPlan(dict.fromkeys(model.facts.moe_layers, layer))


@pytest.fixture
def merged(checkpoint, context):
    """A toy model whose groups are replaced by their leads behind an alias map."""

    def make(model_type="qwen3_moe"):
        model, ctx = checkpoint(model_type), context("merge")
        family = family_of(model.config)

        def write(part, layer):
            family.write_experts(part, model, layer, [family.read_expert(model, layer, lead) for lead in LEADS])
            part.put(family.alias_name(layer), torch.tensor(GROUPS))

        with ctx.writer(model, config=alias_config(model.config, dict.fromkeys(model.facts.moe_layers, 4))) as out:
            for layer in model.facts.moe_layers:
                out.part(f"layer-{layer}", lambda part, layer=layer: write(part, layer))
        return model, ctx.finish(model)

    return make


# --- the oracle -----------------------------------------------------------------------------------


def traced(network, ids, inputs=None):
    """One sequence: logits, and of each layer its input, output, block output, chosen rows, weights and logits.

    With `inputs` layer i is fed inputs[i] in place of what the layer before made.
    """
    layers, hooks = decoder_layers(network)[1], []
    seen = [SimpleNamespace(block=None, rows=None) for _ in layers]

    def feed(i):
        def hook(module, args, kwargs):
            if inputs is not None:
                args = (inputs[i], *args[1:])
            seen[i].input = args[0]
            return args, kwargs

        return hook

    def note(i, name, pick=lambda out: out):
        def hook(module, args, out):
            setattr(seen[i], name, pick(out))

        return hook

    def choose(i):
        def hook(module, args):
            seen[i].hidden, seen[i].rows, seen[i].weights = args[0].flatten(0, -2).double(), args[1], args[2]

        return hook

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(feed(i), with_kwargs=True))
        hooks.append(layer.register_forward_hook(note(i, "output", first)))
        if parts := moe_parts(layer):
            hooks.append(parts.block.register_forward_hook(note(i, "block", first)))
            hooks.append(parts.experts.register_forward_pre_hook(choose(i)))
    with torch.no_grad():
        logits = network(torch.tensor([ids]), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, seen


class Oracle:
    """All numbers of a pair, from sequences one at a time through whole models."""

    def __init__(self, source, model, source_of_row, home, stored_of_row):
        self.tokens, self.sums, self.kl, self.layers = 0, {}, [], {}
        tokenizer = load_tokenizer(source)
        self.family = family_of(source.config)
        self.maps = source_of_row, home, stored_of_row
        self.routers = {  # layer -> weights of both routers, for the logits
            layer: [self._router(c, layer) for c in (source, model)] for layer in source.facts.moe_layers
        }
        networks = load_model(source), load_model(model)
        for text in TEXTS:
            for inputs, targets in rolling_windows(tokenizer.encode(text), 1, LENGTH):
                before, wanted = traced(networks[0], inputs)
                after, found = traced(networks[1], inputs)
                _, original = traced(networks[1], inputs, [layer.input for layer in wanted])
                self._text(before, after, targets)
                for i, three in enumerate(zip(wanted, original, found, strict=True)):
                    self._layer(i, len(targets), *three)

    def _router(self, checkpoint, layer):
        weight = self.family.router_role(checkpoint, layer, "weight")
        bias = self.family.router_role(checkpoint, layer, "bias")
        return checkpoint.get(weight).double(), None if bias is None else checkpoint.get(bias).double()

    def _text(self, before, after, targets):
        p, q = (logits[-len(targets) :].double().log_softmax(-1) for logits in (before, after))
        for i, target in enumerate(targets):
            self.kl.append(float((p[i].exp() * (p[i] - q[i])).sum()))
            same = p[i].argmax() == q[i].argmax()
            for name, value in (("before", -p[i, target]), ("after", -q[i, target]), ("same", same)):
                self.sums[name] = self.sums.get(name, 0.0) + float(value)
            self.tokens += 1

    def _layer(self, index, count, wanted, original, propagated):
        record = self.layers.setdefault(index, {"original": {}, "propagated": {}})
        for name, found in (("original", original), ("propagated", propagated)):
            to = record[name]
            for part in ("output", "block"):
                if (mine := getattr(wanted, part)) is not None:
                    mine, theirs = (x.reshape(-1, x.shape[-1])[-count:].double() for x in (mine, getattr(found, part)))
                    for key, value in ((f"{part}_off", (theirs - mine) ** 2), (f"{part}_all", mine**2)):
                        to[key] = to.get(key, 0.0) + float(value.sum())
            if wanted.rows is not None:
                self._drift(index, to, count, wanted, found)

    def _drift(self, index, to, count, wanted, found):
        source_of_row, home, stored_of_row = self.maps
        rows = len(wanted.rows)
        routers = self.routers[index]
        p = self._logits(routers[0], wanted)[:, source_of_row].log_softmax(-1)
        q = self._logits(routers[1], found).log_softmax(-1)
        for t in range(rows - count, rows):
            a, b = wanted.rows[t].tolist(), found.rows[t].tolist()
            wa, wb = wanted.weights[t].tolist(), found.weights[t].tolist()
            A, B = set(a), {source_of_row[r] for r in b}
            homes = {home[e] for e in a if home[e] >= 0}
            stored = {stored_of_row[r] for r in b}
            values = {
                "top1": float(a[wa.index(max(wa))] == source_of_row[b[wb.index(max(wb))]]),
                "jaccard": len(A & B) / len(A | B),
                "kept_weight": sum(w for e, w in zip(a, wa, strict=True) if e in source_of_row) / sum(wa),
                "home_weight": sum(w for e, w in zip(a, wa, strict=True) if home[e] >= 0) / sum(wa),
                "router_kl": float((p[t].exp() * (p[t] - q[t])).sum()),
                "tokens": 1.0,
            }
            if homes:
                values |= {"home_jaccard": len(homes & stored) / len(homes | stored), "home_tokens": 1.0}
            for key, value in values.items():
                to[key] = to.get(key, 0.0) + value

    @staticmethod
    def _logits(router, layer):
        weight, bias = router
        return layer.hidden @ weight.T + (0 if bias is None else bias)

    def metric(self, name):
        return {
            "kl": sum(self.kl) / self.tokens,
            "kl percentile 50": statistics.median(self.kl),
            "kl largest": max(self.kl),
            "top1_agreement": self.sums["same"] / self.tokens,
            "token_perplexity": math.exp(self.sums["after"] / self.tokens),
            "bits_per_byte": self.sums["after"] / math.log(2) / sum(len(t.encode()) for t in TEXTS),
        }[name]


def check(pair, texts, ctx, maps, plan=None):
    source, model = pair
    found = fidelity(Fidelity(dataset=str(texts), window=LENGTH, batch_size=2), model, source, plan, ctx)
    oracle = Oracle(source, model, *maps)
    by_name = {m.metric: m.value for m in found.metrics}
    for name in ("kl", "kl percentile 50", "kl largest", "top1_agreement", "token_perplexity", "bits_per_byte"):
        assert by_name[name] == pytest.approx(oracle.metric(name), rel=1e-4, abs=1e-6), name
    assert {m.metric for m in found.source.metrics} == {"token_perplexity", "bits_per_byte"}
    assert found.source.metrics[0].value == pytest.approx(math.exp(oracle.sums["before"] / oracle.tokens), rel=1e-5)
    for key, record in ctx.records["fidelity"].items():
        for inputs in ("original", "propagated"):
            wanted = oracle.layers[int(key)][inputs]
            for part in ("output", "block"):
                if f"{part}_all" in wanted:
                    value = math.sqrt(wanted[f"{part}_off"] / wanted[f"{part}_all"])
                    assert record[f"{part}_error"][inputs] == pytest.approx(value, rel=1e-3, abs=1e-5), (key, part)
            if "tokens" in wanted:
                for name in ("top1", "jaccard", "kept_weight", "home_weight", "router_kl"):
                    value = wanted[name] / wanted["tokens"]
                    assert record["routing"][inputs][name] == pytest.approx(value, abs=1e-5), (key, name, inputs)
                value = wanted["home_jaccard"] / wanted["home_tokens"]
                assert record["routing"][inputs]["jaccard_home"] == pytest.approx(value, abs=1e-9)
    assert Evaluation.unpack(found.pack()) == found
    return found, ctx.records["fidelity"]


KEPT = [1, 2, 4, 7]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe", "granitemoe"])
def test_a_pruned_model(pruned, texts, context, model_type):
    kept = [0, 2, 5, 7] if model_type == "deepseek_v3" else KEPT  # two groups, two of each
    home = [kept.index(e) if e in kept else -1 for e in range(8)]
    _, record = check(pruned(model_type, kept), texts, context(), (kept, home, list(range(4))))
    first = record[min(record, key=int)] if model_type != "deepseek_v3" else record["1"]
    if model_type != "deepseek_v3":  # its dense first layer is layer 0
        assert first["routing"]["original"]["router_kl"] == pytest.approx(0, abs=1e-9)
        assert first["routing"]["original"] == pytest.approx(first["routing"]["propagated"], abs=1e-9)
    last = record[max(record, key=int)]
    assert last["routing"]["original"]["router_kl"] == pytest.approx(0, abs=1e-9), "rows were copied"
    assert last["routing"]["propagated"]["router_kl"] > 1e-4


def test_an_alias_model(merged, texts, context):
    everyone = list(range(8))
    _, record = check(merged(), texts, context(), (everyone, GROUPS, GROUPS))
    first = record["0"]
    assert first["routing"]["original"] == pytest.approx(
        {"top1": 1, "jaccard": 1, "jaccard_home": 1, "kept_weight": 1, "home_weight": 1, "router_kl": 0}, abs=1e-9
    )
    assert first["block_error"]["original"] > 0.1


@pytest.mark.parametrize("with_plan", [True, False])
def test_a_merged_model_with_the_rows_of_its_leads(pruned, texts, context, with_plan):
    """Row-drop: rows tell the leads; where the other members went only the plan knows."""
    pair = pruned("qwen3_moe", LEADS)
    home = GROUPS if with_plan else [LEADS.index(e) if e in LEADS else -1 for e in range(8)]
    _, record = check(pair, texts, context(), (LEADS, home, list(range(4))), plan_of(pair[0]) if with_plan else None)
    homes = record["0"]["routing"]["original"]["home_weight"]
    assert homes == 1 if with_plan else homes == record["0"]["routing"]["original"]["kept_weight"] < 1


def test_a_model_is_faithful_to_itself(checkpoint, texts, context):
    model, ctx = checkpoint("mixtral"), context()
    found = fidelity(Fidelity(dataset=str(texts), window=LENGTH), model, model, None, ctx)
    by_name = {m.metric: m.value for m in found.metrics}
    assert (by_name["kl"], by_name["kl largest"], by_name["top1_agreement"]) == (0, 0, 1)
    assert [m.value for m in found.source.metrics] == [by_name["token_perplexity"], by_name["bits_per_byte"]]
    for layer in ctx.records["fidelity"].values():
        assert layer["output_error"] == layer["block_error"] == {"original": 0, "propagated": 0}
        assert layer["routing"]["propagated"] == {
            "top1": 1, "jaccard": 1, "jaccard_home": 1, "kept_weight": 1, "home_weight": 1, "router_kl": 0,
        }  # fmt: skip


def test_a_router_without_known_rows_has_no_drift(pruned, texts, context, monkeypatch):
    """Refitted rows are nobody's copy; with the plan they are their groups'."""
    source, model = pruned("qwen3_moe", LEADS)
    name = family_of(model.config).router_role(model, 0, "weight")
    stock = model.get
    monkeypatch.setattr(model, "get", lambda n, *device: stock(n, *device) * (1.5 if n == name else 1))
    assert row_map(source, model, 0) is None
    assert row_map(source, model, 1).source_R.tolist() == LEADS
    assert row_map(source, model, 0, plan_of(source)[0]).home_E.tolist() == GROUPS
    ctx = context()
    fidelity(Fidelity(dataset=str(texts), window=LENGTH), model, source, None, ctx)
    assert "routing" not in ctx.records["fidelity"]["0"] and "routing" in ctx.records["fidelity"]["1"]
    assert any("routing drift is not defined in layers 0:" in note for note in ctx.notes)


def test_batches_change_nothing(pruned, texts, context):
    source, model = pruned("qwen3_moe", KEPT)
    found, records = [], []
    for size in (1, 3):
        ctx = context(f"batch-{size}")
        found.append(fidelity(Fidelity(dataset=str(texts), window=LENGTH, batch_size=size), model, source, None, ctx))
        records.append(ctx.records["fidelity"])
    for one, other in zip(*(evaluation.metrics for evaluation in found), strict=True):
        assert (one.metric, one.value) == (other.metric, pytest.approx(other.value, rel=1e-4, abs=1e-6))
    for layer in records[0]:
        for inputs, drift in records[0][layer]["routing"].items():
            assert drift == pytest.approx(records[1][layer]["routing"][inputs], abs=1e-5)


def test_running_out_of_memory_halves_the_batches_of_both(pruned, texts, context, monkeypatch):
    from moecli.engine import sweep

    source, model = pruned("qwen3_moe", KEPT)
    wanted = fidelity(Fidelity(dataset=str(texts), window=LENGTH), model, source, None, context("whole"))
    stock, failed = sweep.SweptLayer._forward, []

    def forward(self, index, hidden=None):
        if self.index == 1 and self._flow.sequences > 1:
            failed.append(self._flow.sequences)
            raise torch.OutOfMemoryError("planted")
        return stock(self, index, hidden)

    monkeypatch.setattr(sweep.SweptLayer, "_forward", forward)
    ctx = context("halved")
    found = fidelity(Fidelity(dataset=str(texts), window=LENGTH, batch_size=4), model, source, None, ctx)
    assert failed == [4, 2]
    assert [m.value for m in found.metrics] == pytest.approx([m.value for m in wanted.metrics], rel=1e-4, abs=1e-6)
    assert any("layer 1 ran out of memory" in note for note in ctx.notes)


# --- saying no ------------------------------------------------------------------------------------


def copied(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model.folder, folder)
    return folder


def refusal(source, model, texts, context):
    with pytest.raises(StageFailed) as caught:
        fidelity(Fidelity(dataset=str(texts), window=LENGTH), model, source, None, context())
    return caught.value.message


def test_another_vocabulary_is_refused(checkpoint, texts, context, tmp_path):
    model = checkpoint()
    folder = copied(model, tmp_path)
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    vocab = value["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(value))
    said = refusal(model, FolderCheckpoint(folder, facts_of), texts, context)
    assert said == "the tokenizers differ: `A` is token 36 in the source, token 37 here"


def test_other_tokens_of_the_same_vocabulary_are_refused(checkpoint, texts, context, tmp_path):
    model = checkpoint()
    folder = copied(model, tmp_path)
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    value["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(value))
    said = refusal(model, FolderCheckpoint(folder, facts_of), texts, context)
    assert said == "the tokenizers differ: they make other tokens of document 0"


def test_models_of_other_widths_are_refused(checkpoint, texts, context):
    said = refusal(checkpoint(), checkpoint("qwen3_moe", layers=3), texts, context)
    assert said == "the models differ in `layers`: 2 and 3; they cannot be compared"


def test_nan_names_the_model_and_the_document(checkpoint, texts, context, tmp_path):
    from safetensors.torch import load_file, save_file

    model = checkpoint()
    folder = copied(model, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][load_tokenizer(model).encode("!")[0]] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    bad = FolderCheckpoint(folder, facts_of)
    path = texts.parent / "last.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["fine", "well", "so! it goes"]))
    said = "logits are NaN in document 2, which begins `so! it goes`"
    assert refusal(model, bad, path, context) == f"the model's {said}"
    assert refusal(bad, model, path, context) == f"the source's {said}"


def test_a_recipe_compares_with_its_own_source(tiny_model, texts, tmp_path):
    """Through the runner: wiring, records and both sides of the table."""
    from moecli.runner.execute import run
    from moecli.runner.open import open_recipe
    from moecli.runner.plan import SOURCE

    recipe = {"recipe": 1, "model": str(tiny_model("qwen3_moe")), "stages": [
        {"run": "calibrate/statistics", "with": {"dataset": str(texts), "samples": 1, "tokens_per_sample": 32}},
        {"run": "prune/frequency", "with": {"keep": 4}},
        {"run": "eval/fidelity", "with": {"dataset": str(texts), "window": LENGTH}},
    ]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    opened = open_recipe(tmp_path / "recipe.yaml")
    assert opened.plan.steps[-1].inputs == {"model": 1, "source": SOURCE}
    report = run(opened, tmp_path / "run").report
    rows = {row.metric: row for row in report.metrics}
    assert rows["kl"].before is None and rows["kl"].after > 0
    assert rows["bits_per_byte"].before != rows["bits_per_byte"].after
    assert rows["bits_per_byte"].paired is not None
    charts = {chart.title: chart for chart in report.figures_data.charts}
    assert set(charts) == {"Distance from the source by layer", "Routing drift by layer"}
    for chart in charts.values():
        assert [line.name for line in chart.series] == ["on the source's inputs", "on its own inputs"]
        assert chart.series[0].x == (0, 1)
        assert chart.series[0].y[0] == pytest.approx(chart.series[1].y[0]), "nothing changed before the first layer"
    shutil.rmtree(tmp_path / "run")
