"""The processes of one training run: which samples are whose, and how what they find is put together.

`torchrun -m trainer fit` starts them; alone, every function here is the identity. Sample i belongs to rank i mod R, whatever the step, so R
processes see the same batches as one: each passes its own samples through the encoder, and `assemble` gives all of them the rows of
the whole batch. Everything behind that (loss, centroids, target distribution, k-means) is the same computation everywhere, and the
methods know nothing of ranks.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import io
import os
import pickle
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from trainer.errors import DataError, TrainerError

T = TypeVar("T")
# torchrun ends the others when a process dies; what may take hours is the first one's work, while the others wait.
TIMEOUT = datetime.timedelta(hours=12)
ASK_AGAIN_S = 0.1


@dataclass(frozen=True)
class Ranks:
    """`index` of `count` processes; `local_index` of `local_count` on this machine, which is number `machine`."""

    index: int = 0
    count: int = 1
    local_index: int = 0
    local_count: int = 1
    machine: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run folder and talks to the user."""
        return self.index == 0

    @property
    def are_many(self) -> bool:
        """Whether there is anything to put together."""
        return self.count > 1

    def own(self, index: Tensor) -> Tensor:
        """Which of samples `index` (B,) are this process's: positions (b,) in `index`."""
        return torch.nonzero(index % self.count == self.index)[:, 0]

    def part(self, n: int) -> slice:
        """This process's share of n rows that all have, as one piece."""
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    def join(self, rows: Tensor, n: int) -> Tensor:
        """(n, ...) on every process, from the rows of each one's `part(n)`."""
        part = self.part(n)
        return self.assemble(rows, torch.arange(part.start, part.stop, device=rows.device), n)

    def assemble(self, rows: Tensor, positions: Tensor, n: int) -> Tensor:
        """(n, ...) on every process, from rows (b, ...) at `positions` (b,) of each; gradients go back to the rows' own process.

        The loss that follows is computed by every process from all rows, so the gradient of its own rows is already whole.
        """
        if not self.are_many:
            return rows
        whole: Tensor = _Assemble.apply(rows, positions, n)
        return whole

    def total(self, x: Tensor) -> Tensor:
        """Sum of `x` over all processes, in place."""
        if self.are_many:
            distributed.all_reduce(x)
        return x

    def total_gradients(self, parameters: Sequence[Tensor], flag: bool = False) -> bool:
        """Sums the gradients of `parameters` over all processes, in one message; a parameter that no process has moved stays without.

        Returns:
            Whether `flag` was set anywhere.
        """
        if not self.are_many:
            return flag
        if not parameters:
            return bool(self.total(torch.tensor([float(flag)]))[0])
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        head = parts[0].new_tensor([float(flag), *(float(p.grad is not None) for p in parameters)])
        flat = self.total(torch.cat([head, *(part.flatten() for part in parts)]))
        found = flat[: len(head)].tolist()
        pieces = flat[len(head) :].split([part.numel() for part in parts])
        for p, piece, moved in zip(parameters, pieces, found[1:], strict=True):
            p.grad = piece.view_as(p) if moved else None
        return found[0] > 0

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Writes the first process's values into `tensors` of all."""
        if self.are_many:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def same(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first process, on all of them; its error is everybody's. Inside `make` that process counts as alone.

        Tensors that lie on its GPU arrive on the GPU of each.
        """
        if not self.are_many:
            return make()
        if self.is_first:
            with alone():
                try:
                    made = make()
                except Exception as error:
                    self._broadcast(_packed((False, _portable(error))))
                    raise
            self._broadcast(_packed((True, made)))
            return made
        has_made, found = _unpacked(self._broadcast(b""))
        if not has_made:
            raise found
        heard: T = found
        return heard

    def _broadcast(self, content: bytes) -> bytes:
        box: list[Any] = [content]
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        heard: bytes = box[0]
        return heard

    def gather(self, value: T) -> list[T]:
        """The `value` of every process, on all of them."""
        if not self.are_many:
            return [value]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, value)
        return found

    def check_same(self, what: str, value: str) -> None:
        """Refuses a `value` (a digest, a version) that is not the same on all processes.

        Raises:
            DataError: so it is; the text names the first rank that differs.
        """
        found = self.gather(value)
        for n, other in enumerate(found):
            if other != found[0]:
                raise DataError(
                    f"{what} differs between processes: rank 0 has {found[0]}, rank {n} has {other}; "
                    f"give every machine the same files and settings"
                )

    def wait(self) -> None:
        """Until all processes are here."""
        if self.are_many:
            distributed.barrier()


ALONE = Ranks()
_current: contextvars.ContextVar[Ranks] = contextvars.ContextVar("ranks", default=ALONE)


def current() -> Ranks:
    """The processes that this one works with now."""
    return _current.get()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What runs in here is done by this process for itself."""
    token = _current.set(ALONE)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, for as long as the block runs; alone where it has not.

    Raises:
        DataError: this PyTorch was built without what that needs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or current().are_many:
        yield current()
        return
    if not distributed.is_available():
        raise DataError("this PyTorch was built without torch.distributed; start one process, without torchrun")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():  # predict may share a GPU between processes, and fit may be told to leave it alone
        torch.cuda.set_device(local % torch.cuda.device_count())
    store, index, _ = next(distributed.rendezvous("env://", timeout=TIMEOUT))
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=distributed.PrefixStore(_meet(store, index, count), store),
        rank=index,
        world_size=count,
        timeout=TIMEOUT,
    )
    found = Ranks(
        distributed.get_rank(),
        distributed.get_world_size(),
        local,
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        int(os.environ.get("GROUP_RANK", "0")),
    )
    token = _current.set(found)
    try:
        yield found
    except RuntimeError as error:
        if _is_of_a_lost_process(error):
            raise TrainerError(
                f"rank {found.index} has lost another process of this run, which says itself why, or was killed; "
                f"torchrun's --max-restarts starts all of them anew from the last checkpoint"
            ) from error
        raise
    finally:
        _current.reset(token)
        distributed.destroy_process_group()


