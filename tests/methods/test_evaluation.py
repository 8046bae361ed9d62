"""Our perplexities against lm-eval and against a plain loop; lm-eval's table as metrics."""

import json
import math

import pytest
import torch

from moecli.core.errors import SurroundingsError
from moecli.families.adapter import load_model, load_tokenizer
from moecli.io.harness import metrics
from moecli.methods.eval.lm_eval import LmEval, lm_eval
from moecli.methods.eval.perplexity import Perplexity, perplexity

TEXTS = [" ".join(f"w{i * j % 37}" for j in range(2, 40)) for i in (3, 5, 7)] + ["short one"]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def value(evaluation, metric):
    return next(m.value for m in evaluation.metrics if m.metric == metric)


def test_rolling_numbers_are_lm_evals_to_the_last_digits(checkpoint, context, texts, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "roll.yaml").write_text(
        f"task: roll\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {texts}}}}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\nmetadata: {version: 1}\n"
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n"
    )
    model = checkpoint()
    theirs = lm_eval(LmEval(tasks=["roll"], include=str(tmp_path / "tasks"), max_length=32), model, context("a"))
    ours = perplexity(Perplexity(dataset=str(texts), window=32, batch_size=3), model, context("b"))
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert value(ours, f"{name} (rolling)") == pytest.approx(value(theirs, name), rel=1e-6)


def test_windowed_perplexity_is_a_loop_over_blocks(checkpoint, context, texts):
    model = checkpoint()
    ours = perplexity(Perplexity(dataset=str(texts), window=32), model, context())
    ids = load_tokenizer(model).encode("\n\n".join(TEXTS), add_special_tokens=False)
    network, total, count = load_model(model), 0.0, 0
    for start in range(0, len(ids) // 32 * 32, 32):
        block = torch.tensor([ids[start : start + 32]])
        with torch.no_grad():
            logits = network(block).logits[0].double().log_softmax(-1)
        total -= sum(logits[i, block[0, i + 1]].item() for i in range(31))
        count += 31
    assert value(ours, "perplexity (windowed 32)") == pytest.approx(math.exp(total / count), rel=1e-5)


def test_lm_evals_table_becomes_metrics():
    results = {
        "results": {
            "b": {"alias": "b", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
            "a": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "sample_len": 8},
        },
        "n-samples": {"a": {"original": 9, "effective": 8}, "b": {"original": 9, "effective": 4}},
        "higher_is_better": {"a": {"exact_match": True}, "b": {"acc": True}},
    }
    found = [(m.task, m.metric, m.value, m.stderr, m.samples) for m in metrics(results)]
    assert found == [("a", "exact_match (strict)", 0.25, None, 8), ("b", "acc", 0.5, 0.1, 4)]


def test_an_unknown_task_is_said_before_the_model_is_loaded(checkpoint, context, tmp_path, monkeypatch):
    monkeypatch.setattr("moecli.methods.eval.lm_eval.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(SurroundingsError, match="lm-eval knows no task `no_such_task`"):
        lm_eval(LmEval(tasks=["no_such_task"], include=str(tmp_path)), checkpoint(), context())
