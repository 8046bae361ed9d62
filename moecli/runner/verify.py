"""Is the written folder the model that the stages made, and does it load elsewhere?

Checks, in this order, each made whether the ones before it passed or not:

tensors    every tensor of the source is kept, rewritten or dropped with a reason, and the folder holds what
           the chain of stages says and nothing else, shape by shape
shapes     the MoE layers agree with `config.json`
packing    where weights are packed: words, scales and shapes of each agree, scales are numbers, and no loader that the
           folder is for would misread it (`io.servable`); `sidecar`: dense weights are what `packed/` decodes to;
           `decoded`: in GPTQ's layout, weights decode to exactly what the stages' decode to
routers    routers, their biases and correction biases are bit-equal to the source's, or to what the stage
           that wrote them made, and have the source's dtype
adapter    where weights are corrected: the factors beside the model are bit-equal to those of the stage
reload     a fresh process without network loads the folder as a stranger would: nothing of `moecli` is
           imported, no tensor is missing, unexpected or of another shape, and the tokenizer loads
logits     that process and the model in memory here give the same logits on 2 x 64 fixed tokens: difference
           0, or within 1/256 of the largest logit where weights are packed (symmetric integers gave 0)

A machine with too little memory for the last two says so, with both numbers, and the verification counts as
skipped, not as passed. So it does for GPTQ's layout, which stock transformers cannot load.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.core.model import ModelFacts, ModelSketch, TensorSpec
from moecli.families import facts_of, family_of, form_of
from moecli.io.durable import gib, natural_key
from moecli.io.factors import FACTORS_KEY
from moecli.io.formats import DenseView, corrected_weights, format_of, packed_names, packed_weights
from moecli.io.gptq_layout import GptqView, gptq_version, unpacked_gptq
from moecli.io.overlay import fates
from moecli.io.reader import FolderCheckpoint, StoredCheckpoint, stored
from moecli.io.servable import in_words, why_not
from moecli.runner.adapters import adapter_problems
from moecli.runner.export import DENSE, Kind, as_written, choose
from moecli.runner.sidecar import has_sidecar, sidecar_problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEQUENCES, TOKENS = 2, 64
PACKED_TOLERANCE = 1 / 256
"""Of the largest logit: about one step of bfloat16."""
LOAD_FACTOR = 1.25
"""Memory that loading takes, by the size of the dense model: fusing a layer's experts holds them twice."""
NOT_FOR_TRANSFORMERS = "stock transformers does not load GPTQ's layout; `scripts/serve_check.py` loads it in vLLM"
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Check:
    """One check. `detail` is a number worth knowing when it passed, the first tensors at fault when it
    failed.
    """

    name: str
    status: Literal["passed", "failed", "skipped"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and what became of every tensor of the source."""

    checks: tuple[Check, ...]
    problems: tuple[str, ...] = ()
    """One sentence each, naming the tensor; empty when all checks that could run passed."""
    accounting: Mapping[str, str] = field(default_factory=dict)
    """Source tensor -> `kept`, `kept as ...`, `rewritten ...`, or `dropped: reason`."""

    @property
    def status(self) -> Literal["passed", "failed", "skipped"]:
        """`skipped` when nothing failed but something could not be checked here."""
        found = {check.status for check in self.checks}
        return "failed" if self.problems or "failed" in found else "skipped" if "skipped" in found else "passed"

    def as_json(self) -> dict[str, Any]:
        """For the report: status and checks."""
        checks = [
            {
                "name": check.name,
                "passed": check.status != "failed",
                "detail": f"skipped: {check.detail}" if check.status == "skipped" else check.detail,
            }
            for check in self.checks
        ]
        return {"status": self.status, "checks": checks}


def verify(
    folder: Path | str,
    checkpoint: Checkpoint,
    source: Checkpoint | None = None,
    *,
    kind: Kind | None = None,
    free_bytes: int | None = None,
) -> Verification:
    """Check an exported `folder` against the `checkpoint` it was written from.

    `source` is the model the stages started from (default: the bottom of the chain), `kind` the form that was
    written (default: read from the folder), `free_bytes` the memory that may be used (default: what is free).
    Raises SurroundingsError when the folder cannot be opened at all; everything else is a problem.
    """
    exported = FolderCheckpoint(folder, facts_of)
    kind = kind or _kind_of(exported, checkpoint)
    written = as_written(checkpoint, kind)
    bottom = stored(checkpoint).source if source is None else stored(source)
    accounting = account(checkpoint)
    found = {
        "tensors": _tensor_problems(exported, written, accounting),
        "shapes": _shape_problems(exported),
        "routers": list(_router_problems(exported, written, bottom)),
    }
    if packed_weights(unpacked_gptq(exported).names()):
        found["packing"] = list(_packing_problems(exported))
    if isinstance(written, GptqView):
        found["decoded"] = list(_decoding_problems(exported, written.parent))
    if kind not in DENSE and corrected_weights(checkpoint.names()):
        found["adapter"] = adapter_problems(checkpoint, folder)
    if kind == "research":
        found["sidecar"] = sidecar_problems(folder, checkpoint)
    checks = [_check(name, problems) for name, problems in found.items()]
    checks[0] = _with_detail(checks[0], _summary(accounting))
    late, problems = _reload(exported, DenseView(written), free_bytes)
    every = tuple(problem for group in found.values() for problem in group) + tuple(problems)
    return Verification((*checks, *late), every, accounting)


def verify_folder(
    folder: Path | str, against: Checkpoint | Path | str | None = None, *, free_bytes: int | None = None
) -> Verification:
    """Check a model folder by itself: it agrees with its config, loads elsewhere, and computes there what it
    computes here. With `against`, the source model, also what became of each of its tensors: without the
    stages only names and shapes can tell, so what is new or changed is listed, not refused.
    """
    exported = FolderCheckpoint(folder, facts_of)
    accounting: dict[str, str] = {}
    checks: list[Check] = []
    problems: list[str] = []
    if against is not None:
        source = against if isinstance(against, Checkpoint) else FolderCheckpoint(against, facts_of)
        accounting, problems = compare(exported, source)
        checks.append(_with_detail(_check("tensors", problems), _summary(accounting)))
        checks.append(Check("routers", "passed", _router_detail(exported, source)))
    found = {"shapes": _shape_problems(exported)}
    if packed_weights(unpacked_gptq(exported).names()):
        found["packing"] = list(_packing_problems(exported))
    if has_sidecar(folder):
        found["sidecar"] = sidecar_problems(folder)
    late, more = _reload(exported, DenseView(exported), free_bytes)
    checks += [_check(name, said) for name, said in found.items()]
    problems += [problem for said in found.values() for problem in said]
    return Verification((*checks, *late), (*problems, *more), accounting)


def _kind_of(exported: FolderCheckpoint, checkpoint: Checkpoint) -> Kind:
    quantization = exported.config.get("quantization_config") or {}
    if quantization.get("quant_method") == "moecli":
        return "compact"
    if gptq_version(exported.config):
        return "gptq"
    if has_sidecar(exported.folder):
        return "research"
    opened = bool(checkpoint.config.get("quantization_config")) and not quantization
    return "stock" if choose(checkpoint) == "stock" and not opened else "expanded"


def _check(name: str, problems: Sequence[str]) -> Check:
    return Check(name, "failed", _first(problems)) if problems else Check(name, "passed")


def _with_detail(check: Check, detail: str) -> Check:
    return check if check.status == "failed" else Check(check.name, check.status, detail)


def _first(problems: Sequence[str]) -> str:
    more = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


# -- tensors ----


def account(checkpoint: Checkpoint) -> dict[str, str]:
    """What became of every tensor of the source, through all stages of a chain."""
    top = stored(checkpoint)
    return {name: _fate(top, name, *fate) for name, fate in fates(top).items()}


def _fate(top: StoredCheckpoint, name: str, verb: str, detail: str) -> str:
    if verb == "kept":
        return "kept" if detail == name else f"kept as {detail}"
    if verb == "rewritten":
        old, new = top.source.spec(name), top.spec(detail) if detail in top else None
        if new is None:
            return f"dropped: rewritten as `{detail}`, which a later stage removed"
        changed = f" from {list(old.shape)} to {list(new.shape)}" if old.shape != new.shape else ""
        return f"rewritten{changed}"
    return f"dropped: {detail}" if verb == "dropped" else f"dropped: `{detail}` took its name"


def compare(exported: Checkpoint, source: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """What became of the source's tensors, from names and shapes alone, and those whose loss has no
    explanation.

    Experts and their packed forms, MTP layers and what a packed weight replaces are explained; a lost norm
    is not.
    """
    family, names = family_of(source.config), set(unpacked_gptq(exported).names())
    experts = {linear.name for linear in family.linears(source) if linear.role == "expert"}
    accounting, lost = {}, []
    for name in source.names():
        if packed_names(name).packed in names:  # first: a compact export's guard may have taken the name
            accounting[name] = "dropped: packed"
        elif name in names:
            old, new = source.spec(name), exported.spec(name)
            accounting[name] = "kept" if old == new else f"rewritten from {list(old.shape)} to {list(new.shape)}"
        elif name in experts:
            factored = bool(exported.config.get(FACTORS_KEY))
            accounting[name] = f"dropped: {'stored as factors' if factored else 'expert pruned or merged'}"
        elif family.is_extra(name):
            accounting[name] = "dropped: MTP layer"
        else:
            accounting[name] = "lost"
            lost.append(f"`{name}` of the source is gone, and nothing says why")
    return accounting, lost


def _summary(accounting: Mapping[str, str]) -> str:
    count = {"kept": 0, "rewritten": 0, "dropped": 0, "lost": 0}
    for words in accounting.values():
        count[words.split()[0].rstrip(":")] += 1
    said = ", ".join(f"{number} {word}" for word, number in count.items() if number)
    return f"{len(accounting)} tensors of the source: {said}"


def _tensor_problems(exported: Checkpoint, written: Checkpoint, accounting: Mapping[str, str]) -> list[str]:
    found, wanted = set(exported.names()), set(written.names())
    problems = [f"`{name}` is dropped without a reason" for name, words in accounting.items() if words == "dropped: "]
    problems += [f"`{name}` is missing from the folder" for name in written.names() if name not in found]
    problems += [f"`{name}` is in the folder, but no stage wrote it" for name in exported.names() if name not in wanted]
    specs = ((name, exported.spec(name), written.spec(name)) for name in exported.names() if name in wanted)
    problems += [f"`{name}` is {_said(got)}, expected {_said(want)}" for name, got, want in specs if got != want]
    return problems


def _said(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _shape_problems(exported: Checkpoint) -> list[str]:
    dense = DenseView(exported)
    return [str(problem) for problem in family_of(dense.config).accounting(dense)]


def _packing_problems(exported: FolderCheckpoint) -> Iterable[str]:
    """Packed weights whose parts disagree, and a form that stock transformers would not read as it is meant."""
    import torch

    packed, dense = unpacked_gptq(exported), DenseView(exported)
    specs = {name: packed.spec(name) for name in packed.names()}
    for name in sorted(packed_weights(specs), key=natural_key):
        if format_of(name, specs) == "int":
            yield from _word_problems(name, dense, specs)
        scale = packed_names(name).scale
        try:
            values = packed.get(scale)
        except SurroundingsError as error:  # zero points or an order of inputs that are not ours
            yield error.message
            continue
        if values.is_floating_point() and not bool((torch.isfinite(values) & (values != 0)).all()):
            yield f"`{scale}` has values that are not finite or are zero"
    if "auto_map" in exported.config or packed is not exported:
        return
    if (form := form_of(ModelSketch(exported.facts, exported.config, specs))) and (row := why_not(form, "hf")):
        yield f"experts are packed to {in_words(form)}, and transformers {row.note}"


def _decoding_problems(exported: FolderCheckpoint, packed: Checkpoint) -> Iterable[str]:
    """Packed weights of the folder that are not, bit by bit, those of the stages."""
    import torch

    there, here = DenseView(exported), DenseView(packed)
    for name in sorted(packed_weights(packed.names()), key=natural_key):
        with suppress(SurroundingsError):  # `packing` says so
            if name in there and not torch.equal(_bits(there.get(name)), _bits(here.get(name))):
                yield f"`{name}` does not decode to what the stages packed"


def _word_problems(name: str, dense: DenseView, specs: Mapping[str, TensorSpec]) -> Iterable[str]:
    """What of integer words, scales and the stored shape does not go together."""
    parts, bits, shape = packed_names(name), dense.bits(name), dense.spec(name).shape
    rows, columns = dense.logical(name)
    words, groups = specs[parts.packed].shape[-1], specs[parts.scale].shape[-1]
    if words != -(-columns * bits // 32):
        yield f"`{name}` of {list(shape)} needs {-(-columns * bits // 32)} words a row at {bits} bits, it has {words}"
    if rows != specs[parts.packed].shape[-2] or rows != specs[parts.scale].shape[-2]:
        yield f"`{name}` of {list(shape)} has words for {specs[parts.packed].shape[-2]} rows"
    if columns % groups:
        yield f"`{name}` of {list(shape)} has {groups} scales a row"


# -- routers ----


def _router_problems(exported: Checkpoint, written: StoredCheckpoint, source: StoredCheckpoint) -> Iterable[str]:
    """The folder's routers hold the bits that the chain says, in the source's dtype."""
    import torch

    family = family_of(written.config)
    for layer in written.facts.moe_layers:
        for name in family.router_tensors(written, layer):
            if name not in exported:
                continue  # `tensors` says so
            kind, underlying = written.origin(name)
            want = source.get(underlying) if kind == "source" and underlying in source else written.get(name)
            got = exported.get(name)
            if got.dtype != want.dtype:
                yield f"`{name}` is {got.dtype}, the source's is {want.dtype}"
            elif not torch.equal(_bits(got), _bits(want)):
                yield f"`{name}` differs from the {'source' if kind == 'source' else 'stage that wrote it'}"
            elif name in source and source.spec(name).dtype != written.spec(name).dtype:
                yield f"`{name}` is {written.spec(name).dtype}, the source's is {source.spec(name).dtype}"


def _router_detail(exported: Checkpoint, source: Checkpoint) -> str:
    """How many router tensors are the source's, are made of rows of it, or are new."""
    family, count = family_of(source.config), {"unchanged": 0, "rows of the source": 0, "changed": 0}
    for layer in source.facts.moe_layers:
        for name, axis in family.router_tensors(source, layer).items():
            if name in exported:
                count[_router_state(exported.get(name), source.get(name), axis)] += 1
    return ", ".join(f"{number} {word}" for word, number in count.items() if number)


def _router_state(new: Tensor, old: Tensor, axis: int) -> str:
    if new.shape == old.shape and new.dtype == old.dtype and bool((_bits(new) == _bits(old)).all()):
        return "unchanged"
    rows = {row.tobytes() for row in _rows(old, axis)}
    same_dtype = new.dtype == old.dtype
    return "rows of the source" if same_dtype and all(r.tobytes() in rows for r in _rows(new, axis)) else "changed"


def _rows(tensor: Tensor, axis: int) -> Iterable[Any]:
    return (_bits(row.contiguous()).numpy() for row in tensor.unbind(axis))


def _bits(tensor: Tensor) -> Tensor:
    """The bytes: NaN equals itself, and -0.0 is not 0.0."""
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8)


