from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_fitting import dec
from trainer import FitOptions, fit
from trainer.errors import DataError
from trainer.run_lock import only_one_in


def test_a_second_training_into_one_folder_is_refused_while_the_first_one_lives(
    image_folder: Path, tmp_path: Path
) -> None:
    with only_one_in(tmp_path / "run"):
        with pytest.raises(DataError, match="another process trains into .*run now; .* another --out"):
            fit(dec(image_folder), FitOptions(out=tmp_path / "run"))
        assert not list((tmp_path / "run").iterdir())
        with only_one_in(tmp_path / "other"):  # control
            pass
    with only_one_in(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"), only_one_in(tmp_path / "file" / "run"):
        pass
