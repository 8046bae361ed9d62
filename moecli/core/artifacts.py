"""Values that pass between stages. An artifact becomes tensors + JSON; `io` does the bytes.

Shape letters: L layers, E experts before, K experts kept, T tokens, k experts per token, D model width,
F expert hidden width, G quantization groups.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from moecli.core.errors import MoecliError, SurroundingsError
from moecli.core.model import ModelFacts, ModelSketch, PlannedBits, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

V = TypeVar("V")

DROPPED = -1
"""Group number of an expert that is in no group: it is pruned."""


class Packed(NamedTuple):
    """What `io` stores of an artifact: tensors by name and a JSON-able value."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


class Artifact(ABC):
    """A value that can become tensors + JSON and back, without loss."""

    @abstractmethod
    def pack(self) -> Packed: ...

    @classmethod
    @abstractmethod
    def unpack(cls, packed: Packed) -> Self: ...


class ExpertWeights(NamedTuple):
    """One expert, always this way round, whatever the file says. Biases only where the family has them."""

    gate_FD: Tensor
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None


class Checkpoint(Artifact):
    """A model on disk, read lazily: nothing is resident. Names are the family's on-disk names."""

    facts: ModelFacts
    config: Mapping[str, Any]

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Every tensor name, in a fixed order."""

    @abstractmethod
    def spec(self, name: str) -> TensorSpec: ...

    @abstractmethod
    def get(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """The tensor as stored. Raises SurroundingsError when the file is damaged."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of the first dimension, read without the rest, on the CPU."""

    @abstractmethod
    def side_files(self) -> Mapping[str, str]:
        """Tokenizer and other small files beside the weights: file name -> path."""

    def __contains__(self, name: object) -> bool:
        return name in set(self.names())


def sketch_of(checkpoint: Checkpoint) -> ModelSketch:
    """Facts and tensor specs of an open checkpoint."""
    return ModelSketch(checkpoint.facts, checkpoint.config, {n: checkpoint.spec(n) for n in checkpoint.names()})


class CheckpointWriter(ABC):
    """Changes over a parent checkpoint: only what changed is written.

    with ctx.writer(parent, config=new_config) as out:
        out.part("layer-003", write)      # write(part) calls part.put/rename/drop; finished parts survive a crash
    return out.checkpoint

    A clean exit checks that every name is written once and that every renamed name exists in the parent;
    an exception leaves only the `.partial` folder.
    """

    checkpoint: Checkpoint

    @abstractmethod
    def part(self, name: str, write: Callable[[PartWriter], None]) -> None: ...

    @abstractmethod
    def has_part(self, name: str) -> bool:
        """Whether an earlier run has finished this part."""

    @abstractmethod
    def read_part(self, name: str) -> dict[str, Tensor]:
        """What a finished part put, by name."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...


class PartWriter(ABC):
    """One part of an overlay, usually one layer."""

    @abstractmethod
    def put(self, name: str, tensor: Tensor) -> None:
        """`name` now holds `tensor`, whether the parent has such a name or not."""

    @abstractmethod
    def rename(self, name: str, parent_name: str) -> None:
        """`name` now holds what the parent calls `parent_name`; no bytes are copied."""

    @abstractmethod
    def drop(self, name: str, reason: str) -> None:
        """The parent's `name` is gone. The reason is shown by `verify`: every source tensor is accounted for."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Calibration statistics of one MoE layer. Which statistics exist: `engine.collectors.CATALOGUE`."""

    tokens: int
    """T: tokens that went through the layer, padding not counted."""
    count_E: Tensor
    """int64 [E] tokens routed to each expert"""
    gate_sum_E: Tensor
    """float64 [E] sum of the weights the model really multiplied with, over those tokens"""
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """A statistic by its catalogue name; MoecliError when it was not collected."""
        if name == "count":
            return self.count_E
        if name == "gate_sum":
            return self.gate_sum_E
        try:
            return self.extra[name]
        except KeyError:
            raise MoecliError(
                f"statistic `{name}` was not collected",
                hint=f"add `{name}` to `statistics` of the calibrate stage, or leave that option out",
            ) from None