# -- a fresh process ----


_SCRIPT = """
import json, sys
folder, tokens, out, trust = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3], sys.argv[4] == "trust"
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
report = {}
# Sizes are reported with the rest, by name; the caller refuses every one of them.
model, info = AutoModelForCausalLM.from_pretrained(
    folder, output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=trust
)
for key in ("missing_keys", "unexpected_keys", "error_msgs"):
    report[key] = sorted(map(str, info.get(key) or ()))
report["mismatched_keys"] = [[n, list(a), list(b)] for n, a, b in sorted(info.get("mismatched_keys") or ())]
try:
    report["tokenizer"] = len(AutoTokenizer.from_pretrained(folder))
except Exception as error:
    report["tokenizer_error"] = str(error).partition("\\n")[0]
with torch.inference_mode():
    logits = model.eval()(input_ids=torch.tensor(tokens), use_cache=False).logits
save_file({"logits": logits.float().contiguous()}, out + "/logits.safetensors")
report["imported_moecli"] = "moecli" in sys.modules
with open(out + "/report.json", "w") as file:
    json.dump(report, file)
"""


def fixed_tokens(facts: ModelFacts) -> list[list[int]]:
    """2 x 64 token ids below the vocabulary's size, from integer arithmetic alone: the same everywhere."""
    length, state, ids = min(TOKENS, facts.max_positions), 12345, []
    for _ in range(SEQUENCES * length):
        state = (1103515245 * state + 12345) % 2**31
        ids.append((state >> 8) % facts.vocab)
    return [ids[i * length : (i + 1) * length] for i in range(SEQUENCES)]


