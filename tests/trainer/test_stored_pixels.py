from __future__ import annotations

import gc
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs import load_text
from tests.conftest import TINY, with_bank
from tests.images import draw, write_folder, write_png
from tests.trainer.test_checkpoint import files_of_at_most
from trainer import FitOptions, fit
from trainer.artifact import Run
from trainer.checkpoint import settings_digest
from trainer.data import Dataset, load_dataset, open_dataset
from trainer.errors import DataError
from trainer.images import DataSettings, open_images
from trainer.pixel_place import Keeper, StorePlace
from trainer.preprocess import Preprocess, PreprocessSettings
from trainer.progress import Silent
from trainer.settings import TrainSettings
from trainer.stored_pixels import PixelWriter, StoredPixels, select

SMALL = PreprocessSettings(height_px=16, width_px=16)


def store(path: Path, pixels: torch.Tensor) -> StoredPixels:
    writer = PixelWriter(path, tuple(pixels.shape[1:]), pixels.dtype, len(pixels))
    for row in pixels:
        writer.append(row)
    return writer.close()


def five(tmp_path: Path) -> StoredPixels:
    """Five images of 1x2 grey pixels: 0 1, 2 3, 4 5, 6 7, 8 9."""
    return store(tmp_path / "five.raw", torch.arange(10, dtype=torch.uint8).reshape(5, 1, 2, 1))


def test_rows_come_as_they_are_asked_for(tmp_path: Path) -> None:
    pixels = five(tmp_path)
    assert (tmp_path / "five.raw").read_bytes() == bytes(range(10))
    assert pixels[torch.tensor([3, 0, 0])].flatten().tolist() == [6, 7, 0, 1, 0, 1]
    assert pixels[np.array([4, 3])].flatten().tolist() == [8, 9, 6, 7]
    assert pixels[1:3].flatten().tolist() == [2, 3, 4, 5]
    assert pixels[::-2].flatten().tolist() == [8, 9, 4, 5, 0, 1]
    assert pixels[torch.tensor([True, False, False, False, True])].flatten().tolist() == [0, 1, 8, 9]
    assert pixels[-1].flatten().tolist() == [8, 9] and pixels[2].shape == (1, 2, 1)
    assert pixels[torch.tensor([], dtype=torch.int64)].shape == (0, 1, 2, 1)
    assert pixels.shape == (5, 1, 2, 1) and len(pixels) == 5 and pixels.dtype == torch.uint8


