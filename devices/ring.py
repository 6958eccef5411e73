"""Pictures from a camera process to the line: slots in shared memory that have no name and end with the two processes.

    child: acquire a credit -> write a free slot -> tell the parent its number
    parent: read: a picture that lies in the slot itself -> whoever has it lets go of it -> the slot is free, its credit goes back

A picture is copied once, into its slot. A parent that keeps many gets copies instead, so that the camera always finds a free slot.
An eventfd counts the free slots, a byte per slot, which the parent clears, says which they are. The memory is a memfd, inherited by
number: nothing in /dev/shm stays behind after a kill -9. Its first page holds counters, which are exact even when the child is killed,
and those bytes; behind it are the slots, whose size the child chooses when it has seen a frame.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
import threading
import weakref
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from devices.errors import CameraError
from devices.frame import Frame

HEADER = struct.Struct("<QQQdII")  # sequence, frame index, trigger id, capture time, height, width
HEADER_BYTES = 64
COUNTERS = struct.Struct("<QQ")  # frames read, shots skipped
TAKEN_AT = 64  # in the first page: a byte per slot, 1 from when the child takes it until the parent is done with it
PAGE_BYTES = mmap.PAGESIZE
MIN_SLOTS, MAX_SLOTS = 4, 8
MAX_RING_BYTES = 64 << 20  # large pictures get fewer slots; one that was never used takes no memory
SPARE_SLOTS = 2  # that are never lent: one that is written, one that is copied out


def slots_of(slot_bytes: int) -> int:
    """How many slots of this size there are; both ends compute it."""
    return max(MIN_SLOTS, min(MAX_SLOTS, MAX_RING_BYTES // max(1, slot_bytes)))


@dataclass(frozen=True)
class Slot:
    """What a slot holds, beside the pixels."""

    frame: Frame
    trigger_id: int


@dataclass(frozen=True)
class RingFiles:
    """The two file descriptors that a camera process inherits."""

    memory: int
    credits: int

    @classmethod
    def create(cls) -> RingFiles:
        """New ones, empty; every slot is free."""
        memory = os.memfd_create("camera-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(memory, PAGE_BYTES)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)  # pulled away, it would crash whoever reads
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE
            return cls(memory, os.eventfd(MIN_SLOTS, flags))
        except OSError:
            os.close(memory)
            raise

    def close(self) -> None:
        """Closes both."""
        os.close(self.memory)
        os.close(self.credits)


class RingWriter:
    """The child's end."""

    def __init__(self, files: RingFiles) -> None:
        self._files = files
        self._poll = select.poll()
        self._poll.register(files.credits, select.POLLIN)
        self._first_page = mmap.mmap(files.memory, PAGE_BYTES)
        self._map: mmap.mmap | None = None
        self._slot_bytes = self._slots = self._sequence = 0

    def count(self, frames: int, skipped: int) -> None:
        """Notes totals since the start."""
        COUNTERS.pack_into(self._first_page, 0, frames, skipped)

    def acquire(self, timeout_s: float | None) -> bool:
        """Takes a free slot; False where there is none within `timeout_s` (None: waits for one)."""
        while True:
            try:
                os.eventfd_read(self._files.credits)
            except BlockingIOError:
                if not self._poll.poll(None if timeout_s is None else 1000 * timeout_s):
                    return False
            else:
                return True

    def wake(self) -> None:
        """Ends a waiting `acquire` in another thread, which must not write then."""
        os.eventfd_write(self._files.credits, 1)

    def allocate(self, image: NDArray[np.uint8]) -> int | None:
        """Makes room for pictures of this size where there is none yet; returns the bytes of a slot if it did."""
        if self._map is not None:
            return None
        self._slot_bytes = -(-(HEADER_BYTES + image.nbytes) // PAGE_BYTES) * PAGE_BYTES
        self._slots = slots_of(self._slot_bytes)
        os.ftruncate(self._files.memory, PAGE_BYTES + self._slots * self._slot_bytes)
        self._map = mmap.mmap(self._files.memory, self._slots * self._slot_bytes, offset=PAGE_BYTES)
        os.eventfd_write(self._files.credits, self._slots - MIN_SLOTS)
        return self._slot_bytes

    def write(self, frame: Frame, trigger_id: int) -> int:
        """Copies the picture (which may be a cut-out of a larger one) into a free slot; `acquire` and `allocate` come first.

        Returns:
            The slot's number, for the parent.
        """
        if self._map is None or HEADER_BYTES + frame.image.nbytes > self._slot_bytes:
            raise CameraError("C-CHANGED", f"a picture of {frame.image.shape} does not fit the first one's room")
        slot = (
            self._first_page.find(b"\0", TAKEN_AT, TAKEN_AT + self._slots) - TAKEN_AT
        )  # the lowest: it may be in the cache
        if slot < 0:
            raise CameraError("C-CRASH", "no slot of the ring is free, though one was promised")
        self._first_page[TAKEN_AT + slot] = 1
        start = slot * self._slot_bytes
        height, width = frame.image.shape[:2]
        pixels = np.frombuffer(self._map, np.uint8, frame.image.size, start + HEADER_BYTES)
        np.copyto(pixels.reshape(frame.image.shape), frame.image)
        self._sequence += 1
        HEADER.pack_into(self._map, start, self._sequence, frame.index, trigger_id, frame.mono_s, height, width)
        return slot


class _Returns:
    """Frees slots, from whatever thread lets go of a picture last, the garbage collector's turns included: nothing here may block."""

    def __init__(self, files: RingFiles) -> None:
        self._files = files
        self._first_page: mmap.mmap | None = mmap.mmap(files.memory, PAGE_BYTES)
        self._queue: SimpleQueue[int] = SimpleQueue()
        self._lock = threading.Lock()
        self.lent: dict[int, weakref.ref[NDArray[np.uint8]]] = {}

    def lend(self, slot: int, pixels: NDArray[np.uint8]) -> None:
        """The slot is free again when nothing holds `pixels`, or an array that looks at them, any more."""
        self.lent[slot] = weakref.ref(pixels, lambda _: self.free(slot))

    def free(self, slot: int) -> None:
        """The picture in the slot is needed no more."""
        self._queue.put(slot)
        # Who finds the lock taken may leave: the holder looks again after letting go of it.
        while not self._queue.empty() and self._lock.acquire(blocking=False):
            try:
                while not self._queue.empty():
                    self._free(self._queue.get())
            finally:
                self._lock.release()

    def _free(self, slot: int) -> None:
        self.lent.pop(slot, None)
        if self._first_page is not None:
            self._first_page[TAKEN_AT + slot] = 0
            os.eventfd_write(self._files.credits, 1)

    def close(self) -> None:
        """Pictures that are still looked at are freed later, and nobody is told."""
        with self._lock:
            if self._first_page is not None:
                self._first_page = None
                self._files.close()


class RingReader:
    """The parent's end; it owns the files."""

    def __init__(self) -> None:
        self.files = RingFiles.create()
        self._counters = mmap.mmap(self.files.memory, PAGE_BYTES, prot=mmap.PROT_READ)
        self._returns = _Returns(self.files)
        self._map: mmap.mmap | None = None
        self._slot_bytes = self._slots = self._sequence = 0

    def attach(self, slot_bytes: int) -> None:
        """Maps the memory whose size the child has set."""
        fcntl.fcntl(self.files.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        slots = slots_of(slot_bytes)
        if os.fstat(self.files.memory).st_size != PAGE_BYTES + slots * slot_bytes or slot_bytes <= HEADER_BYTES:
            raise CameraError(
                "C-CRASH", f"the camera process gives slots of {slot_bytes} bytes in memory of another size"
            )
        self._map = mmap.mmap(self.files.memory, slots * slot_bytes, prot=mmap.PROT_READ, offset=PAGE_BYTES)
        self._slot_bytes, self._slots = slot_bytes, slots

    @property
    def lent(self) -> int:
        """Pictures of this ring that somebody looks at."""
        return len(self._returns.lent)

    def counts(self) -> tuple[int, int]:
        """(frames read, shots skipped) since the child's start."""
        frames, skipped = COUNTERS.unpack_from(self._counters)
        return frames, skipped

    def read(self, slot: int) -> Slot:
        """The picture in a slot that the child announced: read-only, in the ring itself; where too many are kept already, a copy.

        It stays as it is for as long as anybody holds it, also after the child's end and `close`.

        Raises:
            CameraError: C-CRASH where the slot does not hold what comes next; a camera process that does so is not to be trusted.
        """
        if self._map is None:
            raise CameraError("C-CRASH", "the camera process announces a picture before its memory")
        if not 0 <= slot < self._slots or slot in self._returns.lent:
            raise CameraError(
                "C-CRASH", f"the camera process announces a picture in slot {slot}, which is none or not free"
            )
        start = slot * self._slot_bytes
        self._sequence += 1
        sequence, index, trigger_id, mono_s, height, width = HEADER.unpack_from(self._map, start)
        size = height * width * 3
        if sequence != self._sequence or HEADER_BYTES + size > self._slot_bytes:
            raise CameraError("C-CRASH", f"the camera process wrote picture {sequence}, expected {self._sequence}")
        pixels = np.frombuffer(self._map, np.uint8, size, start + HEADER_BYTES)
        if self.lent < self._slots - SPARE_SLOTS:
            self._returns.lend(slot, pixels)
        else:
            pixels = pixels.copy()
            pixels.flags.writeable = False
            self._returns.free(slot)
        return Slot(Frame(pixels.reshape(height, width, 3), index, mono_s), trigger_id)

    def close(self) -> None:
        """Gives the memory back, once the last picture in it is let go."""
        self._map = None
        self._counters.close()
        self._returns.close()