def _reload(exported: FolderCheckpoint, dense: DenseView, free_bytes: int | None) -> tuple[list[Check], list[str]]:
    """The checks `reload` and `logits`, and their problems. `dense` is what the folder must compute."""
    if gptq_version(exported.config):
        return [Check(name, "skipped", NOT_FOR_TRANSFORMERS) for name in ("reload", "logits")], []
    needed = int(sum(dense.spec(name).bytes for name in dense.names()) * LOAD_FACTOR)
    free = available_bytes() if free_bytes is None else free_bytes
    if needed > free:
        reason = f"needs {gib(needed)} of memory, {gib(free)} free"
        return [Check("reload", "skipped", reason), Check("logits", "skipped", reason)], []
    tokens = fixed_tokens(dense.facts)
    with tempfile.TemporaryDirectory(prefix="moecli-verify-") as scratch:
        report, error = _in_fresh_process(exported, tokens, Path(scratch))
        if error:
            return [
                Check("reload", "failed", error),
                Check("logits", "skipped", "the folder does not load"),
            ], [error]
        problems = list(_loading_problems(report, exported))
        checks = [_with_detail(_check("reload", problems), _tokenizer_detail(report))]
        check, difference = _compare_logits(dense, tokens, Path(scratch) / "logits.safetensors", exported)
        return [*checks, check], [*problems, *difference]


