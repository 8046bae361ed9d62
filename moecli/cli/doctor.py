"""What works on this machine and what does not: versions, devices, memory, disk, network."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from moecli import __version__

HUB_TIMEOUT_S = 3.0
REQUIRED = (
    "torch",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "datasets",
    "accelerate",
    "compressed_tensors",
)
OPTIONAL = {
    "lm_eval": "`pip install 'moecli[eval]'` for eval/lm-eval",
    "triton": "GPU kernels fall back to PyTorch",
}


class Finding(NamedTuple):
    """One thing that was looked at. `note`: it works with less; `missing`: a run cannot work."""

    name: str
    state: Literal["ok", "note", "missing"]
    detail: str


def examine() -> list[Finding]:
    """Everything a run depends on. Waits at most three seconds for the network."""
    return [
        Finding("moecli", "ok", f"{__version__}, python {platform.python_version()}, {platform.platform()}"),
        *_packages(),
        *_devices(),
        _memory(),
        _disk(),
        _hub(),
    ]


def findings_text(findings: Sequence[Finding]) -> str:
    """The findings as a table."""
    from moecli.cli.render import table_text

    return table_text(["", "", ""], [[f.name, f.state, f.detail] for f in findings])


def _packages() -> Iterator[Finding]:
    for name in REQUIRED:
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "missing", f"`pip install {name.replace('_', '-')}`")
    for name, without in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        yield (Finding(name, "ok", _version(name)) if there else Finding(name, "note", f"not installed: {without}"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "installed"


def _devices() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        yield Finding("device", "missing", f"torch cannot be imported: {error}")
        return
    if not torch.cuda.is_available():
        yield Finding("device", "note", f"no CUDA device, runs use the CPU ({torch.get_num_threads()} threads)")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding(f"cuda:{index}", "ok", f"{name}, {_gib(free)} free of {_gib(total)}, CUDA {torch.version.cuda}")


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return Finding("memory", "note", "unknown on this system")
    return Finding("memory", "ok", f"{_gib(free)} free of {_gib(total)}")


def _disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    writable = os.access(Path.cwd(), os.W_OK)
    detail = f"{_gib(usage.free)} free of {_gib(usage.total)} in {Path.cwd()}"
    return Finding("disk", "ok" if writable else "note", detail if writable else f"{detail}, not writable")


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return Finding("hub", "note", "offline, because HF_HUB_OFFLINE is set: models must be local or in the cache")
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return Finding("hub", "ok", address)
    except urllib.error.HTTPError as error:
        return Finding("hub", "ok", f"{address} (answers {error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding("hub", "note", f"{address} cannot be reached ({reason}): models must be local or in the cache")


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
