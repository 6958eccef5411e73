"""The house rules that a machine can check: which package may import which, what the device never loads, how large things may grow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "devices", "edge_dkm", "trainer", "exporters")
MAY_IMPORT = {
    "configs": set(),
    "devices": {"configs"},
    "edge_dkm": {"devices", "configs"},
    "trainer": {"configs"},
    "exporters": {"trainer", "edge_dkm", "devices", "configs"},
}
EDGE_NEVER = {"torch", "onnx", "onnxscript", "scipy", "sklearn", "matplotlib", "safetensors", "tqdm"}
# library -> the only places that may import it
RESERVED = {
    "paho": {"edge_dkm/mqtt/link.py"},
    "sqlite3": {"edge_dkm/outbox/file.py"},
    "prometheus_client": {"edge_dkm/service/metrics.py"},
    "pymodbus": {"devices/outputs/modbus.py"},
    "gpiod": {"devices/outputs/gpio.py"},
    "onnxruntime": {
        "edge_dkm/inspector.py",
        "edge_dkm/session.py",
        "edge_dkm/lowered.py",
        "edge_dkm/announcer.py",
        "devices/providers.py",
        "exporters/export.py",
        "exporters/probe.py",
        "exporters/quantize.py",
    },
}
INSPECTOR_FILES = (
    *("__init__", "inspector", "contract", "codebook", "decision", "errors", "model_file"),
    *("runtime", "session", "lowered", "head", "golden"),
)
MAX_FILE, MAX_BODY, MAX_ARGUMENTS = 400, 60, 6


def sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield package, path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_data_flows_one_way() -> None:
    wrong = [
        (name(path), module)
        for package, path, tree in sources()
        for module in imported(tree)
        if (top := module.split(".")[0]) in PACKAGES and top != package and top not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_nothing_on_the_device_imports_the_training_stack() -> None:
    wrong = [
        (name(path), module)
        for package, path, tree in sources()
        for module in imported(tree)
        if package in {"configs", "devices", "edge_dkm"} and module.split(".")[0] in EDGE_NEVER
    ]
    assert wrong == []


def test_the_inspector_imports_neither_devices_nor_configs() -> None:
    trees = {
        path.stem: tree for package, path, tree in sources() if package == "edge_dkm" and path.parent.name == "edge_dkm"
    }
    wrong = [
        (stem, module)
        for stem in INSPECTOR_FILES
        for module in imported(trees[stem])
        if module.split(".")[0] in {"devices", "configs", "pydantic", "yaml", "cv2", "paho"}
    ]
    assert wrong == []


@pytest.mark.parametrize("library", RESERVED)
def test_each_delicate_library_has_one_home(library: str) -> None:
    users = {
        name(path)
        for package, path, tree in sources()
        if package != "trainer"
        for module in imported(tree)
        if module.split(".")[0] == library
    }
    assert users <= RESERVED[library]


def test_only_the_clock_reads_the_wall_clock_on_the_device() -> None:
    wrong = []
    for package, path, tree in sources():
        if package not in {"devices", "edge_dkm"} or path.name == "clock.py":
            continue
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and (node.value.id, node.attr)
                in {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow")}
            ):
                wrong.append(f"{name(path)}:{node.lineno}")
    assert wrong == []


def test_files_functions_and_signatures_stay_small() -> None:
    wrong = []
    for _, path, tree in sources():
        lines = path.read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE:
            wrong.append(f"{name(path)}: {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0
                arguments = [a for a in node.args.posonlyargs + node.args.args if a.arg not in {"self", "cls"}]
                if length > MAX_BODY or len(arguments) > MAX_ARGUMENTS:
                    wrong.append(f"{name(path)}:{node.lineno} {node.name}: {length} lines, {len(arguments)} arguments")
    assert wrong == []


def test_every_module_says_what_it_is() -> None:
    assert [name(path) for _, path, tree in sources() if ast.get_docstring(tree) is None] == []


def test_input_is_never_checked_by_assert() -> None:
    assert [
        f"{name(path)}:{node.lineno}"
        for _, path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ] == []


def test_tests_mirror_the_packages() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == {*PACKAGES, "faults", "runtimes"}


@pytest.mark.parametrize("package", ["configs", "trainer", "edge_dkm"])
def test_public_names_are_all_there(package: str) -> None:
    import importlib

    module = importlib.import_module(package)
    assert all(getattr(module, public) is not None for public in module.__all__)
    with pytest.raises(AttributeError):
        _ = module.nothing_of_that_name


def test_the_edge_loads_and_inspects_with_the_training_stack_blocked(tiny_model_path: Path) -> None:
    program = f"""
import sys
for name in {sorted(EDGE_NEVER)!r}:
    sys.modules[name] = None
import edge_dkm.supervisor, edge_dkm.recorder, edge_dkm.checks, edge_dkm.watch, edge_dkm.bench, devices.capture
from edge_dkm import Inspector
import numpy as np
with Inspector({str(tiny_model_path)!r}) as inspector:
    print(inspector.inspect(np.zeros((32, 32, 3), np.uint8)).verdict)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_base_install_is_the_edge_and_no_more() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {dependency.split(">")[0].split("<")[0].split("[")[0] for dependency in project["dependencies"]}
    assert names == {
        "numpy",
        "onnxruntime",
        "opencv-python-headless",
        "paho-mqtt",
        "pydantic",
        "pyyaml",
        "cryptography",
    }
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert names <= pinned and "torch==2.13.0" in (ROOT / "constraints.txt").read_text()


def test_control_a_forbidden_import_would_be_found() -> None:
    tree = ast.parse("def f():\n    import torch.nn\nfrom trainer.data import Dataset")
    assert imported(tree) == {"torch.nn", "trainer.data"}
