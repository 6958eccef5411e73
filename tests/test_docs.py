"""The guides stay true: what contracts.md lists is what the code has, and the README's code runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from configs import Settings, load_settings
from edge_dkm.cli import PLANNED as EDGE_PLANNED
from edge_dkm.contract import INPUT, METADATA, OUTPUTS, OVERRIDABLE
from edge_dkm.message import MESSAGES
from edge_dkm.settings import LineSettings
from trainer.cli import PLANNED as TRAIN_PLANNED
from trainer.encoders import ENCODERS
from trainer.methods import METHODS
from trainer.settings import TrainSettings

ROOT = Path(__file__).parent.parent
CONTRACTS = (ROOT / "docs/contracts.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text of one section of contracts.md."""
    return CONTRACTS.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_every_tensor_and_metadata_key_is_described() -> None:
    text = section("ONNX contract 1")
    names = [spec.name for spec in (INPUT, *OUTPUTS, *OVERRIDABLE)] + list(METADATA)
    assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("schema", MESSAGES)
def test_every_message_and_its_keys_are_described(schema: str) -> None:
    text = section("Topics") + section("Messages")
    keys = {field.alias or name for name, field in MESSAGES[schema].model_fields.items()}
    assert schema in text and [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


@pytest.mark.parametrize(("title", "settings"), [("Line settings", LineSettings), ("Training settings", TrainSettings)])
def test_every_setting_is_described(title: str, settings: type[Settings]) -> None:
    text = section(title)
    assert [key for key in settings.model_fields if not re.search(rf"\b{key}\b", text)] == []
    nested = [field.annotation for field in settings.model_fields.values()]
    keys = [
        field.alias or key
        for kind in nested
        if isinstance(kind, type) and issubclass(kind, Settings)
        for key, field in kind.model_fields.items()
    ]
    assert len(keys) > 15 and [key for key in keys if not re.search(rf"\b{key}\b", text)] == []


def test_methods_encoders_and_planned_commands_are_listed() -> None:
    words = [*METHODS, *ENCODERS, *EDGE_PLANNED, *TRAIN_PLANNED]
    assert [word for word in words if not re.search(rf"\b{word}\b", CONTRACTS)] == []


def test_the_example_of_plain_onnxruntime_runs(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "InferenceSession" in block)
    shutil.copy(tiny_model_path, tmp_path / "part.onnx")
    cv2.imwrite(str(tmp_path / "part.png"), np.full((32, 32, 3), 90, np.uint8))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert re.match(r"cluster-\d [\d.]+ (True|False)\n\[array", capsys.readouterr().out)


def test_the_line_of_the_guide_is_a_line(tmp_path: Path) -> None:
    guide = (ROOT / "docs/own-line.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL) if "station" in block)
    (tmp_path / "mine.yaml").write_text(block)
    assert load_settings(LineSettings, tmp_path / "mine.yaml", "line").cameras["top"].roi == (320, 180, 640, 640)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in link]
    modules = [name.replace(".", "/") + ".py" for name in re.findall(r"python -m (benchmarks\.[a-z]\S*?)[`\s]", text)]
    missing = [link for link in links if not ((ROOT / page).parent / link).exists()]
    assert missing + [module for module in modules if not (ROOT / module).exists()] == []
