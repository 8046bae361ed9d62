"""Experts of a compact checkpoint that stay packed in memory.

Asked for where the model is loaded, with `import moecli`:

    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["memory"] = "packed"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config)

Experts of 2, 3 or 4 bits then take their codes and scales (`ops.packed` has the layout); bits may differ between the
experts of a layer, gate and up of one expert must agree. Attention and shared experts are dense as ever. On CUDA with
Triton, up to 256 visits an expert are multiplied by `ops.kernels.packed`, without a word to the host; more, and
everything elsewhere, is dequantized layer by layer at each call and run by the stock implementation, which then
computes what the dense model computes. The kernels give the same up to rounding: they gate in float32 and round once.
Such a model is not saved, and its experts do not learn.

The file that lies beside the weights for `trust_remote_code` needs torch and transformers only, and so has no kernels:
with it alone, `memory: packed` is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moecli.core.artifacts import Checkpoint
from moecli.families import WIDTHS_KEY, family_of
from moecli.io.factors import FACTORS_KEY
from moecli.io.formats import format_of, packed_names, packed_weights
from moecli.ops.kernels import kernels
from moecli.ops.pack import unpack_rows
from moecli.ops.packed import Packed, arrange, dequantized
from moecli.runtime.compact_model import moe_blocks

MOST_VISITS = 256
"""Of an expert, on average, up to which its weights are dequantized while multiplying (docs/performance.md)."""
PROJECTIONS = ("gate_up_proj", "down_proj")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED = 256


# Reading: what transformers takes for one tensor


def kept(experts: Sequence[Sequence[tuple[Tensor, Tensor, Tensor]]]) -> Tensor:
    """One uint8 tensor of a layer's projection: for each expert the (words, scale, shape) of the matrices that follow
    each other in its rows. ValueError: bits that are not 2, 3 or 4 or differ in one expert; groups of other sizes.
    """
    found: dict[int, list[tuple[int, Packed]]] = {}
    for expert, matrices in enumerate(experts):
        bits = {words.shape[-1] * 32 // int(shape.flatten()[-1]) for words, _, shape in matrices}
        if len(bits) > 1:
            raise ValueError(
                f"expert {expert} has matrices of {' and '.join(map(str, sorted(bits)))} bits side by side"
            )
        (width,) = bits
        codes = torch.cat([unpack_rows(words, width, int(shape.flatten()[-1])) for words, _, shape in matrices])
        scale = torch.cat([scale for _, scale, _ in matrices])
        found.setdefault(width, []).append((expert, arrange(codes[None], scale[None], width)))
    return torch.cat([_written(pieces) for _, pieces in sorted(found.items())])


def _written(pieces: list[tuple[int, Packed]]) -> Tensor:
    """Bytes: ten numbers, the experts' indices, words, third bits, scales; each filled up to 256."""
    members, packed = [expert for expert, _ in pieces], [piece for _, piece in pieces]
    first = packed[0]
    if any(each.scale_EGN.shape != first.scale_EGN.shape for each in packed):
        raise ValueError(f"experts of {first.bits} bits have groups of different sizes")
    low, scale = torch.cat([p.low for p in packed]), torch.cat([p.scale_EGN for p in packed])
    high = [torch.cat([p.high for p in packed if p.high is not None])] if first.high is not None else []
    numbers = [first.bits, first.columns, first.span, *low.shape[:3], scale.shape[1], _DTYPES.index(scale.dtype)]
    parts = [torch.tensor(numbers), torch.tensor(members), low, *high, scale]
    return torch.cat([_filled(part.to(low.device)) for part in parts])


def _filled(value: Tensor) -> Tensor:
    flat = value.contiguous().flatten().view(torch.uint8)
    return nn.functional.pad(flat, (0, -len(flat) % _ALIGNED))


def _read(blob: Tensor) -> list[tuple[list[int], Packed]]:
    """What `kept` made, each piece with its experts."""
    pieces, at = [], 0

    def take(dtype: torch.dtype, *shape: int) -> Tensor:
        nonlocal at
        size = torch.Size(shape).numel() * dtype.itemsize
        value = blob[at : at + size].clone().view(dtype).view(shape)
        at += size + -size % _ALIGNED
        return value

    while at < len(blob):
        bits, columns, span, experts, blocks, rows, groups, kind = take(torch.int64, 8).tolist()
        members = take(torch.int64, experts).tolist()
        low = take(torch.int32, experts, blocks, rows, 16)
        high = take(torch.int16, experts, blocks, rows, 16) if bits == 3 else None
        scale = take(_DTYPES[kind], experts, groups, rows)
        pieces.append((members, Packed(low, high, scale, bits, columns, span)))
    return pieces