class _PerLayer(Mapping[int, V]):
    """Mapping layer index -> value, in ascending order of layers."""

    def __init__(self, layers: Mapping[int, V]) -> None:
        self._layers = dict(sorted(layers.items()))

    def __getitem__(self, layer: int) -> V:
        return self._layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class CalibrationText(Artifact):
    """Token samples of equal length, for stages that run text through a model themselves. N samples, S tokens."""

    def __init__(self, ids: Tensor, mask: Tensor, digest: str) -> None:
        self.ids = ids
        """int64 [N, S]"""
        self.mask = mask
        """int64 [N, S], 0 on padding"""
        self.digest = digest
        """sha256 of ids and mask: equal digests, equal calibration"""

    def pack(self) -> Packed:
        return Packed({"text.ids": self.ids, "text.mask": self.mask}, {"digest": self.digest})

    @classmethod
    def unpack(cls, packed: Packed) -> CalibrationText:
        tensors, meta = packed
        if "text.ids" not in tensors:
            raise MoecliError("these statistics were stored without their text", hint="calibrate again")
        return CalibrationText(tensors["text.ids"], tensors["text.mask"], meta["digest"])


class CalibrationStats(_PerLayer[LayerStats], CalibrationText):
    """{layer index: LayerStats}, one entry for each MoE layer, plus how they came about (`source`).

    They carry the text they were made from, so a stage that wants `CalibrationText` takes statistics too. Statistics
    that were merged have no text of their own.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerStats],
        source: Mapping[str, Any] | None = None,
        text: CalibrationText | None = None,
    ) -> None:
        super().__init__(layers)
        self.source = dict(source or {})
        """Data set, samples, tokens, seed and dtype, for the report and the model card."""
        self.text = text
        if text is not None:
            CalibrationText.__init__(self, text.ids, text.mask, text.digest)

    def pack(self) -> Packed:
        tensors, meta = self.text.pack() if self.text is not None else Packed({}, {})
        for layer, stats in self.items():
            tensors |= {f"{layer}.count": stats.count_E, f"{layer}.gate_sum": stats.gate_sum_E}
            tensors |= {f"{layer}.extra.{name}": value for name, value in stats.extra.items()}
        about = {"source": self.source, "tokens": {str(i): s.tokens for i, s in self.items()}}
        return Packed(tensors, meta | about)

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        tensors, meta = packed
        layers = {}
        for key, tokens in meta["tokens"].items():
            prefix = f"{key}.extra."
            extra = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            layers[int(key)] = LayerStats(tokens, tensors[f"{key}.count"], tensors[f"{key}.gate_sum"], extra)
        return cls(layers, meta["source"], CalibrationText.unpack(packed) if "text.ids" in tensors else None)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What becomes of the experts of one layer. Pruning is the case where every group has one member."""

    group_E: Tensor
    """int64 [E] new index of each old expert, or DROPPED"""
    share_E: Tensor
    """float32 [E] weight inside its group; each group sums to 1, dropped experts have 0"""
    lead_K: Tensor
    """int64 [K] the old expert that stands for each group (its router row survives `row_drop`)"""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """For the report, such as the dendrogram's `linkage` [E-1, 4]."""

    def __post_init__(self) -> None:
        group, lead = self.group_E.tolist(), self.lead_K.tolist()
        groups = len(lead)
        if sorted(set(group) - {DROPPED}) != list(range(groups)):
            raise ValueError(f"group_E must use every group 0..{groups - 1}, got {sorted(set(group))}")
        if any(group[expert] != index for index, expert in enumerate(lead)):
            raise ValueError("each lead must be a member of its own group")
        sums = [0.0] * groups
        for index, share in zip(group, self.share_E.tolist(), strict=True):
            if index == DROPPED and share != 0:
                raise ValueError("a dropped expert must have share 0")
            if index != DROPPED:
                sums[index] += share
        if any(abs(total - 1) > 1e-4 for total in sums):
            raise ValueError(f"shares of a group must sum to 1, got {sums}")

    @property
    def experts(self) -> int:
        """K: experts left"""
        return len(self.lead_K)

    def members(self, group: int) -> list[int]:
        """Old experts of a group, ascending."""
        return [expert for expert, index in enumerate(self.group_E.tolist()) if index == group]


class ExpertPlan(_PerLayer[LayerPlan], Artifact):
    """{layer index: LayerPlan}"""

    def pack(self) -> Packed:
        tensors: dict[str, Tensor] = {}
        for layer, plan in self.items():
            tensors |= {
                f"{layer}.group": plan.group_E,
                f"{layer}.share": plan.share_E,
                f"{layer}.lead": plan.lead_K,
            }
            tensors |= {f"{layer}.extra.{name}": value for name, value in plan.extra.items()}
        return Packed(tensors, {"layers": list(self)})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        tensors, meta = packed
        layers = {}
        for layer in meta["layers"]:
            prefix = f"{layer}.extra."
            extra = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            layers[layer] = LayerPlan(
                tensors[f"{layer}.group"], tensors[f"{layer}.share"], tensors[f"{layer}.lead"], extra
            )
        return cls(layers)


