from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.images import write_folder, write_png
from trainer import answers as module
from trainer import load_run
from trainer.answers import answers, read_like
from trainer.errors import DataError


def test_answers_in_pieces_are_those_of_the_whole_set(
    tiny_run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "set", per_kind=8)
    for name in ("bars/000.png", "disc/003.png", "disc/004.png"):
        (folder / name).write_bytes(b"no image")
    run = load_run(tiny_run_folder)
    whole = read_like(run, str(folder))
    seen = run.model.see(whole.pixels)
    for piece in (1, 5, 7, 24, 1024):
        monkeypatch.setattr(module, "PIECE", piece)
        found = answers(run, str(folder))
        assert found.names == whole.names and found.skipped == 3 and set(found.labels) == {"bars", "disc", "square"}
        assert found.labels == [whole.classes[n] for n in whole.known]
        assert np.array_equal(found.ids, run.model.assign(seen.z)[0].numpy())
        assert np.allclose(found.scores, run.model.novelty_scores(seen).numpy(), rtol=1e-4)


def test_a_set_without_a_readable_image_is_refused(tiny_run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match="none of the 1 images"):
        answers(load_run(tiny_run_folder), str(tmp_path))
    write_png(tmp_path / "b.png", np.zeros((32, 32, 3), np.uint8))
    assert answers(load_run(tiny_run_folder), str(tmp_path)).names == ["b.png"]