def _in_fresh_process(
    exported: FolderCheckpoint, tokens: list[list[int]], scratch: Path
) -> tuple[dict[str, Any], str | None]:
    """What the script reports, or why it could not: (report, None) or ({}, sentence)."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    trust = "trust" if "auto_map" in exported.config else "no"
    done = run_python(
        _SCRIPT, [str(exported.folder.resolve()), json.dumps(tokens), str(scratch), trust], scratch, environment
    )
    if done.returncode != 0:
        return {}, f"a fresh process cannot load the folder: {_why(done)}"
    report: dict[str, Any] = json.loads((scratch / "report.json").read_text("utf-8"))
    return report, None


def run_python(
    script: str, argv: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """A script in an interpreter of its own; what it prints is kept.

    `-P` keeps the working directory off the path; `-I` would also hide packages installed for the user alone.
    """
    command = [sys.executable, "-P", "-c", script, *argv]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def _why(done: subprocess.CompletedProcess[str]) -> str:
    """The lines of the error output that say something: the loading report's tensors, then the exception."""
    if done.returncode < 0:
        return f"it was killed by signal {-done.returncode}"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    words = ("MISSING", "UNEXPECTED", "MISMATCH", "CONVERSION")
    tensors = [f"`{line.split('|')[0].strip()}` {w.lower()}" for line in lines for w in words if f"| {w}" in line]
    last = lines[-1] if lines else f"exit code {done.returncode}"
    return "; ".join([*tensors[:_SHOWN], last])