class BitPlan(_PerLayer["Tensor"], Artifact):
    """{layer index: bits_E2}, an entry for each MoE layer. int64 [E, 2]: bits of each routed expert's gate and up
    projections, and of its down projection.
    """

    def __init__(self, layers: Mapping[int, Tensor]) -> None:
        super().__init__(layers)
        for layer, bits_E2 in self.items():
            if bits_E2.dim() != 2 or bits_E2.shape[1] != 2 or bits_E2.is_floating_point():
                raise ValueError(f"layer {layer}: bits must be whole numbers [E, 2], got {list(bits_E2.shape)}")
            if bits_E2.min() < 1 or bits_E2.max() > 16:
                raise ValueError(f"layer {layer}: bits must lie between 1 and 16")

    def pairs(self) -> PlannedBits:
        """The same as plain numbers, as a `ModelSketch` holds them."""
        return {layer: tuple((up, down) for up, down in bits_E2.tolist()) for layer, bits_E2 in self.items()}

    def pack(self) -> Packed:
        return Packed({f"{layer}.bits": bits_E2 for layer, bits_E2 in self.items()}, {"layers": list(self)})

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        return cls({layer: packed.tensors[f"{layer}.bits"] for layer in packed.meta["layers"]})


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of an evaluation. `stderr` is None where no honest estimate exists."""

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    higher_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One metric on each document: `values`, and what they are divided by together (1 each when empty).

    `mean`: sum(values) / sum(weights), such as 0 and 1 for right and wrong. `perplexity` and `bits`: values are
    log-likelihoods in nats, weights words, bytes or tokens; exp(-that ratio), and that ratio as positive bits.
    """

    form: Literal["mean", "perplexity", "bits"]
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()

    def total(self) -> float:
        """The metric over all documents."""
        ratio = math.fsum(self.values) / (math.fsum(self.weights) if self.weights else len(self.values))
        return ratio if self.form == "mean" else math.exp(-ratio) if self.form == "perplexity" else -ratio / math.log(2)


@dataclass(frozen=True, slots=True)
class Items:
    """Outcomes of one task document by document: what a paired comparison needs."""

    task: str
    docs: tuple[str, ...]
    """Which document, `id:digest`."""
    prompts: tuple[str, ...]
    """Digest of what was asked about it and of the expected answer."""
    columns: Mapping[str, Column]
    """By metric; a metric that is no function of such items has none."""
    members: tuple[str, ...] = ()
    """For a group: the tasks it pools, in place of documents of its own."""


@dataclass(frozen=True)
class Evaluation(Artifact):
    """What an `eval/...` stage measured, with the settings that must agree before two runs are compared."""

    FORMAT: ClassVar[int] = 2
    """Raised when an older reader could misread a newer evaluation."""

    metrics: tuple[Metric, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides the numbers besides the model. Under `tasks`: what holds for one task only. Under `environment`:
    what should agree and need not."""
    files: Mapping[str, str] = field(default_factory=dict)
    """File name -> text, stored untouched beside the report (lm-eval's own results)."""
    items: tuple[Items, ...] = ()
    """Documents, for paired comparison; none where a stage has no documents."""
    source: Evaluation | None = None
    """The same of the source model, where the stage measures both at once."""

    def pack(self) -> Packed:
        return Packed({}, {
            "format": self.FORMAT, "metrics": [asdict(metric) for metric in self.metrics],
            "settings": dict(self.settings), "files": dict(self.files), "items": [asdict(item) for item in self.items],
            "source": self.source and self.source.pack().meta,
        })  # fmt: skip

    @classmethod
    def unpack(cls, packed: Packed) -> Self:
        meta = packed.meta
        if meta.get("format", 1) > cls.FORMAT:
            raise SurroundingsError(
                f"this evaluation has format {meta['format']}, this moecli reads up to {cls.FORMAT}",
                hint="`pip install --upgrade moecli`",
            )
        metrics = tuple(Metric(**metric) for metric in meta["metrics"])
        source = cls.unpack(Packed({}, meta["source"])) if meta.get("source") else None
        return cls(metrics, meta["settings"], meta["files"], tuple(map(_items, meta.get("items", ()))), source)


def _items(meta: Mapping[str, Any]) -> Items:
    columns = {
        name: Column(column["form"], tuple(column["values"]), tuple(column["weights"]))
        for name, column in meta["columns"].items()
    }
    return Items(meta["task"], tuple(meta["docs"]), tuple(meta["prompts"]), columns, tuple(meta["members"]))
