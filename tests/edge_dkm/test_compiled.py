"""The cache of compiled models, with a provider that stands for one that compiles: it keeps a file in the folder that it is given.

OpenVINO's own cache is in test_openvino.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from edge_dkm import Inspector, ModelError, Runtime, session
from edge_dkm.compiled import is_filled, made, renewed
from edge_dkm.contract import IMAGE
from edge_dkm.errors import UsageError
from edge_dkm.model_file import ModelFile, read_model
from edge_dkm.models import open_proven
from edge_dkm.runtime import CPU, OPENVINO
from edge_dkm.session import cache_folder
from edge_dkm.verification import warm
from tests.edge_dkm.test_golden import edited

Providers = Sequence[tuple[str, dict[str, str]]]
BAD, GOOD = "bad engine", "engine"


class Compiler:
    """Takes the place of OpenVINO, runs on the CPU. `fails`: whether it does, from what lies in its folder (None: it has none)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.runtime = Runtime((OPENVINO, CPU), cache=cache, strict=False)
        self.seen: list[list[str] | None] = []
        self.fails: Callable[[list[str] | None], bool] = lambda names: names is not None and BAD in names
        self._create = session._create
        providers = [OPENVINO, *ort.get_available_providers()]
        monkeypatch.setattr(session, "_create", self.create)
        monkeypatch.setattr(ort, "get_available_providers", lambda: providers)

    def create(self, file: ModelFile, options: ort.SessionOptions, providers: Providers) -> ort.InferenceSession:
        wanted = dict(providers)
        if OPENVINO in wanted:
            folder = Path(wanted[OPENVINO]["cache_dir"]) if "cache_dir" in wanted[OPENVINO] else None
            names = None if folder is None else sorted(path.name for path in folder.iterdir())
            self.seen.append(names)
            if self.fails(names):
                raise ModelError("no such engine")
            if folder is not None:
                (folder / GOOD).touch()
        return self._create(file, options, [(CPU, {})])

    def fill(self, model: Path, name: str) -> Path:
        """Something compiled earlier."""
        folder = cache_folder(read_model(model), self.runtime)
        assert folder is not None
        folder.mkdir(parents=True)
        (folder / name).touch()
        return folder


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    return Compiler(monkeypatch, tmp_path / "cache")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def immovable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another user, or on a read-only mount."""

    def denied(*_: object) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", denied)


def test_what_does_not_load_is_replaced_by_what_does(tiny_model_path: Path, compiler: Compiler) -> None:
    folder = compiler.fill(tiny_model_path, BAD)
    with Inspector(tiny_model_path, runtime=compiler.runtime) as inspector:
        assert inspector.ran.cache == folder and not inspector.ran.from_cache
    assert compiler.seen == [[BAD], []]
    assert names_in(folder) == [GOOD] and names_in(folder.parent) == [folder.name]


def test_an_error_that_the_cache_has_no_part_in_costs_no_engine(
    tiny_model_path: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    folder = compiler.fill(tiny_model_path, "took minutes")
    compiler.fails = lambda names: True  # a GPU that is out of memory
    with Inspector(tiny_model_path, runtime=compiler.runtime) as inspector:
        assert inspector.providers == [CPU] and inspector.ran.cache is None
    assert compiler.seen == [["took minutes"], []]
    assert names_in(folder) == ["took minutes"] and names_in(folder.parent) == [folder.name]
    assert "no such engine; it runs on CPU" in caplog.text


@pytest.mark.usefixtures("immovable")
def test_a_cache_that_cannot_be_moved_is_done_without(
    tiny_model_path: Path, compiler: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    folder = compiler.fill(tiny_model_path, BAD)
    with Inspector(tiny_model_path, runtime=compiler.runtime) as inspector:
        assert inspector.ran.cache is None and not inspector.ran.from_cache
    assert compiler.seen == [[BAD], None] and names_in(folder) == [BAD] and names_in(folder.parent) == [folder.name]
    assert "cannot be renewed (Permission denied); it is left alone and not used" in caplog.text


@pytest.mark.usefixtures("immovable")
def test_a_wrong_engine_that_cannot_be_moved_is_done_without_too(copied_model: Path, compiler: Compiler) -> None:
    """One that loads, and gives other than the golden answers."""
    folder = compiler.fill(copied_model, "loads")
    opened: list[Path | None] = []

    def open_it(runtime: Runtime) -> Inspector:
        inspector = Inspector(copied_model, runtime=runtime)
        opened.append(runtime.cache)
        if runtime.cache is not None:
            real = inspector.run

            def wrong(*arguments: object, **named: object) -> dict[str, np.ndarray]:
                outputs = real(*arguments, **named)  # type: ignore[arg-type]
                return {name: np.asarray(value) + 1 for name, value in outputs.items()}

            inspector.run = wrong  # type: ignore[assignment, method-assign]
        return inspector

    inspector, _ = open_proven(open_it, compiler.runtime)
    inspector.close()
    assert opened == [folder.parent, None] and "loads" in names_in(folder)


def test_an_engine_is_not_lost_to_a_model_that_is_wrong_itself(copied_model: Path, compiler: Compiler) -> None:
    edited(copied_model, "novelty_scale", 1.5)
    folder = compiler.fill(copied_model, "took minutes")
    with pytest.raises(ModelError, match="golden image 0"):
        open_proven(lambda runtime: Inspector(copied_model, runtime=runtime), compiler.runtime)
    assert compiler.seen == [["took minutes"], []] and "took minutes" in names_in(folder)
    assert names_in(folder.parent) == [folder.name]


def test_warming_up_into_a_folder_that_cannot_be_made_is_an_error_that_names_it(
    tiny_model_path: Path, compiler: Compiler, tmp_path: Path
) -> None:
    (proof,) = warm([str(tiny_model_path)], "mine", compiler.runtime)  # control
    assert proof.ran is not None and proof.ran.cache is not None and names_in(proof.ran.cache) == [GOOD]
    (tmp_path / "file").touch()
    nowhere = Runtime((OPENVINO, CPU), cache=tmp_path / "file", strict=False)
    with pytest.raises(ModelError, match=r"mine has left nothing in its cache .*file/.*-openvino-.*; is there room"):
        list(warm([str(tiny_model_path)], "mine", nowhere))


def test_a_folder_that_cannot_be_made_or_read_is_no_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    assert made(None) is None and made(tmp_path / "file") is None and made(tmp_path / "file" / "below") is None
    assert caplog.text.count("every start compiles anew") == 2
    folder = made(tmp_path / "a" / "b")
    assert folder == tmp_path / "a" / "b" and folder.stat().st_mode & 0o077 == 0 and not is_filled(folder)
    assert is_filled(tmp_path) and not is_filled(tmp_path / "file") and not is_filled(None)


def test_a_renewed_folder_is_empty_private_and_put_back_when_the_block_raises(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "old").touch()

    def fails() -> None:
        with renewed(folder) as fresh:
            assert fresh == folder and not is_filled(fresh) and folder.stat().st_mode & 0o077 == 0
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert names_in(folder) == ["old"] and names_in(tmp_path) == ["kept"]
    with renewed(folder):
        (folder / "new").touch()
    assert names_in(folder) == ["new"] and names_in(tmp_path) == ["kept"]


def test_a_precision_or_option_that_cannot_be_is_refused_before_anything_is_compiled(
    tiny_model_path: Path, compiler: Compiler
) -> None:
    clash = {OPENVINO: {"load_config": "{}"}}
    for runtime, text in (
        (Runtime((OPENVINO, CPU), precision="fp16"), "OpenVINO on a CPU computes in fp32 or bf16"),
        (Runtime((OPENVINO, CPU), clash, precision="bf16"), "leave one out"),
    ):
        with pytest.raises(UsageError, match=text):
            Inspector(tiny_model_path, runtime=runtime)
    assert compiler.seen == []


def test_the_processor_is_named_only_where_it_runs_something(
    tiny_model_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort.InferenceSession, "get_providers", lambda self: [OPENVINO, CPU])
    for kernels, actual in (
        ({OPENVINO: 1}, [OPENVINO]),
        ({OPENVINO: 1, CPU: 2}, [OPENVINO, CPU]),
        (None, [OPENVINO, CPU]),
    ):
        monkeypatch.setattr(session, "_kernels", lambda _, kernels=kernels: kernels)
        with Inspector(tiny_model_path, runtime=compiler.runtime) as inspector:
            assert inspector.providers == actual


def test_a_run_that_fails_while_warming_up_is_a_model_error(tiny_model_path: Path) -> None:
    file = read_model(tiny_model_path)
    with Inspector(tiny_model_path) as inspector:
        spec, opened = inspector.metadata.input, inspector._open()

        class Failing:
            def run(self, names: object, feed: dict[str, np.ndarray]) -> object:
                return opened.run(None, {IMAGE: feed[IMAGE].astype(np.float32)})  # onnxruntime's own error

            def get_providers(self) -> list[str]:
                return [CPU]

        session.warm_up(opened, file, spec, 2)  # control
        with pytest.raises(ModelError, match=rf"part.onnx fails on {CPU} with a frame of noise \(32, 32\)"):
            session.warm_up(Failing(), file, spec, 1)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