def _loading_problems(report: Mapping[str, Any], exported: FolderCheckpoint) -> Iterable[str]:
    yield from (f"a fresh process misses `{name}`" for name in report["missing_keys"])
    yield from (f"a fresh process does not expect `{name}`" for name in report["unexpected_keys"])
    for name, got, want in report["mismatched_keys"]:
        yield f"a fresh process reads `{name}` as {got}, expected {want}"
    yield from (f"a fresh process reports: {message}" for message in report["error_msgs"])
    if "tokenizer_error" in report and _has_tokenizer(exported):
        yield f"the tokenizer does not load: {report['tokenizer_error']}"
    if report["imported_moecli"]:
        yield "loading the folder imported `moecli`, which others do not have"


def _has_tokenizer(exported: FolderCheckpoint) -> bool:
    return any(name.startswith(("tokenizer", "vocab")) for name in exported.side_files())


def _tokenizer_detail(report: Mapping[str, Any]) -> str:
    if "tokenizer" in report:
        return f"tokenizer of {report['tokenizer']} entries"
    return "no tokenizer beside the weights"


def _compare_logits(
    dense: DenseView, tokens: list[list[int]], file: Path, exported: FolderCheckpoint
) -> tuple[Check, list[str]]:
    import torch
    from safetensors.torch import load_file

    from moecli.families.adapter import load_model

    model = load_model(dense)
    with torch.inference_mode():
        here = model(input_ids=torch.tensor(tokens), use_cache=False).logits.float()
    there = load_file(file)["logits"]
    difference = _largest_difference(here, there)
    packed = packed_weights(exported.names())
    allowed = PACKED_TOLERANCE * float(here.abs().max()) if packed else 0.0
    if difference <= allowed:
        return Check("logits", "passed", f"largest difference {difference:g}, allowed {allowed:g}"), []
    problem = f"logits of a fresh process differ by {difference:g} from those in memory, allowed {allowed:g}"
    return Check("logits", "failed", problem), [problem]


def _largest_difference(here: torch.Tensor, there: torch.Tensor) -> float:
    """Infinite for another shape, or where only one side is a number."""
    if here.shape != there.shape or bool((here.isnan() != there.isnan()).any()):
        return float("inf")
    return float((here - there).nan_to_num().abs().max())


def available_bytes() -> int:
    """Memory a new process can use: the system's, or less inside a container."""
    free = _system_bytes()
    group = Path("/sys/fs/cgroup")
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used + _page_cache(group / "memory.stat"))
    return max(0, free)


def _system_bytes() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _page_cache(stat: Path) -> int:
    """File pages of a cgroup that count as used and go as soon as memory is asked for."""
    for line in stat.read_text().splitlines():
        name, _, number = line.partition(" ")
        if name == "inactive_file":
            return int(number)
    return 0


def _number(path: Path) -> int | None:
    """A file with one number; None where there is no such file, or no limit in it."""
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None
