from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.images import draw, write_png
from tests.waiting import wait_until
from trainer.data import load_dataset
from trainer.decoding import batches_of, decoded_images, in_order, workers_of
from trainer.errors import DataError
from trainer.images import DataSettings, open_images
from trainer.items import ImageSet, Item
from trainer.preprocess import Preprocess, PreprocessSettings

SMALL = PreprocessSettings(height_px=16, width_px=16)


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_the_order_is_that_of_the_items_whoever_is_ready_first() -> None:
    second_done = threading.Event()
    done: list[int] = []

    def work(some: list[int]) -> list[int]:
        if some == [0]:
            assert second_done.wait(20)
        done.extend(some)
        if some == [1]:
            second_done.set()
        return [n * n for n in some]

    assert list(in_order(work, range(6), workers=2, chunk=1)) == [0, 1, 4, 9, 16, 25]
    assert done.index(1) < done.index(0)
    assert not decoders()


def test_no_more_are_on_the_way_than_was_said() -> None:
    taken: list[int] = []

    def items():  # type: ignore[no-untyped-def]
        for n in range(1000):
            taken.append(n)
            yield n

    results = in_order(list, items(), workers=3, chunk=4)
    for consumed in range(1, 101):
        next(results)
        assert len(taken) <= (2 * 3 + 1) * 4 + consumed
    results.close()  # type: ignore[attr-defined]
    assert len(taken) < 150 and not decoders()


def test_an_error_in_a_worker_is_the_callers_and_ends_the_workers() -> None:
    def work(some: list[int]) -> list[int]:
        if some == [5]:
            raise MemoryError("no room")
        return some

    results = in_order(work, range(100), workers=2, chunk=1)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(MemoryError, match="no room"):
        next(results)
    assert not decoders()


def test_workers_compute_alone_and_leave_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(in_order(lambda _: [torch.get_num_threads()], range(8), workers=3, chunk=1)) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def bad_and_good(folder: Path) -> ImageSet:
    for n in range(40):
        write_png(folder / f"{n:02d}.png", draw("disc", np.random.default_rng(n), 24))
    for n in (0, 13, 14, 39):
        (folder / f"{n:02d}.png").write_bytes(b"no image")
    return open_images(DataSettings(path=str(folder)))


def test_many_workers_find_what_one_finds(tmp_path: Path) -> None:
    images = bad_and_good(tmp_path)
    one, many = (load_dataset(images, DataSettings(path=str(tmp_path), workers=n), SMALL)[0] for n in (1, 7))
    assert one.names == many.names and one.skipped == many.skipped and one.manifest_sha256 == many.manifest_sha256
    assert torch.equal(one.pixels[:], many.pixels[:]) and len(one) == 36


def test_a_stream_of_batches_holds_every_image_once_and_what_it_skipped(tmp_path: Path) -> None:
    images = bad_and_good(tmp_path)
    batches = list(batches_of(images, Preprocess(SMALL, 16, 16), 10))
    assert [len(b.positions) for b in batches] == [9, 8, 10, 9] and [len(b.skipped) for b in batches] == [1, 2, 0, 1]
    positions = [n for batch in batches for n in batch.positions]
    assert positions == [n for n in range(40) if n not in {0, 13, 14, 39}]
    whole = load_dataset(images, DataSettings(path=str(tmp_path)), SMALL)[0]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), whole.pixels[:])


def test_a_batch_without_a_readable_image_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (batch,) = batches_of(open_images(DataSettings(path=str(tmp_path))), Preprocess(SMALL, 16, 16), 4)
    assert batch.positions == [] and batch.pixels.shape == (0, 16, 16, 1) and batch.skipped[0].name == "a.png"


def test_a_stream_refuses_images_of_another_size_where_nothing_is_resized(tmp_path: Path) -> None:
    for n, side in enumerate((16, 16, 24)):
        write_png(tmp_path / f"{n}.png", draw("disc", np.random.default_rng(n), side))
    images = open_images(DataSettings(path=str(tmp_path)))
    module = Preprocess(PreprocessSettings(resize="none"), 16, 16)
    with pytest.raises(DataError, match=r"2\.png: preprocess.resize is none, but the images have 2 sizes"):
        list(batches_of(images, module, 4))
    assert not decoders()


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("resize", ["onnx", "matmul"])
def test_resized_together_is_resized_alone(tmp_path: Path, resize: str, antialias: bool) -> None:
    rng = np.random.default_rng(0)
    for n in range(30):
        side = 40 if n in {7, 8, 20} else 24
        write_png(tmp_path / f"{n:02d}.png", rng.integers(0, 256, (side, 24, 3 if n % 5 else 1), np.uint8))
    settings = SMALL.model_copy(update={"resize": resize, "antialias": antialias, "alias": "allow"})
    images = open_images(DataSettings(path=str(tmp_path)))
    module = Preprocess(settings, 16, 16)
    for found in decoded_images(images, module):
        alone = module.geometry(torch.from_numpy(found.item.read()[0])[None])[0]
        assert found.pixels is not None and torch.equal(found.pixels, alone)


def test_a_film_is_read_by_one_worker(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 30, (64, 48))
    for n in range(20):
        writer.write(np.full((48, 64, 3), 10 * n, np.uint8))
    writer.release()
    source = DataSettings(path=str(path), every=3, workers=8)
    images = open_images(source)
    assert workers_of(images, 8) == 1 and workers_of(ImageSet("", []), 8) == 8
    levels = load_dataset(images, source, SMALL)[0].pixels[:].float().mean((1, 2, 3))
    assert float((levels - torch.arange(0, 20, 3) * 10).abs().max()) < 4


def test_digests_of_files_are_those_that_reading_gives(tmp_path: Path) -> None:
    images = bad_and_good(tmp_path)
    assert images.items[1].digest() == images.items[1].read()[1]
    assert images.items[0].digest() is not None  # bytes that are no image have a digest too
    (tmp_path / "01.png").unlink()
    assert images.items[1].digest() is None
    assert Item("a", None, "a", lambda: (np.zeros((2, 2, 1), np.uint8), "ab")).digest() == "ab"


def test_threads_that_cannot_all_start_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, asked = ThreadPoolExecutor.submit, []

    def second_fails(self: ThreadPoolExecutor, work: Any, *arguments: Any) -> Any:
        asked.append(work)
        if len(asked) == 2:
            raise RuntimeError("can't start new thread")
        return submit(self, work, *arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", second_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        list(in_order(list, range(6), workers=2, chunk=1))
    wait_until(lambda: not decoders(), 10)
