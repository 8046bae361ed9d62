"""lm-eval's tasks: items, groups, generated answers, backends, what stops an evaluation, and lm-eval's own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from moecli.core.errors import StageFailed, SurroundingsError, UsageError
from moecli.families import facts_of
from moecli.families.adapter import load_model, load_tokenizer, tokenizer_digest
from moecli.io.harness import read_results
from moecli.io.reader import FolderCheckpoint
from moecli.methods.eval import lm_eval as module
from moecli.methods.eval.lm_eval import GROUPS, LmEval, expanded, lm_eval, repetition, resolution
from moecli.runner.compare import Side, compare

SHARED = next(
    (p / "shared" for p in Path(__file__).resolve().parents if (p / "shared/data/lm_eval_tasks").is_dir()), None
)
ROWS = [{"q": f"w{i} w{i + 1} w{3 * i % 7}", "a": i % 2} for i in range(9)]


@pytest.fixture
def tasks(tmp_path):
    """`pets` (two choices), `talk` (generates up to 6 tokens), `words` (rolling), and a group of two."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
    choice = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\ndoc_to_choice: [w1, w2]\n"
    accuracy = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\nmetadata: {version: 1}\n"
    for name in ("pets", "local_piqa"):
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + data + choice + accuracy)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [pets, local_piqa]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    (folder / "talk.yaml").write_text(
        "task: talk\n" + data + "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: 'w1'\n"
        "generation_kwargs: {until: ['w3 '], max_gen_toks: 6, do_sample: false}\nmetadata: {version: 1}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "words.yaml").write_text(
        "task: words\n" + data + "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{q}}'\n"
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\nmetadata: {version: 1}\n"
    )
    return str(folder)


@pytest.fixture
def run(checkpoint, context, tasks):
    """`run("pets", limit=4)`: the evaluation of a toy model."""

    def call(*names, model=None, **options):
        model = checkpoint() if model is None else model
        call.context = context(f"run-{len(os.listdir(tasks))}-{os.urandom(3).hex()}")
        return lm_eval(LmEval(tasks=list(names), include=tasks, max_length=32, **options), model, call.context)

    call.model_folder = checkpoint().folder
    return call


def items(found, task):
    return next(one for one in found.items if one.task == task)


def value(found, task, metric):
    return next(m.value for m in found.metrics if (m.task, m.metric) == (task, metric))


class Poisoned:
    """A model whose logits are NaN from the `after`-th forward pass on, for the second row of the batch only."""

    def __init__(self, model, after=0):
        self.model, self.left = model, after
        model.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        self.left -= 1
        if self.left < 0 and len(output.logits) > 1:
            output.logits[1] = float("nan")


@pytest.fixture
def poisoned(monkeypatch):
    """Every model loaded from now on is poisoned."""
    monkeypatch.setattr(module, "load_model", lambda *given: Poisoned(load_model(*given)).model)


# -- items


def test_items_are_the_outcomes_of_each_document(run):
    found = run("pets", "words")
    pets = items(found, "pets")
    rows = [json.loads(line) for line in found.files["samples_pets.jsonl"].splitlines()]
    assert pets.columns["acc"].values == tuple(row["acc"] for row in rows)
    assert pets.docs == tuple(f"{row['doc_id']}:{row['doc_hash'][:16]}" for row in rows)
    assert len(rows) == len(ROWS) == len(set(pets.prompts))
    for metric, column in items(found, "words").columns.items():
        assert column.total() == pytest.approx(value(found, "words", metric), rel=1e-12)
        assert sum(column.weights) == sum(len(r["q"].split()) if "word" in metric else len(r["q"]) for r in ROWS)


def test_a_group_is_its_tasks_pooled(run):
    found = run("both")
    assert items(found, "both").members == ("pets", "local_piqa")
    row = next(r for r in compare(Side("a", {"": found}), Side("b", {"": found})).rows if r.task == "both")
    assert (row.paired.items, row.paired.lost, row.paired.gained) == (2 * len(ROWS), 0, 0)


def test_settings_hold_what_must_agree(run, checkpoint):
    settings = run("pets", limit=3, num_fewshot=0, batch_size=5).settings
    assert settings["tasks"]["pets"] == {"version": 1, "num_fewshot": 0, "generation": None, "repeats": 1}
    assert settings["tokenizer"] == tokenizer_digest(load_tokenizer(checkpoint()))
    known = {name: settings[name] for name in ("backend", "batch_size", "limit", "max_length", "dtype", "template")}
    assert known == {
        "backend": "hf", "batch_size": 5, "limit": 3, "max_length": 32, "dtype": "float32", "template": None,
    }  # fmt: skip
    assert settings["harness"] == "lm-eval 0.4.13"


