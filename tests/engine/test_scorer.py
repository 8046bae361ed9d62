"""The streamed scorer against the whole model, and against lm-eval's own HFLM on six families."""

from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from moecli.core.errors import StageFailed
from moecli.engine import scorer
from moecli.engine.scorer import Sequences, Window, score
from moecli.engine.streamed import StreamedLM
from moecli.families import facts_of
from moecli.families.adapter import load_model, load_tokenizer
from moecli.io.reader import FolderCheckpoint
from tests import tiny

SIX = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "gpt_oss", "phimoe")

PAIRS = [
    ("The cat sat on", " the mat"), ("The cat sat on", " a log"), ("The cat sat on the", " x"),
    ("The cat sat on the", " y"), ("", "No context here"), ("Trailing spaces  ", "moved"),
    ("a" * 60, "cut from the left"), ("b", "c"), ("The cat sat on", " the mat"),
]  # fmt: skip
DOCUMENTS = ["short", "exactly thirty-one characters!!", "A longer text that needs several windows. " * 4, "a"]


def requests(rows):
    return [SimpleNamespace(args=row, task_name="t", doc_id=i, doc={}) for i, row in enumerate(rows)]


def opened(folder):
    return FolderCheckpoint(folder, facts_of)


@pytest.fixture
def both(tiny_model):
    def make(model_type, batch_size=3, **options):
        checkpoint = opened(tiny_model(model_type, **options))
        settings = {"batch_size": batch_size, "max_length": 32}
        hflm = HFLM(pretrained=load_model(checkpoint), tokenizer=load_tokenizer(checkpoint), device="cpu", **settings)
        return hflm, StreamedLM(checkpoint, load_tokenizer(checkpoint), dtype=torch.float32, **settings)

    return make


@pytest.mark.parametrize("model_type", SIX)
def test_answers_are_hflms(both, model_type):
    theirs, ours = both(model_type)
    assert ours.loglikelihood(requests(PAIRS)) == theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)


@pytest.mark.parametrize("model_type", SIX)
def test_rolling_answers_are_hflms(both, model_type):
    theirs, ours = both(model_type)
    rows = [(text,) for text in DOCUMENTS]
    assert ours.loglikelihood_rolling(requests(rows)) == pytest.approx(
        theirs.loglikelihood_rolling(requests(rows), disable_tqdm=True), rel=1e-6
    )


def test_a_greedy_continuation_is_told_from_another(both):
    _, ours = both("qwen3_moe")
    network, start = load_model(ours.checkpoint), ours.tok_encode("The cat")
    with torch.no_grad():
        logits = network(torch.tensor([start])).logits[0, -1]
    best, worst = (int(logits.argsort()[i]) for i in (-1, 0))
    found = score(ours.checkpoint, [Window(start, [best]), Window(start, [worst])], batch_size=2)
    assert [answer.greedy for answer in found] == [True, False]
    assert float(found[0].logprob_T) == pytest.approx(float(logits.log_softmax(-1)[best]), abs=1e-6)


def test_windows_are_scored_by_hand(both):
    """Oracle: one sequence at a time through the whole model, in float64 after the logits."""
    _, ours = both("qwen3_moe")
    rng = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 100, (n,), generator=rng).tolist() for n in (5, 17, 2, 17, 9)]
    windows = [Window(some[:-1], some[1:][-k:]) for some, k in zip(ids, (2, 16, 1, 3, 8), strict=True)]
    windows.append(Window(windows[1].inputs, windows[1].targets[-2:]))  # same inputs, split elsewhere
    network = load_model(ours.checkpoint)
    for window, answer in zip(windows, score(ours.checkpoint, windows, batch_size=2, vocab=100), strict=True):
        with torch.no_grad():
            rows = network(torch.tensor([window.inputs])).logits[0, -len(window.targets) :, :100].double()
        wanted = rows.log_softmax(-1)[torch.arange(len(rows)), torch.tensor(window.targets)]
        assert answer.logprob_T.tolist() == pytest.approx(wanted.tolist(), abs=2e-5)


def test_the_head_sees_scored_rows_only_and_few_at_a_time(both, monkeypatch):
    _, ours = both("qwen3_moe")
    asked = requests([("The cat sat on the mat and", " looked at me"), ("a", "b"), ("Some other", " words")])
    whole = ours.loglikelihood(asked)
    seen = []
    monkeypatch.setattr(scorer, "HEAD_ROWS", 4)
    stock = scorer.Sweep._logits_of
    monkeypatch.setattr(scorer.Sweep, "_logits_of", lambda self, rows: seen.append(len(rows)) or stock(self, rows))
    cut = ours.loglikelihood(asked)
    assert [total for total, _ in cut] == pytest.approx([total for total, _ in whole], rel=1e-6)
    assert max(seen) <= 4
    assert sum(seen) == len(" looked at me") + len("b") + len(" words")


