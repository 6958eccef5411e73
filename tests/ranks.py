"""Real processes that work together as torchrun's do, kept between tests: starting one takes as long as importing torch."""

from __future__ import annotations

import atexit
import os
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar, cast

from torch.distributed import TCPStore

T = TypeVar("T")
AFTER_A_FAILURE_S = 2.0  # the others may wait for the one that failed
_groups: dict[int, _Group] = {}


def run_on_ranks(count: int, function: Callable[..., T], *args: Any, timeout_s: float = 120.0) -> list[T]:
    """What `function(*args)` returns in each of `count` gloo processes, which have joined as ranks.current() there.

    `function`, from the top level of a module, and `args` go by pickle. The error of the lowest rank that has one is raised here.
    """
    group = _groups.pop(count, None) or _Group(count)
    try:
        results = group.run(pickle.dumps((function, args)), timeout_s)
    except BaseException:
        group.end()  # its ranks may be at different places now
        raise
    _groups[count] = group
    return results


class _Group:
    def __init__(self, count: int) -> None:
        # The parent holds the meeting point, as torchrun does: a port that is free stays this group's.
        self.store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        context = get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(index, count, self.store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: bytes, timeout_s: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send_bytes(job)
        deadline_s = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        while len(answers) + len(errors) < len(self.pipes) and time.monotonic() < deadline_s:
            for pipe in wait([p for n, p in enumerate(self.pipes) if n not in answers and n not in errors], 1.0):
                n = self.pipes.index(cast(Connection, pipe))
                good, answer = self._hear(n)
                (answers if good else errors)[n] = answer
                if not good:
                    deadline_s = min(deadline_s, time.monotonic() + AFTER_A_FAILURE_S)
        if errors:
            raise errors[min(errors)]
        if len(answers) < len(self.pipes):
            raise TimeoutError(f"only ranks {sorted(answers)} ended within {timeout_s} s")
        return [answers[n] for n in range(len(self.pipes))]

    def _hear(self, n: int) -> tuple[bool, Any]:
        try:
            good, answer = pickle.loads(self.pipes[n].recv_bytes())
        except EOFError:
            self.processes[n].join()
            return False, ChildProcessError(f"rank {n} ended, {self.processes[n].exitcode}")
        return good, answer

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()


def _serve(index: int, count: int, port: int, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(index),
        "LOCAL_RANK": str(index),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from trainer import ranks

    torch.set_num_threads(1)
    with ranks.joined():
        while True:
            function, args = pickle.loads(pipe.recv_bytes())
            try:
                answer: tuple[bool, Any] = (True, function(*args))
            except Exception as error:  # noqa: BLE001 (whatever it is belongs to the test)
                error.add_note(f"on rank {index}:\n{traceback.format_exc()}")
                answer = (False, error)
            pipe.send_bytes(pickle.dumps(answer))


@atexit.register
def _end_all() -> None:
    for group in _groups.values():
        group.end()
