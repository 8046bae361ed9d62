"""What packed weights are, beside a model folder that holds them dense: the export `research`.

    packed/model.safetensors    codes, scales and shapes, and corrections, as the stages wrote them
    packed/config.json          the model's config, whose `quantization_config` says how to read them

The folder around it computes exactly what the packed model computes, in any program, and takes no less disk for it: a
mix of bits that no engine runs can be evaluated and published without anything that could be taken for servable.
Reports count the bytes of the packed tensors.
"""

from __future__ import annotations

from pathlib import Path

from moecli.core.artifacts import Checkpoint
from moecli.core.errors import SurroundingsError
from moecli.families import facts_of
from moecli.io.durable import json_text, write_text
from moecli.io.formats import DenseView, corrected_weights, factor_names, packed_weights, parts_of
from moecli.io.reader import SINGLE, FolderCheckpoint
from moecli.io.tensorfile import write_tensors

FOLDER = "packed"


def has_sidecar(model_folder: Path | str) -> bool:
    """Whether a model folder is a `research` export."""
    return (Path(model_folder) / FOLDER / "config.json").is_file()


def write_sidecar(checkpoint: Checkpoint, model_folder: Path | str) -> None:
    """Write `packed/` into the folder of an exported model, from the checkpoint that it was made of."""
    folder = Path(model_folder) / FOLDER
    folder.mkdir(exist_ok=True)
    specs = {name: checkpoint.spec(name) for name in _stored(checkpoint)}
    write_tensors(folder / SINGLE, specs, checkpoint.get)
    write_text(folder / "config.json", json_text(dict(checkpoint.config)))


def sidecar_problems(model_folder: Path | str, checkpoint: Checkpoint | None = None) -> list[str]:
    """What is wrong between a folder's dense weights and its `packed/`, one sentence each; empty when each weight is,
    bit by bit, what its codes and scales decode to. With the checkpoint it was made of: also what differs from that.
    """
    try:
        packed = FolderCheckpoint(Path(model_folder) / FOLDER, facts_of)
        decoded = DenseView(packed)
    except SurroundingsError as error:
        return [f"`{FOLDER}/` cannot be read: {error.message}"]
    dense, problems = FolderCheckpoint(model_folder, facts_of), []
    for name in decoded.names():
        if name not in dense:
            problems.append(f"`{name}` is in `{FOLDER}/`, but not in the model")
        elif not _same(dense, decoded, name):
            problems.append(f"`{name}` is not what its codes in `{FOLDER}/` decode to")
    if checkpoint is None:
        return problems
    wanted, found = set(_stored(checkpoint)), set(packed.names())
    problems += [f"`{name}` is missing from `{FOLDER}/`" for name in sorted(wanted - found)]
    problems += [f"`{name}` is in `{FOLDER}/`, but no stage wrote it" for name in sorted(found - wanted)]
    differ = [name for name in sorted(wanted & found) if not _same(packed, checkpoint, name)]
    return problems + [f"`{name}` in `{FOLDER}/` differs from the stage that wrote it" for name in differ]


def sidecar_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the tensors that `packed/` holds for a checkpoint."""
    return sum(checkpoint.spec(name).bytes for name in _stored(checkpoint))


def _stored(checkpoint: Checkpoint) -> list[str]:
    """Names of the tensors that hold packed weights and their corrections."""
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
    names = [part for name in sorted(packed_weights(specs)) for part in parts_of(name, specs)]
    return names + [part for name in sorted(corrected_weights(specs)) for part in factor_names(name)]


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    import torch

    if one.spec(name) != other.spec(name):
        return False
    bits = (value.get(name).contiguous().view(-1).view(torch.uint8) for value in (one, other))
    return bool(torch.equal(*bits))