def test_another_vocabulary_is_another_tokenizer_and_a_file_name_is_not(checkpoint):
    one, other = load_tokenizer(checkpoint()), load_tokenizer(checkpoint())
    one("w1 w2", padding="max_length", max_length=8, truncation=True)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    other.add_tokens(["unheard-of"])
    assert tokenizer_digest(one) != tokenizer_digest(other)


def test_models_with_another_tokenizer_are_not_compared(run, monkeypatch):
    one = run("pets")
    monkeypatch.setattr(module, "tokenizer_digest", lambda tokenizer: "another")
    with pytest.raises(UsageError, match=r"a setting differs: `tokenizer` is \w+... in A and another in B"):
        compare(Side("a", {"": one}), Side("b", {"": run("pets")}))


def test_a_limit_says_what_it_hides(run):
    run("pets", limit=4)
    assert run.context.notes == [resolution(4)]
    assert resolution(100) == (
        "with `limit` a task has 100 documents: a true difference in accuracy below 8.8 points when one answer in ten "
        "flips, 27.7 points at worst, is missed more often than one time in five"
    )


# -- groups


def test_groups_are_written_out_and_local_tasks_come_first(tasks):
    assert expanded(["quick", "pets", "arc_easy"], tasks) == ["arc_easy", "local_piqa", "winogrande", "pets"]
    assert expanded(["quick"], None) == list(GROUPS["quick"])
    resolved = LmEval(tasks=["quick"], include=tasks).resolve(())
    assert resolved.tasks == ["arc_easy", "local_piqa", "winogrande"]


def test_every_task_of_a_group_is_lm_evals_and_no_group_hides_one():
    import lm_eval.tasks

    known = module._names_in(Path(lm_eval.tasks.__file__).parent)
    assert {task for group in GROUPS.values() for task in group} <= known
    assert not set(GROUPS) & known


# -- generated answers


def test_answers_are_measured(run, checkpoint):
    found = run("talk", batch_size=4)
    talk = items(found, "talk")
    assert set(talk.columns) == {"exact_match", "answer_tokens", "repetition", "truncated"}
    rows = [json.loads(line) for line in found.files["samples_talk.jsonl"].splitlines()]
    tokenizer = load_tokenizer(checkpoint())
    lengths = [float(len(tokenizer.encode(row["resps"][0][0], add_special_tokens=False))) for row in rows]
    assert list(talk.columns["answer_tokens"].values) == lengths
    assert value(found, "talk", "truncated") == sum(talk.columns["truncated"].values) / len(ROWS)


def test_an_answer_is_truncated_unless_a_stop_or_the_end_came(run, monkeypatch):
    """Three rows of planned tokens: six w5, a stop string in the middle, the end of text in the middle."""
    plans = {}

    def generate(self, context, max_length, stop, **kwargs):
        steps = max_length - context.shape[1]
        word = self.tokenizer.encode("w5", add_special_tokens=False)[-1]
        halt = self.tokenizer.encode("w3 w3 w3", add_special_tokens=False)
        rows = [[word] * steps, [word, *halt, word, word][:steps], [word, self.eot_token_id, *[0] * steps][:steps]]
        plans["rows"] = len(context)
        return torch.cat([context, torch.tensor(rows)[: len(context)]], 1)

    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    found = run("talk", limit=3, batch_size=3)
    assert plans["rows"] == 3
    assert sorted(items(found, "talk").columns["truncated"].values) == [0.0, 0.0, 1.0]


def test_repetition_is_the_share_of_grams_seen_before():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([7] * 7) == 3 / 4
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


# -- what stops an evaluation


@pytest.mark.parametrize("task", ["pets", "words", "talk"])
def test_nan_stops_with_the_task_and_the_document(run, poisoned, task):
    with pytest.raises(StageFailed, match="the model's logits are NaN") as caught:
        run(task, batch_size=4)
    assert caught.value.where.startswith(f"task `{task}`, document ")
    assert 0 <= int(caught.value.where.rpartition(" ")[2]) < len(ROWS)


def test_missing_data_names_the_task_before_anything_runs(tasks):
    (Path(tasks) / "rows.jsonl").unlink()
    with pytest.raises(SurroundingsError, match=r"lm-eval cannot load the task `pets`: Unable to find '.*rows\.jsonl'"):
        LmEval(tasks=["pets"], include=tasks).ready()


# -- backends


def test_streamed_gives_the_numbers_of_memory(run):
    one, other = run("pets", "words"), run("pets", "words", backend="streamed")
    for task in ("pets", "words"):
        for metric, column in items(one, task).columns.items():
            assert items(other, task).columns[metric].values == pytest.approx(column.values, rel=1e-5)


def test_streamed_refuses_to_generate_before_anything_runs(tasks):
    with pytest.raises(SurroundingsError, match="`talk` generates text, which `backend: streamed` cannot"):
        LmEval(tasks=["pets", "talk"], include=tasks, backend="streamed").ready()