def test_views_of_views_and_pieces_read_the_same_rows(tmp_path: Path) -> None:
    view = select(select(five(tmp_path), torch.tensor([4, 2, 0])), slice(1, None))
    assert isinstance(view, StoredPixels) and view.shape == (2, 1, 2, 1)
    assert view[:].flatten().tolist() == [4, 5, 0, 1]
    assert [part.flatten().tolist() for part in five(tmp_path).split(2)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [part.shape for part in five(tmp_path).take(slice(0, 0)).split(2)] == [(0, 1, 2, 1)]  # as a tensor
    view.prefetch(torch.tensor([1]))
    assert view.to("cpu")[torch.tensor([-1])].flatten().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_any_index_gives_what_a_tensor_gives(tmp_path: Path, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    whole = torch.from_numpy(rng.integers(0, 256, (200, 3, 5, 3))).to(dtype)
    pixels = store(tmp_path / "many.raw", whole)
    for _ in range(50):
        index = torch.from_numpy(rng.integers(-200, 200, rng.integers(1, 300)))
        assert torch.equal(pixels[index], whole[index])
        some = torch.from_numpy(rng.permutation(200)[:20])
        assert torch.equal(select(pixels, some)[index % 20], whole[some][index % 20])


def test_a_row_that_is_not_there_is_refused(tmp_path: Path) -> None:
    pixels = five(tmp_path)
    for bad in (5, -6):
        with pytest.raises(IndexError, match=f"{bad}"):
            pixels[torch.tensor([0, bad])]
    assert pixels[torch.tensor([4, -5])].flatten().tolist() == [8, 9, 0, 1]


def test_a_file_that_became_shorter_or_went_away_is_named(tmp_path: Path) -> None:
    pixels = five(tmp_path)
    os.truncate(pixels.path, 7)
    assert pixels[2].flatten().tolist() == [4, 5]
    with pytest.raises(DataError, match=r"five.raw ends after 7 bytes, expected 10"):
        pixels[3]
    pixels.path.unlink()
    with pytest.raises(DataError, match=r"five.raw cannot be read: No such file"):
        pickle.loads(pickle.dumps(pixels))[0]


def test_a_copy_in_another_process_reads_for_itself(tmp_path: Path) -> None:
    pixels = five(tmp_path)
    assert pixels[0].flatten().tolist() == [0, 1]
    assert pickle.loads(pickle.dumps(pixels))[1].flatten().tolist() == [2, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: a process with threads forks
        pid = os.fork()
    if pid == 0:
        os._exit(0 if pixels[4].numpy().tobytes() == bytes([8, 9]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert pixels[3].flatten().tolist() == [6, 7]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"need 1e\+06 GB in .*, which has .* GB free; .* data.scratch"):
        PixelWriter(tmp_path / "deep" / "a.raw", (1000, 1000, 1), torch.uint8, 10**9)
    assert not list((tmp_path / "deep").iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot take .* of decoded pixels"):
        PixelWriter(tmp_path / "file" / "a.raw", (1, 1, 1), torch.uint8, 1)


def test_a_disk_that_fills_in_the_middle_says_so_and_leaves_nothing(image_folder: Path, tmp_path: Path) -> None:
    large = PreprocessSettings(height_px=100, width_px=100)
    size = 60 * 100 * 100 * 3
    with files_of_at_most(size - 1), pytest.raises(DataError) as error:
        read(image_folder, StorePlace(tmp_path), memory="disk", preprocess=large)
    assert f"{tmp_path}/pixels-3.raw cannot take 0.0018 GB of decoded pixels: File too large after" in str(error.value)
    assert not list(tmp_path.iterdir())
    with files_of_at_most(size):  # the control
        read(image_folder, StorePlace(tmp_path), memory="disk", preprocess=large)
    assert (tmp_path / "pixels-3.raw").stat().st_size == size


def read(path: Path, place: StorePlace | None = None, **settings: Any) -> Dataset:
    preprocess = settings.pop("preprocess", SMALL)
    source = DataSettings(path=str(path), **settings)
    return load_dataset(open_images(source), source, preprocess, iter, place)[0]


def assert_same(a: Dataset, b: Dataset) -> None:
    assert torch.equal(a.pixels[:], b.pixels[:]) and a.pixels.dtype == b.pixels.dtype
    assert a.names == b.names and a.classes == b.classes and a.skipped == b.skipped
    assert a.manifest_sha256 == b.manifest_sha256 and a.frame == b.frame
    for name in ("known", "groups", "good"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def mixed_folder(folder: Path) -> Path:
    """Grey images, one that is none, one twice; the first coloured one comes late."""
    rng = np.random.default_rng(0)
    for n in range(30):
        write_png(folder / "good" / f"{n:02d}.png", np.repeat(rng.integers(0, 256, (20, 24, 1), np.uint8), 3, 2))
    (folder / "good" / "05.png").write_bytes(b"no image")
    (folder / "good" / "07.png").write_bytes((folder / "good" / "03.png").read_bytes())
    write_png(folder / "other" / "0.png", draw("disc", rng, 24))
    return folder


@pytest.mark.parametrize("preprocess", [SMALL, SMALL.model_copy(update={"resize": "matmul"})])
def test_a_set_on_disk_is_the_set_in_memory(tmp_path: Path, preprocess: PreprocessSettings) -> None:
    folder = mixed_folder(tmp_path / "set")
    in_memory = read(folder, preprocess=preprocess, memory="ram", workers=1)
    place = StorePlace(tmp_path / "scratch")
    on_disk = read(folder, place, preprocess=preprocess, memory="disk", workers=3)
    assert isinstance(in_memory.pixels, torch.Tensor) and isinstance(on_disk.pixels, StoredPixels)
    assert_same(in_memory, on_disk)
    assert on_disk.pixels.shape == (30, 16, 16, 3) and [s.name for s in on_disk.skipped] == ["good/05.png"]
    assert sorted(path.name for path in place.folder.iterdir()) == ["pixels-3.raw", "pixels.safetensors"]
    place.remove()
    assert not place.folder.exists()


def test_auto_goes_to_disk_where_the_share_of_memory_is_too_small_and_says_why(
    image_folder: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    place = StorePlace(tmp_path, say=said.append)
    assert isinstance(read(image_folder, place).pixels, torch.Tensor) and said == []
    assert isinstance(read(image_folder, place, ram_share=1e-9).pixels, StoredPixels)
    assert "pixels-3.raw: 4.61e-05 GB are more than 0% of the" in said[0]
    several = StorePlace(tmp_path / "b", processes=2)  # shared by way of the file, then in memory
    assert isinstance(read(image_folder, several).pixels, torch.Tensor)
    assert (tmp_path / "b" / "pixels-3.raw").exists()


def test_without_a_place_the_folder_goes_with_the_data_set(image_folder: Path, tmp_path: Path) -> None:
    data = read(image_folder, memory="disk", scratch=str(tmp_path))
    view = select(data.pixels, torch.tensor([1]))
    assert len(list(tmp_path.iterdir())) == 1
    del data
    gc.collect()
    assert view[:].shape == (1, 16, 16, 3)
    del view
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="data.scratch is .*nowhere"):
        read(image_folder, memory="disk", scratch=str(tmp_path / "nowhere"))


def test_a_store_of_the_same_images_is_used_again_and_of_others_is_not(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "set")
    said: list[str] = []
    place = StorePlace(tmp_path / "scratch", say=said.append)
    path = place.pixels(3)

    def again(**settings: Any) -> tuple[Dataset, bool]:
        before = path.stat().st_mtime_ns
        data = read(folder, place, memory="disk", **settings)
        return data, path.stat().st_mtime_ns == before

    first = read(folder, place, memory="disk")
    same, reused = again()
    assert reused and "the images are the same" in said[-1]
    assert_same(first, same)
    # A file that could not be decoded is looked at too.
    write_png(folder / "good" / "05.png", draw("bars", np.random.default_rng(1)))
    changed, reused = again()
    assert not reused and "good/05.png is not what it was" in said[-3]
    assert changed.manifest_sha256 != first.manifest_sha256 and len(changed) == 31
    assert not again(preprocess=SMALL.model_copy(update={"fit": "pad"}))[1]
    assert not again()[1] and again()[1]
    os.truncate(path, path.stat().st_size - 1)
    assert not again()[1]
    place.record.write_bytes(b"\x05\0\0\0\0\0\0\0{bad}")
    assert not again()[1] and again()[1]
    write_png(folder / "new.png", draw("bars", np.random.default_rng(2)))
    assert not again()[1]


def test_what_a_killed_process_left_is_not_taken_and_goes(image_folder: Path, tmp_path: Path) -> None:
    place = StorePlace(tmp_path)
    place.pixels(1).write_bytes(bytes(1000))
    place.pixels(3).write_bytes(bytes(60 * 16 * 16 * 3))
    data = read(image_folder, place, memory="disk")
    assert int(data.pixels[0].float().mean()) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pixels-3.raw", "pixels.safetensors"]


def test_a_set_beyond_all_memory_asked_for_in_memory_is_told_where_else(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1e\+09 GB of pixels .* set data.memory: disk"):
        Keeper(DataSettings(path="a", memory="ram"), None, Preprocess(SMALL, 1000, 1000), 10**12).add(
            torch.zeros(1000, 1000, 1, dtype=torch.uint8)
        )


def test_another_process_opens_what_the_first_one_wrote(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "set")
    place = StorePlace(tmp_path / "scratch", processes=2)
    source = DataSettings(path=str(folder), memory="disk")
    first, module = load_dataset(open_images(source), source, SMALL, iter, place)
    second, opened = open_dataset(open_images(source), source, SMALL, place)
    assert_same(first, second)
    assert (opened.height_px, opened.width_px) == (module.height_px, module.width_px)
    (folder / "good" / "00.png").unlink()
    with pytest.raises(DataError, match="does not hold the pixels of the 30 images"):
        open_dataset(open_images(source), source, SMALL, place)


def test_mean_and_deviation_are_those_of_the_tensor(tmp_path: Path) -> None:
    whole = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3000, 8, 8, 3), np.uint8))
    modules = [Preprocess(PreprocessSettings(), 8, 8) for _ in range(2)]
    modules[0].fit_normalise(whole)
    modules[1].fit_normalise(store(tmp_path / "a.raw", whole))
    assert torch.equal(modules[0].mean, modules[1].mean) and torch.equal(modules[0].std, modules[1].std)


DEC = "{name: dec, n_clusters: 3, epochs: 2}"
CHANGED = "augment: {flip: both, shift: 0.1, noise: 0.1}\n"


@pytest.mark.parametrize("is_conv", [False, True])
def test_a_run_from_disk_learns_the_same_numbers(tmp_path: Path, is_conv: bool) -> None:
    folder = write_folder(tmp_path / "set", per_kind=12)
    text = TINY.format(path=folder).replace("{name: ae_kmeans, n_clusters: 3, n_init: 3}", DEC)
    text = with_bank(text) + CHANGED if is_conv else text
    runs: list[Run] = []
    for memory in ("ram", "disk"):
        settings = load_text(TrainSettings, text.replace("data: {", f"data: {{memory: {memory}, "), "a.yaml")
        runs.append(fit(settings, FitOptions(out=tmp_path / memory)))
    states = [run.model.state_dict() for run in runs]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not (tmp_path / "disk" / "scratch").exists()


class Noted(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_where_pixels_are_kept_may_change_under_a_resume_and_which_images_may_not() -> None:
    plain = load_text(TrainSettings, TINY.format(path="a"), "a.yaml").plain()
    first = settings_digest(plain)
    for key, value in {"workers": 3, "memory": "disk", "ram_share": 0.1, "scratch": "/b"}.items():
        assert settings_digest({**plain, "data": {**plain["data"], key: value}}) == first
    for key, value in {"path": "b", "limit": 5}.items():
        assert settings_digest({**plain, "data": {**plain["data"], key: value}}) != first


def test_a_run_that_was_killed_while_it_trained_does_not_decode_again(image_folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    text = TINY.replace("{path}", "{path}, memory: disk, scratch: " + str(scratch)).format(path=image_folder)
    settings = load_text(TrainSettings, text, "a.yaml")
    left = StorePlace.of(settings.data, tmp_path / "run")
    load_dataset(open_images(settings.data), settings.data, settings.preprocess, iter, left)
    progress = Noted()
    fit(settings, FitOptions(out=tmp_path / "run", progress=progress))
    assert any("the images are the same" in text for text in progress.said)
    assert not list(scratch.iterdir())
