"""Write the demo's lm-eval tasks and calibration text from seeds that training never uses.

    python -m scripts.demo.make_tasks --out moecli/demo/tasks

The questions come from harder scenes than the training text, in quotas by kind, so that the model
is good at each task without being perfect.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from scripts.demo.corpus import DOMAINS, documents, exercises, stream
from scripts.demo.scenes import Exercise

QUOTAS = {
    "almanac": {"known": 120, "sea-known": 30, "rare": 50},
    "arithmetic": {"mod": 60, "sub3": 30, "times2": 30, "products": 40, "add4": 20, "three": 20},
    "dialogues": {"count": 60, "total": 70, "day": 10, "hour": 30, "spot": 15, "price": 15},
    "programs": {
        "assign": 80,
        "branch": 30,
        "loop": 20,
        "max2": 30,
        "find": 10,
        "second": 15,
        "sorted": 15,
    },
    "stories": {"finder": 90, "holder": 50, "carried": 30, "place": 10, "home": 20},
    "tables": {
        "cell": 40,
        "row": 20,
        "over": 30,
        "ranked": 40,
        "most": 30,
        "least": 15,
        "plus": 15,
        "shelf": 10,
    },
}
PERPLEXITY_PER_DOMAIN = 10
CALIBRATION_DOCUMENTS = 256

CHOICE_TASK = """task: demo_{domain}
custom_dataset: !function load_jsonl.load
dataset_kwargs: {{data_files: {{test: {domain}.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1}}
"""
PERPLEXITY_TASK = """task: demo_perplexity
custom_dataset: !function load_jsonl.load
dataset_kwargs: {data_files: {test: perplexity.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: word_perplexity}
  - {metric: byte_perplexity}
  - {metric: bits_per_byte}
metadata: {version: 1}
"""
GROUP = """group: demo
task: [{tasks}]
aggregate_metric_list:
  - {{metric: acc, aggregation: mean, weight_by_size: true}}
metadata: {{version: 1}}
"""


def questions(domain: str) -> list[dict]:
    """The exercises of one task, each kind as often as its quota says, no prompt twice."""
    rng, left, picked = stream("tasks", domain), dict(QUOTAS[domain]), {}
    for one in exercises(rng, domain, hard=True):
        if left.get(one.kind, 0) and one.prompt not in picked:
            left[one.kind] -= 1
            picked[one.prompt] = one
        if not any(left.values()):
            return [_row(one) for one in picked.values()]
    raise AssertionError("the exercises never end")


def _row(one: Exercise) -> dict:
    return {
        "prompt": one.prompt,
        "choices": list(one.choices),
        "label": one.label,
        "kind": one.kind,
    }


def perplexity_texts() -> list[dict]:
    """A few documents of every domain."""
    return [
        {"text": text, "domain": domain}
        for domain in DOMAINS
        for text in islice(documents(stream("perplexity", domain), domain), PERPLEXITY_PER_DOMAIN)
    ]


def calibration_texts() -> list[dict]:
    """Documents of all domains in turn, so that any leading part is balanced too."""
    sources = {domain: documents(stream("calibration", domain), domain) for domain in DOMAINS}
    domains = [*DOMAINS] * (CALIBRATION_DOCUMENTS // len(DOMAINS) + 1)
    return [{"text": next(sources[domain]), "domain": domain} for domain in domains[:CALIBRATION_DOCUMENTS]]


def write_all(out: Path) -> None:
    """Write every data file and task file that is derived from the generator."""
    out.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        _write_lines(out / f"{domain}.jsonl", questions(domain))
        (out / f"demo_{domain}.yaml").write_text(CHOICE_TASK.format(domain=domain))
    _write_lines(out / "perplexity.jsonl", perplexity_texts())
    _write_lines(out / "calibration.jsonl", calibration_texts())
    (out / "demo_perplexity.yaml").write_text(PERPLEXITY_TASK)
    tasks = ", ".join(f"demo_{domain}" for domain in DOMAINS)
    (out / "demo.yaml").write_text(GROUP.format(tasks=tasks))


def _write_lines(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write the tasks where the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    write_all(parser.parse_args().out)


if __name__ == "__main__":
    main()
