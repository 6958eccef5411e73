from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from devices.errors import CameraError
from devices.frame import Frame
from devices.ring import HEADER_BYTES, SLOTS, RingReader, RingWriter


@pytest.fixture
def ring() -> Iterator[tuple[RingWriter, RingReader]]:
    reader = RingReader()
    yield RingWriter(reader.files), reader
    reader.close()


def picture(level: int) -> np.ndarray:
    return np.full((6, 8, 3), level, np.uint8)


def send(ring: tuple[RingWriter, RingReader], level: int) -> None:
    writer, reader = ring
    assert writer.acquire(None)
    slot_bytes = writer.allocate(picture(level))
    if slot_bytes is not None:
        reader.attach(slot_bytes)
    writer.write(Frame(picture(level), level, 0.5 * level), level + 100)


def test_pictures_come_out_as_they_went_in_and_in_order(ring: tuple[RingWriter, RingReader]) -> None:
    for level in range(3 * SLOTS):
        send(ring, level)
        slot = ring[1].read()
        assert (slot.frame.index, slot.frame.mono_s, slot.trigger_id) == (level, 0.5 * level, level + 100)
        assert np.array_equal(slot.frame.image, picture(level))


def test_a_picture_that_was_read_is_the_readers_own(ring: tuple[RingWriter, RingReader]) -> None:
    send(ring, 1)
    kept = ring[1].read().frame.image
    for level in range(2, 2 + SLOTS):
        send(ring, level)
    assert np.array_equal(kept, picture(1))


def test_a_writer_without_a_credit_has_to_wait(ring: tuple[RingWriter, RingReader]) -> None:
    for level in range(SLOTS):
        send(ring, level)
    assert not ring[0].acquire(0.0)
    ring[1].read()
    assert ring[0].acquire(0.0) and not ring[0].acquire(0.01)


def test_a_cut_out_is_copied_without_its_surroundings(ring: tuple[RingWriter, RingReader]) -> None:
    full = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    cut = full[2:10, 5:15]
    ring[0].acquire(None)
    ring[1].attach(ring[0].allocate(cut) or 0)
    ring[0].write(Frame(cut, 0, 0.0), 1)
    assert np.array_equal(ring[1].read().frame.image, cut)


def test_a_picture_that_is_larger_than_the_first_is_refused(ring: tuple[RingWriter, RingReader]) -> None:
    send(ring, 1)
    with pytest.raises(CameraError, match="C-CHANGED"):
        ring[0].write(Frame(np.zeros((900, 900, 3), np.uint8), 0, 0.0), 2)


def test_a_camera_process_cannot_pull_the_memory_away_from_its_reader(ring: tuple[RingWriter, RingReader]) -> None:
    send(ring, 1)
    with pytest.raises(PermissionError):
        os.ftruncate(ring[1].files.memory, 0)


def test_an_announced_picture_that_is_not_there_is_the_camera_processs_fault(
    ring: tuple[RingWriter, RingReader],
) -> None:
    send(ring, 1)
    ring[1].read()
    with pytest.raises(CameraError, match=r"C-CRASH .* wrote picture 0, expected 2"):
        ring[1].read()
    with pytest.raises(CameraError, match="before its memory"):
        RingReader().read()


def test_memory_of_another_size_than_announced_is_refused(ring: tuple[RingWriter, RingReader]) -> None:
    ring[0].allocate(picture(0))
    with pytest.raises(CameraError, match="in memory of another size"):
        ring[1].attach(HEADER_BYTES * 3)