def test_a_call_reads_each_layer_once(both, monkeypatch):
    from moecli.engine.loader import Loader

    _, ours = both("qwen3_moe", batch_size=2)
    loaded, stock = [], Loader.load
    monkeypatch.setattr(Loader, "load", lambda self, index: loaded.append(index) or stock(self, index))
    ours.loglikelihood(requests(PAIRS))
    assert loaded == [0, 1]


def test_equal_inputs_share_a_sequence():
    found = Sequences.of([Window([1, 2], [3]), Window([5, 6, 7], [8]), Window([1, 2], [2, 9])])
    assert (found.inputs, found.windows, found.scored) == ([(5, 6, 7), (1, 2)], [[1], [0, 2]], [1, 2])
    batch = found.batches(4)[0]
    assert batch.input_ids.tolist() == [[5, 6, 7], [1, 2, 0]]
    assert batch.attention_mask.all()
    with pytest.raises(ValueError, match="window 0 has 1 inputs and 2 targets"):
        Sequences.of([Window([1], [2, 3])])


def test_a_tokenizer_that_adds_bos_is_treated_as_hflm_does(both, tmp_path):
    from tokenizers.processors import TemplateProcessing

    theirs, ours = both("qwen3_moe")
    tokenizer = tiny.make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    theirs.tokenizer = ours.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.tok_encode("a")[0] == 1
    pairs = [*PAIRS, ("<bos>a", "b")]
    found, wanted = ours.loglikelihood(requests(pairs)), theirs.loglikelihood(requests(pairs), disable_tqdm=True)
    # one last bit: products of other shapes may add up in another order, on some processors
    assert [score for score, _ in found] == pytest.approx([score for score, _ in wanted], rel=1e-6)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    rows = [(text,) for text in DOCUMENTS]
    assert ours.loglikelihood_rolling(requests(rows)) == pytest.approx(
        theirs.loglikelihood_rolling(requests(rows), disable_tqdm=True), rel=1e-6
    )


def test_bfloat16_is_rounded_as_hflm_rounds(both):
    theirs, ours = both("qwen3_moe", dtype="bfloat16")
    ours._dtype = torch.bfloat16
    assert ours.loglikelihood(requests(PAIRS)) == theirs.loglikelihood(requests(PAIRS), disable_tqdm=True)


def test_lm_eval_runs_it(both, tmp_path):
    """Through `simple_evaluate`: the same table as HFLM's."""
    import json

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"Number {i} is", "choices": [" odd", " even"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(
        f"task: choice\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{answer}}'\n"
        "doc_to_choice: '{{choices}}'\nmetadata: {version: 1}\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = TaskManager(include_path=[str(tmp_path)], include_defaults=False)
    found = [simple_evaluate(model=lm, tasks=["choice"], task_manager=tasks, limit=6) for lm in both("qwen3_moe")]
    assert found[0]["results"] == found[1]["results"]
    answers = [[sample["filtered_resps"] for sample in result["samples"]["choice"]] for result in found]
    assert answers[0] == answers[1]


def broken(folder, tmp_path):
    """The model with one weight that is no number."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    return opened(tmp_path / "nan")


def test_nan_is_said_with_its_document(tiny_model, tmp_path):
    checkpoint = broken(tiny_model("qwen3_moe"), tmp_path)
    ours = StreamedLM(checkpoint, load_tokenizer(checkpoint), batch_size=2, max_length=32)
    with pytest.raises(StageFailed, match="logits are NaN for a text that begins `The cat sat on`") as caught:
        ours.loglikelihood(requests(PAIRS))
    assert caught.value.where == "task t, document 0"
    with pytest.raises(StageFailed, match="begins `short`"):
        ours.loglikelihood_rolling(requests([("short",)]))


def test_generation_is_refused(both):
    with pytest.raises(StageFailed, match=r"it does not generate any \(`t`\)") as caught:
        both("qwen3_moe")[1].generate_until(requests([("a", {})]))
    assert caught.value.hint == "leave out tasks that generate, or write `backend: memory`"


def test_a_continuation_longer_than_the_window_is_refused(both):
    with pytest.raises(StageFailed, match=r"2 tokens of context and 33 to score; `max_length` is 32"):
        both("qwen3_moe")[1].loglikelihood(requests([("ab", "c" * 33)]))