def test_vllm_that_is_not_installed_is_said(tasks):
    with pytest.raises(SurroundingsError, match="vLLM is not installed") as caught:
        LmEval(tasks=["pets"], include=tasks, backend="vllm").ready()
    assert caught.value.hint == "`pip install vllm`, or write `backend: memory`"


def test_vllm_gets_a_folder_and_its_answers_are_the_evaluation(run, monkeypatch):
    given = {}

    def stand_in(**arguments):
        from lm_eval.models.huggingface import HFLM

        given.update(arguments)
        return HFLM(pretrained=arguments["pretrained"], dtype=arguments["dtype"], batch_size=arguments["batch_size"],
                    max_length=arguments["max_model_len"], device="cpu")  # fmt: skip

    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", types.SimpleNamespace(VLLM=stand_in))
    found = run("pets", backend="vllm", batch_size=4)
    assert (Path(given["pretrained"]), given["dtype"], given["max_model_len"]) == (run.model_folder, "float32", 32)
    assert found.settings["backend"] == "vllm"
    assert items(found, "pets").columns["acc"].values == items(run("pets"), "pets").columns["acc"].values


def test_vllm_is_refused_for_what_it_cannot_load(checkpoint):
    from dataclasses import replace

    facts = checkpoint().facts
    opt = LmEval(tasks=["x"], backend="vllm")
    assert [p.option for p in opt.problems(replace(facts, router_rows=facts.experts * 2))] == ["backend"]
    assert list(opt.problems(facts)) == []


# -- lm-eval's own command


def theirs(folder, model, include, names, *more):
    """What lm-eval's own command writes, in a process of its own."""
    argv = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", ",".join(names), "--include_path", str(include),
        "--model_args", f"pretrained={model},dtype=float32,max_length={more[0]}", "--batch_size", "8",
        "--device", "cpu", "--output_path", str(folder), "--log_samples", "--seed", "0", "--limit", str(more[1]),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | offline, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return read_results(folder)


def assert_same(ours, other, names):
    """Every number and every document to the last digit, and settings that `moecli compare` takes for the same."""
    assert {(m.task, m.metric): (m.value, m.samples) for m in ours.metrics} == {
        (m.task, m.metric): (m.value, m.samples) for m in other.metrics
    }
    for task in names:
        assert items(ours, task) == items(other, task)
    found = compare(Side("ours", {"": ours}), Side("theirs", {"": other}))
    assert {row.delta for row in found.rows} == {0.0}
    assert all(note.startswith("could not be checked, as B") or "`torch`" in note for note in found.notes)


def test_the_same_numbers_as_lm_evals_own_command(run, tasks, tmp_path):
    out = tmp_path / "theirs"
    out.mkdir()
    other = theirs(out, run.model_folder, tasks, ["pets", "words"], 32, 6)
    ours = run("pets", "words", limit=6, dtype="float32", batch_size=8)
    assert_same(ours, other, ["pets", "words"])


@pytest.mark.slow
@pytest.mark.skipif(SHARED is None, reason="the shared evaluation data is not beside the repository")
def test_the_same_numbers_on_real_tasks(context, tmp_path):
    names = ["local_copa", "local_arc_easy", "local_wikitext"]
    folder, include = SHARED / "models/small-qwen3-moe", SHARED / "data/lm_eval_tasks"
    other = theirs(tmp_path, folder, include, names, 512, 4)
    opt = LmEval(tasks=names, include=str(include), max_length=512, limit=4, dtype="float32", batch_size=8)
    assert_same(lm_eval(opt, FolderCheckpoint(folder, facts_of), context()), other, names)


# -- reading lm-eval's files


def test_samples_that_are_not_there_are_named(run, tmp_path):
    (tmp_path / "r").mkdir()
    found = run("pets")
    (tmp_path / "r/results_2026.json").write_text(found.files["results.json"])
    with pytest.raises(SurroundingsError, match=r"results_2026.json` has no samples of `pets` beside it"):
        read_results(tmp_path / "r")
    (tmp_path / "r/samples_pets_2026.jsonl").write_text(found.files["samples_pets.jsonl"][:-20])
    with pytest.raises(SurroundingsError, match=r"samples_pets_2026.jsonl` is damaged: line 9 is not JSON"):
        read_results(tmp_path / "r")
    (tmp_path / "r/samples_pets_2026.jsonl").write_text(found.files["samples_pets.jsonl"])
    assert read_results(tmp_path / "r").items == found.items
    (tmp_path / "r/results_2027.json").write_text("{}")
    with pytest.raises(UsageError, match="has 2 results files") as caught:
        read_results(tmp_path / "r")
    assert caught.value.hint.endswith("results_2027.json`")
    with pytest.raises(SurroundingsError, match="is not a results file of lm-eval"):
        read_results(tmp_path / "r/results_2027.json")
