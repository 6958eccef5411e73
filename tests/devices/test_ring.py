from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from devices.errors import CameraError
from devices.frame import Frame
from devices.ring import (
    HEADER_BYTES,
    MAX_RING_BYTES,
    MAX_SLOTS,
    MIN_SLOTS,
    SPARE_SLOTS,
    RingReader,
    RingWriter,
    slots_of,
)

SLOTS = MAX_SLOTS  # of pictures as small as these


@pytest.fixture
def ring() -> Iterator[tuple[RingWriter, RingReader]]:
    reader = RingReader()
    yield RingWriter(reader.files), reader
    reader.close()


def picture(level: int) -> np.ndarray:
    return np.full((6, 8, 3), level, np.uint8)


def send(ring: tuple[RingWriter, RingReader], level: int) -> int:
    """The number of the slot."""
    writer, reader = ring
    assert writer.acquire(0.0)
    slot_bytes = writer.allocate(picture(level))
    if slot_bytes is not None:
        reader.attach(slot_bytes)
    return writer.write(Frame(picture(level), level, 0.5 * level), level + 100)


def sent(ring: tuple[RingWriter, RingReader], level: int) -> np.ndarray:
    """The picture as it came out."""
    return ring[1].read(send(ring, level)).frame.image


def test_pictures_come_out_as_they_went_in_and_in_order(ring: tuple[RingWriter, RingReader]) -> None:
    for level in range(3 * SLOTS):
        slot = ring[1].read(send(ring, level))
        assert (slot.frame.index, slot.frame.mono_s, slot.trigger_id) == (level, 0.5 * level, level + 100)
        assert np.array_equal(slot.frame.image, picture(level))


def test_a_picture_is_not_copied_out_of_its_slot(ring: tuple[RingWriter, RingReader]) -> None:
    image = sent(ring, 1)
    assert ring[1].lent == 1 and not image.flags.owndata and image.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        image[0, 0, 0] = 5


def test_pictures_that_are_kept_stay_as_they_are_however_many_come_after_them(
    ring: tuple[RingWriter, RingReader],
) -> None:
    kept = [sent(ring, level) for level in range(5 * SLOTS)]  # never let go: the writer finds a free slot all the same
    assert all(np.array_equal(image, picture(level)) for level, image in enumerate(kept))
    assert ring[1].lent == SLOTS - SPARE_SLOTS and not kept[-1].flags.writeable


def test_a_slot_is_free_when_the_last_who_looks_at_its_picture_lets_go(ring: tuple[RingWriter, RingReader]) -> None:
    image = sent(ring, 7)
    corner = image[2:4, 3:5]
    del image
    assert ring[1].lent == 1
    for level in range(2 * SLOTS):
        sent(ring, level)
    assert np.array_equal(corner, picture(7)[2:4, 3:5])
    del corner
    assert ring[1].lent == 0


def test_pictures_let_go_in_any_order_and_by_several_threads_give_every_slot_back(
    ring: tuple[RingWriter, RingReader],
) -> None:
    for _ in range(50):
        kept = [sent(ring, level) for level in range(SLOTS - SPARE_SLOTS)]
        threads = [threading.Thread(target=kept.pop, args=(at,)) for at in (2, 0, -1, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept.clear()
        assert ring[1].lent == 0
    assert [ring[0].acquire(0.0) for _ in range(SLOTS + 1)] == [True] * SLOTS + [False]


def test_a_picture_in_a_cycle_gives_its_slot_back_when_the_garbage_is_collected(
    ring: tuple[RingWriter, RingReader],
) -> None:
    cycle: list[object] = [sent(ring, 1)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert ring[1].lent == 0


def test_a_picture_outlives_the_ring(ring: tuple[RingWriter, RingReader]) -> None:
    image = sent(ring, 9)
    ring[1].close()
    assert np.array_equal(image, picture(9))
    del image  # tells nobody: the files are closed, and their numbers may be others' by now


def test_opencv_reads_a_picture_in_its_slot(ring: tuple[RingWriter, RingReader]) -> None:
    image = sent(ring, 3)
    assert np.array_equal(cv2.resize(image, (4, 3)), np.full((3, 4, 3), 3))
    assert np.array_equal(cv2.imdecode(cv2.imencode(".png", image)[1], cv2.IMREAD_COLOR), picture(3))


def test_a_writer_without_a_credit_has_to_wait(ring: tuple[RingWriter, RingReader]) -> None:
    slots = [send(ring, level) for level in range(SLOTS)]
    assert sorted(slots) == list(range(SLOTS)) and not ring[0].acquire(0.0)
    ring[1].read(slots[0])
    assert ring[0].acquire(0.0) and not ring[0].acquire(0.01)


def test_large_pictures_get_fewer_slots() -> None:
    assert slots_of(602_112 + 4096) == MAX_SLOTS
    assert slots_of(4096 * 3072 * 3) == MIN_SLOTS  # 38 MB each
    assert slots_of(MAX_RING_BYTES // 6) == 6


def test_a_cut_out_is_copied_without_its_surroundings(ring: tuple[RingWriter, RingReader]) -> None:
    full = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    cut = full[2:10, 5:15]
    ring[0].acquire(None)
    ring[1].attach(ring[0].allocate(cut) or 0)
    slot = ring[0].write(Frame(cut, 0, 0.0), 1)
    assert np.array_equal(ring[1].read(slot).frame.image, cut)


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
    slot = send(ring, 1)
    kept = ring[1].read(slot)
    with pytest.raises(CameraError, match=r"C-CRASH .* slot 0, which is none or not free"):
        ring[1].read(slot)  # somebody looks at it
    with pytest.raises(CameraError, match=r"C-CRASH .* slot 200"):
        ring[1].read(200)
    del kept
    with pytest.raises(CameraError, match=r"C-CRASH .* wrote picture 1, expected 2"):
        ring[1].read(slot)
    with pytest.raises(CameraError, match="before its memory"):
        RingReader().read(0)


def test_memory_of_another_size_than_announced_is_refused(ring: tuple[RingWriter, RingReader]) -> None:
    ring[0].allocate(picture(0))
    with pytest.raises(CameraError, match="in memory of another size"):
        ring[1].attach(HEADER_BYTES * 3)
