"""Pictures from a camera process to the line: slots in shared memory that have no name and end with the two processes.

    child: acquire a credit -> write the slot -> tell the parent          parent: read (one copy) -> give the credit back

Slots are used in order, so a credit is all that travels back: an eventfd counts the free ones. The memory is a memfd, inherited by
number: nothing in /dev/shm stays behind after a kill -9. Its first page holds counters, which are exact even when the child is killed;
behind it are the slots, whose size the child chooses when it has seen a frame.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devices.errors import CameraError
from devices.frame import Frame

HEADER = struct.Struct("<QQQdII")  # sequence, frame index, trigger id, capture time, height, width
HEADER_BYTES = 64
COUNTERS = struct.Struct("<QQ")  # frames read, shots skipped
PAGE_BYTES = mmap.PAGESIZE
SLOTS = 4  # one that is read, one that is written, two for a reader that was held up


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
            return cls(memory, os.eventfd(SLOTS, flags))
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
        self._counters = mmap.mmap(files.memory, PAGE_BYTES)
        self._map: mmap.mmap | None = None
        self._slot_bytes = self._sequence = 0

    def count(self, frames: int, skipped: int) -> None:
        """Notes totals since the start."""
        COUNTERS.pack_into(self._counters, 0, frames, skipped)

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
        os.ftruncate(self._files.memory, PAGE_BYTES + SLOTS * self._slot_bytes)
        self._map = mmap.mmap(self._files.memory, SLOTS * self._slot_bytes, offset=PAGE_BYTES)
        return self._slot_bytes

    def write(self, frame: Frame, trigger_id: int) -> None:
        """Copies the picture (which may be a cut-out of a larger one) into the next slot; `acquire` and `allocate` come first."""
        if self._map is None or HEADER_BYTES + frame.image.nbytes > self._slot_bytes:
            raise CameraError("C-CHANGED", f"a picture of {frame.image.shape} does not fit the first one's room")
        start = (self._sequence % SLOTS) * self._slot_bytes
        height, width = frame.image.shape[:2]
        pixels = np.frombuffer(self._map, np.uint8, frame.image.size, start + HEADER_BYTES)
        np.copyto(pixels.reshape(frame.image.shape), frame.image)
        self._sequence += 1
        HEADER.pack_into(self._map, start, self._sequence, frame.index, trigger_id, frame.mono_s, height, width)


class RingReader:
    """The parent's end; it owns the files."""

    def __init__(self) -> None:
        self.files = RingFiles.create()
        self._counters = mmap.mmap(self.files.memory, PAGE_BYTES, prot=mmap.PROT_READ)
        self._map: mmap.mmap | None = None
        self._slot_bytes = self._sequence = 0

    def attach(self, slot_bytes: int) -> None:
        """Maps the memory whose size the child has set."""
        fcntl.fcntl(self.files.memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        if os.fstat(self.files.memory).st_size != PAGE_BYTES + SLOTS * slot_bytes or slot_bytes <= HEADER_BYTES:
            raise CameraError(
                "C-CRASH", f"the camera process gives slots of {slot_bytes} bytes in memory of another size"
            )
        self._map = mmap.mmap(self.files.memory, SLOTS * slot_bytes, prot=mmap.PROT_READ, offset=PAGE_BYTES)
        self._slot_bytes = slot_bytes

    def counts(self) -> tuple[int, int]:
        """(frames read, shots skipped) since the child's start."""
        frames, skipped = COUNTERS.unpack_from(self._counters)
        return frames, skipped

    def read(self) -> Slot:
        """Copies the next slot out and gives its credit back.

        Raises:
            CameraError: C-CRASH where the slot does not hold what comes next; a camera process that does so is not to be trusted.
        """
        if self._map is None:
            raise CameraError("C-CRASH", "the camera process announces a picture before its memory")
        start = (self._sequence % SLOTS) * self._slot_bytes
        self._sequence += 1
        sequence, index, trigger_id, mono_s, height, width = HEADER.unpack_from(self._map, start)
        size = height * width * 3
        if sequence != self._sequence or HEADER_BYTES + size > self._slot_bytes:
            raise CameraError("C-CRASH", f"the camera process wrote picture {sequence}, expected {self._sequence}")
        pixels = np.frombuffer(self._map, np.uint8, size, start + HEADER_BYTES)
        image = pixels.reshape(height, width, 3).copy()
        del pixels  # a map cannot be closed while an array looks at it
        os.eventfd_write(self.files.credits, 1)
        return Slot(Frame(image, index, mono_s), trigger_id)

    def close(self) -> None:
        """Gives the memory back."""
        if self._map is not None:
            self._map.close()
            self._map = None
        self._counters.close()
        self.files.close()