# Running


class PackedProjection(nn.Module):
    """One projection of a layer's experts: a piece for each number of bits. All is in buffers."""

    def __init__(self, blob: Tensor) -> None:
        super().__init__()
        pieces = _read(blob)
        self.experts = sum(len(members) for members, _ in pieces)
        self._kinds = [(packed.bits, packed.columns, packed.span) for _, packed in pieces]
        for number, (members, packed) in enumerate(pieces):
            place = torch.full((self.experts,), -1, dtype=torch.int64, device=blob.device)
            place[members] = torch.arange(len(members), device=blob.device)
            parts = {"place": place, "low": packed.low, "high": packed.high, "scale": packed.scale_EGN}
            for name, value in parts.items():
                self.register_buffer(f"{name}_{number}", value, persistent=False)

    def pieces(self) -> list[tuple[Tensor, Packed]]:
        """Of each number of bits the place of every expert in the piece, or -1, and the piece."""
        found = []
        for number, kind in enumerate(self._kinds):
            place, *tensors = (getattr(self, f"{name}_{number}") for name in ("place", "low", "high", "scale"))
            found.append((place, Packed(*tensors, *kind)))
        return found

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[E, N, K]: products are taken in the scale's dtype and cast then, as where the model is loaded dense."""
        pieces = self.pieces()
        unpack = getattr(kernels("packed", pieces[0][1].low), "dequantized", dequantized)
        found = [unpack(packed).to(dtype) for _, packed in pieces]
        if len(found) == 1:
            return found[0]
        whole = found[0].new_empty(self.experts, *found[0].shape[1:])
        for (place_E, packed), weights in zip(pieces, found, strict=True):
            order = torch.argsort(torch.where(place_E < 0, self.experts, place_E), stable=True)
            whole[order[: packed.low.shape[0]]] = weights
        return whole

    def product(
        self, fast: ModuleType, x_TK: Tensor, expert_S: Tensor, visits: Any = None, gated: bool = False
    ) -> Tensor:
        """Of each visit, by kernels: [S, N], or SiLU(gate) * up [S, N/2]. `visits`: `fast.sort_visits` of the experts,
        or None, where each visit reads its expert for itself.
        """
        run, out = fast.gated_product if gated else fast.product, None
        for packed, own_S, own_visits in self._shared_out(fast, expert_S, visits):
            out = run(x_TK, packed, own_S, own_visits, out)
        return out

    def combined(
        self, fast: ModuleType, x_SK: Tensor, expert_S: Tensor, weight_Tk: Tensor, visits: Any = None
    ) -> Tensor:
        """The weighted sum over the slots of each token, by kernels: [T, N]."""
        if len(self._kinds) > 1:
            return fast.combined(self.product(fast, x_SK, expert_S, visits), weight_Tk)
        return fast.combined_product(x_SK, self.pieces()[0][1], expert_S, weight_Tk, visits)

    def _shared_out(self, fast: ModuleType, expert_S: Tensor, visits: Any) -> Iterator[tuple[Packed, Tensor, Any]]:
        """Each piece with the place of each visit's expert in it, or -1, and these sorted if `visits` are."""
        pieces = self.pieces()
        if len(pieces) == 1:
            yield pieces[0][1], expert_S, visits
            return
        for place_E, packed in pieces:
            own_S = place_E[expert_S]
            yield packed, own_S, None if visits is None else fast.sort_visits(own_S, packed.low.shape[0])


def keep_packed(experts: nn.Module) -> None:
    """Turn a stock `experts` module, or its alias class, whose projections were read by `kept` into one that runs on
    them. Its projections are modules then, without parameters.
    """
    for name in PROJECTIONS:
        blob = getattr(experts, name).data
        delattr(experts, name)
        setattr(experts, name, PackedProjection(blob))
    experts.__class__ = packed_class(type(experts))


