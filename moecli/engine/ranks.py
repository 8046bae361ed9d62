"""One run in several processes: `torchrun --nproc-per-node N -m moecli run recipe.yaml`.

    with joining("cuda") as ranks:             # alone without torchrun: the same code, and nothing is sent
        text = ranks.told(tokenise)            # made by the first rank, known to all
        mine = ranks.split(batches)            # a block of its own for each rank
        ranks.combine([(total_E, "sum")])      # in place, the same on every rank
        all_of_it = ranks.gathered(mine)       # one value a rank

Only the first rank writes and speaks. The others wait for it in Python, not inside a collective: it may work for hours,
a signal is heard at once, and what stopped one rank is known to all. So waiting has no timeout of its own; an exchange
that every rank has reached has one, `EXCHANGE_TIMEOUT`, for ranks whose shares take different time.

Words at the end: a rank that fails leaves its error in the store, the first rank says it and names the rank, all others
are silent. A rank that was killed leaves nothing. The others then wait `SILENCE_S` for each other's last words, and the
first of those that are left names the ones that are silent.

Sums are exchanged in the dtype they are kept in (float64, int64): integers are those of one process, sums differ in the
order of their additions only. On CUDA the exchange goes through NCCL, elsewhere through gloo.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from functools import reduce as fold
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moecli.core.errors import ExitCode, MoecliError, SaidElsewhere, SurroundingsError
from moecli.engine.collectors import Collector, joined

T = TypeVar("T")
Reduce = Literal["sum", "max"]

EXCHANGE_TIMEOUT = timedelta(minutes=60)
SILENCE_S = 5.0
BUSY_S = 60.0
"""How long a rank that failed waits for the first one, which may be busy, to take its words."""
POLL_S = 0.05
"""Between two looks whether the first rank is ready."""
LOOK_S = 0.2
"""Between two looks, during an exchange, whether a rank has stopped."""
PLAIN: tuple[Reduce, ...] = ("sum", "max")
JOIN_BYTES = 16 << 20
"""Tensors below this size travel together."""
GO_ON = "finished parts are saved, the same command goes on from there, with any number of processes"


class Lost(RuntimeError):
    """An exchange broke off: a rank is gone, or did not come in time."""


class Ranks:
    """The processes of a run, seen from one of them. Without others nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, local_size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size, self.local_size = rank, size, local_size
        self._store, self._told = store, 0

    @property
    def leads(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def split(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's block of consecutive items; blocks differ by one item at most, the earlier are the longer."""
        start, stop = self.block(len(items))
        return items[start:stop]

    def block(self, count: int, rank: int | None = None) -> tuple[int, int]:
        """Where the block of a rank (this one) starts and stops."""
        rank, (each, more) = self.rank if rank is None else rank, divmod(count, self.size)
        start = rank * each + min(rank, more)
        return start, start + each + (rank < more)

    def told(self, make: Callable[[], T]) -> T:
        """The value that `make` gives on the first rank; the others wait for it and do not call it.

        The value travels by pickle. When `make` fails, so does the run, on every rank.
        """
        if self.size == 1:
            return make()
        self._told += 1
        key = f"told/{self._told}"
        if self.leads:
            value = make()
            packed = _packed(value)
            self._store.set(key, str(len(packed)))
        else:
            self._wait_for(key)
            packed = torch.empty(int(self._store.get(key)), dtype=torch.uint8)
        self._see_through(lambda: dist.broadcast(packed, src=0, async_op=True))
        return value if self.leads else pickle.loads(packed.numpy().tobytes())

    def gathered(self, value: T) -> list[T]:
        """Every rank's value, in order of ranks. Values travel by pickle: tensors should be on the CPU."""
        if self.size == 1:
            return [value]
        packed = _packed(value)
        sizes = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        own = torch.tensor([len(packed)])
        self._see_through(lambda: dist.all_gather(sizes, own, async_op=True))
        longest = max(int(size) for size in sizes)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        padded = torch.cat([packed, packed.new_zeros(longest - len(packed))])
        self._see_through(lambda: dist.all_gather(found, padded, async_op=True))
        return [pickle.loads(some[:size].numpy().tobytes()) for some, size in zip(found, sizes, strict=True)]

    def combine(self, tensors: Sequence[tuple[Tensor, Reduce]]) -> None:
        """Add up or maximise tensors over all ranks, in place. Every rank gives the same shapes in the same order."""
        if self.size == 1:
            return
        for reduce, some in _parcels(tensors):
            flat = some[0].view(-1) if len(some) == 1 else torch.cat([tensor.flatten() for tensor in some])
            operation = dist.ReduceOp.SUM if reduce == "sum" else dist.ReduceOp.MAX
            self._see_through(partial(dist.all_reduce, flat, operation, async_op=True))
            if len(some) > 1:
                for tensor, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def _see_through(self, begin: Callable[[], dist.Work]) -> None:
        """An exchange, waited for in Python: signals are heard, and a rank that stopped is noticed, which neither is
        inside gloo and NCCL.
        """
        try:
            work, looked = begin(), time.monotonic()
            while not work.is_completed():
                time.sleep(0.0005)
                if time.monotonic() - looked > LOOK_S:
                    self._look()
                    looked = time.monotonic()
            work.wait()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # gloo and NCCL raise nothing narrower
            raise Lost(str(error)) from error

    def _wait_for(self, key: str) -> None:
        while not self._there(key):
            self._look()
            time.sleep(POLL_S)

    def _look(self) -> None:
        if self._there("leaving"):
            raise Lost("another rank stopped")

    def _there(self, key: str) -> bool:
        try:
            return bool(self._store.check([key]))
        except RuntimeError as error:  # whoever keeps the store is gone
            raise Lost("the store is gone") from error

    # --- last words

    def last_words(self, error: BaseException) -> BaseException:
        """What this rank raises in the place of `error`, so that one rank says what happened and no other does."""
        own = isinstance(error, Exception) and not isinstance(error, Lost)
        patience = BUSY_S if own else SILENCE_S
        try:
            if own:
                self._store.compare_set("stopped", "", json.dumps({"rank": self.rank, **_said(error)}))
            self._store.set(f"gone/{self.rank}", "said")
            self._store.set("leaving", "yes")
            if own and self.leads:
                return error
            silent = self._silent(patience)
            if self._there("stopped"):
                return self._words(json.loads(self._store.get("stopped")), error, silent)
        except (Lost, RuntimeError):
            silent = [0]
        if not silent:  # all were stopped from outside
            return error if self.leads else SaidElsewhere()
        speaker = next(rank for rank in range(self.size) if rank not in silent)
        return self._missing(silent) if self.rank == speaker else SaidElsewhere()

    def _silent(self, patience_s: float) -> list[int]:
        """Ranks that say nothing in this time; once somebody said why the run ended, only the first is waited for."""
        until = time.monotonic() + patience_s
        while True:
            silent = [rank for rank in range(self.size) if not self._there(f"gone/{rank}")]
            heard = self._there("stopped") and 0 not in silent
            if not silent or heard or time.monotonic() > until:
                return silent
            time.sleep(POLL_S)

    def _words(self, said: dict[str, Any], error: BaseException, silent: Sequence[int]) -> BaseException:
        """The first rank says what another one left; that one itself, when the first is gone."""
        if not self.leads:
            return error if said["rank"] == self.rank and 0 in silent else SaidElsewhere()
        message = f"rank {said['rank']} of {self.size}: {said['message']}"
        if "trace" in said:
            return RuntimeError(f"{message}\n\n{said['trace']}")
        words = MoecliError(message, where=said["where"], hint=said["hint"] or GO_ON)
        words.code = ExitCode(said["code"])
        return words

    def _missing(self, silent: Sequence[int]) -> MoecliError:
        def named(rank: int) -> str:
            with contextlib.suppress(RuntimeError):
                if self._there(f"who/{rank}"):
                    return f"{rank} ({self._store.get(f'who/{rank}').decode()})"
            return str(rank)

        which = f"rank{'s' * (len(silent) > 1)} {', '.join(map(named, silent))}"
        word = "do" if len(silent) > 1 else "does"
        return SurroundingsError(
            f"{which} of {self.size} {word} not answer: killed, or the machine is out of memory", hint=GO_ON
        )


def _said(error: BaseException) -> dict[str, Any]:
    """What another rank needs to say it; of a bug the trace too."""
    if isinstance(error, MoecliError):
        return {"message": error.message, "where": error.where, "hint": error.hint, "code": int(error.code)}
    first = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
    return {"message": first, "trace": "".join(traceback.format_exception(error))}


ALONE = Ranks()
_current = [ALONE]


def current() -> Ranks:
    """The ranks that work together here: all of a run inside a stage that every rank runs, else this one alone."""
    return _current[-1]


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[Ranks]:
    """While this lasts, these are `current`."""
    _current.append(ranks)
    try:
        yield ranks
    finally:
        _current.pop()


@contextlib.contextmanager
def joining(device: torch.device | str) -> Iterator[Ranks]:
    """The ranks of this run, from the environment that torchrun makes; `ALONE` without it.

    SurroundingsError when this process has no GPU of its own, or when the others do not come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    ranks = _join(size, torch.device(device))
    try:
        yield ranks
        ranks.told(lambda: None)  # nobody leaves before the first rank is done
    except BaseException as error:
        try:
            words = ranks.last_words(error)
        except BaseException:  # the signal that torchrun sends to those that are left came while they listened
            words = ranks.last_words(error)
        if words is error:
            raise
        raise words from error
    dist.destroy_process_group()


def own_device(device: torch.device | str) -> torch.device:
    """The device of this process: on CUDA the GPU of its local rank. SurroundingsError when there is none left."""
    device = torch.device(device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type != "cuda" or "WORLD_SIZE" not in os.environ:
        return device
    if local >= torch.cuda.device_count():
        raise SurroundingsError(
            f"process {local + 1} of this machine has no GPU of its own, there are {torch.cuda.device_count()}",
            hint=f"`torchrun --nproc-per-node {torch.cuda.device_count()} -m moecli ...`, or `--device cpu`",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _join(size: int, device: torch.device) -> Ranks:
    rank, local_size = int(os.environ["RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=EXCHANGE_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise SurroundingsError(
            f"rank {rank} of {size} cannot join the others: {str(error).splitlines()[0]}",
            hint="`torchrun --nproc-per-node N -m moecli run RECIPE` starts all of them",
        ) from error
    words = dist.PrefixStore("moecli", store)
    words.set(f"who/{rank}", f"pid {os.getpid()} on {socket.gethostname()}")
    return Ranks(rank, size, local_size, words)


def _parcels(tensors: Sequence[tuple[Tensor, Reduce]]) -> Iterator[tuple[Reduce, list[Tensor]]]:
    """Small tensors of one kind together, large ones alone, in the same order on every rank."""
    small: dict[tuple[str, torch.dtype, str], list[Tensor]] = {}
    for tensor, reduce in tensors:
        if tensor.nbytes < JOIN_BYTES or not tensor.is_contiguous():
            small.setdefault((reduce, tensor.dtype, tensor.device.type), []).append(tensor)
        else:
            yield reduce, [tensor]
    for (reduce, _, _), some in small.items():
        yield reduce, some


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def combined(some: Sequence[Collector], ranks: Ranks, saw: bool = True) -> dict[str, Tensor]:
    """Results of collectors over the text of all ranks, by the rule of each: the same on every rank. `saw` says whether
    there was any text on this one.
    """
    ranks.combine([(collector.total, collector.reduce) for collector in some if collector.reduce in PLAIN])
    found = [collector.result() for collector in some]
    other = [i for i, collector in enumerate(some) if collector.reduce not in PLAIN]
    if other and ranks.size > 1:
        of_ranks = ranks.gathered([found[i] for i in other] if saw else None)
        for i, values in zip(other, zip(*filter(None, of_ranks), strict=True), strict=True):
            found[i] = fold(partial(joined, type(some[i])), values)
    return {name: value for values in found for name, value in values.items()}
