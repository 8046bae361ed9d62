"""Everything a stage may reach besides its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from moecli.core.artifacts import Artifact, Checkpoint, CheckpointWriter

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
A = TypeVar("A", bound=Artifact)


class Context(Protocol):
    """Handed to a stage function by the runner."""

    device: torch.device
    rng: torch.Generator
    """CPU generator seeded from the recipe's seed and the stage's key."""
    seed: int
    """The recipe's seed, for libraries that want a number."""
    input_keys: Mapping[str, str]
    """Input name -> key of the artifact it holds, for the keys of shared parts."""

    def part(self, name: str, kind: type[A], make: Callable[[], A]) -> A:
        """The finished part `name` of this stage, made now if it is not there: parts survive a crash."""
        ...

    def has_part(self, name: str) -> bool: ...

    def shared_part(self, key: str, kind: type[A], make: Callable[[], A]) -> A:
        """Like `part`, for what stages under other keys use too: `key` names everything it depends on."""
        ...

    def has_shared_part(self, key: str) -> bool: ...

    def track(self, items: Sequence[T], label: str) -> Iterator[T]:
        """Iterate with progress and ETA."""
        ...

    def progress(self, label: str, done: int, total: int) -> None:
        """Progress of work that is no loop of ours; `done` of `total`."""
        ...

    def note(self, text: str) -> None:
        """A line in the report: a decision taken for the user, a fallback, an approximation."""
        ...

    def record(self, name: str, value: Any) -> None:
        """JSON data for the report's figures, such as `kept`: {layer: [old expert ids]}."""
        ...

    def writer(self, parent: Checkpoint, config: Mapping[str, Any] | None = None) -> CheckpointWriter:
        """Changes over `parent` inside this stage's folder; `config` replaces the parent's."""
        ...