def pack_experts(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Let the experts of a model that was loaded dense stay packed as the checkpoint has them; in how many layers.

    Layers whose experts are not packed to integers are left as they are. ValueError: experts of several widths, stored
    as factors, or of bits or groups that cannot stay packed.
    """
    config, packed = checkpoint.config, packed_weights(checkpoint.names())
    specs = {name: checkpoint.spec(name) for name in checkpoint.names()}
    refuse(config.get(WIDTHS_KEY) or {}, config.get(FACTORS_KEY) or {})
    family, layers = family_of(config), 0
    for layer, block in moe_blocks(model).items():
        form = family.layout(packed, int(layer))
        names = [form.names_of(expert) for expert in range(family.experts_in(int(layer)))]
        if not {*names[0]} & packed or format_of(names[0][0], specs) != "int":
            continue
        stacked = len(specs[packed_names(names[0][0]).packed].shape) == 3
        matrices = _stacked(checkpoint, names[0]) if stacked else _each(checkpoint, names)
        for name, experts in zip(PROJECTIONS, matrices, strict=True):
            setattr(block.experts, name, nn.Parameter(kept(experts), requires_grad=False))
        keep_packed(block.experts)
        layers += 1
    return layers


_Matrix = tuple[Tensor, Tensor, Tensor]


def _each(checkpoint: Checkpoint, names: Sequence[Sequence[str]]) -> tuple[list[list[_Matrix]], list[list[_Matrix]]]:
    """Of each expert gate and up, and down, as `kept` takes them."""

    def parts(name: str) -> _Matrix:
        packed, scale, shape = (checkpoint.get(part) for part in packed_names(name))
        return packed, scale, shape

    return [[parts(gate), parts(up)] for gate, up, _ in names], [[parts(down)] for _, _, down in names]


def _stacked(checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[list[list[_Matrix]]]:
    """The same from the tensors of all experts: gates and ups, then downs."""
    for name in names[:2]:
        packed, scale, shape = (checkpoint.get(part) for part in packed_names(name))
        inputs = shape[1] if shape[3] else shape[2]
        yield [[(words, scales, inputs)] for words, scales in zip(packed, scale, strict=True)]


def packed_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward multiplies with packed weights; activation, gating and biases are the stock class's."""
    return type("Packed" + base.__name__, (base,), {"forward": _forward, "stock": getattr(base, "stock", base)})


def _forward(self: nn.Module, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
    if hasattr(self, "alias_map"):
        index_Tk = self.alias_map[index_Tk]
    fast = kernels("packed", hidden_TD)
    learns = torch.is_grad_enabled() and hidden_TD.requires_grad
    # transformers 5.17 knows neither
    special = getattr(self, "_is_expert_parallel", False) or getattr(self, "has_post_expert_norm", False)
    if fast is None or learns or special or index_Tk.numel() > MOST_VISITS * self.num_experts:
        return self.stock.forward(_dense(self, hidden_TD.dtype), hidden_TD, index_Tk, weight_Tk)
    return run_packed(self, fast, hidden_TD, index_Tk, weight_Tk)


def run_packed(experts: nn.Module, fast: ModuleType, hidden_TD: Tensor, index_Tk: Tensor, weight_Tk: Tensor) -> Tensor:
    """The weighted sum of each token's experts, through the kernels. No gradients, no expert parallelism."""
    expert_S = index_Tk.flatten()
    visits = None if len(expert_S) <= fast.FEW else fast.sort_visits(expert_S, experts.num_experts)
    if _gated_as_kernels(experts):
        h_SF = experts.gate_up_proj.product(fast, hidden_TD, expert_S, visits, gated=True)
    else:
        both = experts.gate_up_proj.product(fast, hidden_TD, expert_S, visits)
        h_SF = experts._apply_gate(both + experts.gate_up_proj_bias[expert_S] if experts.has_bias else both)
    y_TD = experts.down_proj.combined(fast, h_SF, expert_S, weight_Tk, visits)
    if experts.has_bias:
        y_TD = y_TD + (experts.down_proj_bias[index_Tk] * weight_Tk[..., None]).sum(1)
    return y_TD.to(hidden_TD.dtype)


def _gated_as_kernels(experts: nn.Module) -> bool:
    stock = experts._apply_gate.__func__.__name__ == "_default_apply_gate" and isinstance(experts.act_fn, nn.SiLU)
    return stock and experts.is_concatenated and not experts.has_bias


def _dense(experts: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A stock module with the weights unpacked, for one call."""
    piece = copy.copy(experts)
    weights = {name: getattr(experts, name).dense(dtype) for name in PROJECTIONS}
    if experts.is_transposed:
        weights = {name: weight.mT for name, weight in weights.items()}
    piece.__dict__["_modules"] = {name: m for name, m in experts._modules.items() if name not in PROJECTIONS}
    piece.__dict__["_parameters"] = experts._parameters | weights
    piece.__class__ = experts.stock
    return piece


def refuse(widths: Mapping[str, Sequence[int]], factors: Mapping[str, Any]) -> None:
    """ValueError for checkpoints whose experts cannot stay packed."""
    ragged = [layer for layer, found in widths.items() if len(set(found)) > 1]
    if ragged or factors:
        what = f"layer {ragged[0]} has experts of several widths" if ragged else "its experts are stored as factors"
        raise ValueError(f"this checkpoint's experts cannot stay packed: {what}; leave out `memory: packed`")