def _is_of_a_lost_process(error: RuntimeError) -> bool:
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


def _meet(store: distributed.Store, index: int, count: int) -> str:
    """A word that only the processes that are there now have agreed on.

    torchrun may keep one store over restarts (torch 2.13 does): addresses of processes that have died would be found in it.
    Each process asks with a word of its own, until the first one has answered it and heard back from all.
    """
    if index:
        asked = uuid.uuid4().hex
        store.set(f"asks-{index}", asked)
        word = store.get(f"answer-{asked}").decode()
        store.set(f"heard-{word}-{index}", "")
        return word
    word = uuid.uuid4().hex
    heard = [f"heard-{word}-{n}" for n in range(1, count)]
    while not store.check(heard):
        for n in range(1, count):
            if store.check([f"asks-{n}"]):
                store.set(f"answer-{store.get(f'asks-{n}').decode()}", word)
        time.sleep(ASK_AGAIN_S)  # store.wait says on stderr each time that it has waited in vain
    return word


def is_restarted() -> bool:
    """Whether torchrun has started this process anew after one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class _Assemble(torch.autograd.Function):
    """Rows of all processes, put where they belong: zeros elsewhere, then a sum, which is exact."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, positions: Tensor, n: int) -> Tensor:
        ctx.save_for_backward(positions)
        whole = rows.new_zeros((n, *rows.shape[1:]))
        whole[positions] = rows
        distributed.all_reduce(whole)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (positions,) = ctx.saved_tensors
        return gradients[0][positions], None, None


def _packed(what: object) -> bytes:
    content = io.BytesIO()
    torch.save(what, content)
    return content.getvalue()


def _unpacked(content: bytes) -> Any:
    """What the first process of this very run has packed; nothing else comes here."""

    def here(storage: Any, location: str) -> Any:
        return storage.cuda() if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(content), map_location=here, weights_only=False)


def _portable(error: Exception) -> Exception:
    """The error itself where it can be sent, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 (whatever keeps it from being sent)
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
