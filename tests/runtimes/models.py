"""The models that are exported for the proof: every resize mode, fixed and dynamic, with a bank of patches and without.

Tiny ones on drawn images, and SqueezeNet's real weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import SHARED
from configs import load_text
from exporters.export import ExportOptions, export_run
from tests.conftest import BANK, TINY
from tests.images import write_folder
from trainer import FitOptions, fit
from trainer.settings import TrainSettings

WEIGHTS = SHARED / "weights" / "squeezenet1_0-imagenet.safetensors"
L2_HEAD = (
    "encoder: {{name: conv, channels: [4, 8, 8], dim: 8}}\nprojection: {{kind: pca, dim: 4, sqrt: true, l2: true}}"
)
CONV = "encoder: {{name: conv, channels: [8, 16, 16], dim: 8}}"
CONTRAST = "preprocess: {{resize: none, local_contrast: 0.5}}"
POINTS = "{layers: [conv2, conv3], per_cluster: true, learn: coreset, size: 32, dim: 8, neighbours: 3, reduce: top, max_cost: 10}"
PLACES = "{layers: [conv1, conv2], learn: gaussian, dim: 6, smooth: 1, max_cost: 10}"
SQUEEZENET = """
data: {{path: {path}}}
preprocess: {preprocess}
encoder: {{name: pretrained, model: squeezenet1_0, weights: {weights}, layers: [fire4, fire8, fire9]}}
projection: {{kind: pca, dim: 32, whiten: 0.25, l2: true}}
method: {{name: ae_kmeans, n_clusters: 3}}
novelty: {{target_frr: 0.1}}
train: {{device: cpu}}
"""


def _novelty(settings: str) -> str:
    """As a line of TINY, which is formatted later."""
    return "novelty: " + settings.replace("{", "{{").replace("}", "}}")


@dataclass(frozen=True)
class Recipe:
    """One model: settings that differ from TINY (by top-level key), the drawn images' side, `--frame`."""

    changes: tuple[tuple[str, str], ...] = ()
    side_px: int = 32
    frame: tuple[int, int] | None = None


RECIPES = {
    "onnx": Recipe(),  # any size, antialiased
    "frame": Recipe(side_px=48, frame=(48, 48)),  # halved
    "none": Recipe((("preprocess", "preprocess: {{resize: none}}"),)),
    "matmul": Recipe((("preprocess", "preprocess: {{height_px: 24, width_px: 24, resize: matmul}}"),)),
    "gray": Recipe((("preprocess", "preprocess: {{height_px: 24, width_px: 24, color: gray, resize: matmul}}"),)),
    "linear": Recipe((("preprocess", "preprocess: {{height_px: 24, width_px: 24, antialias: false}}"),)),
    "pad_l2": Recipe(
        (("preprocess", "preprocess: {{height_px: 24, width_px: 32, fit: pad}}"), ("encoder", L2_HEAD)),
    ),
    "bank": Recipe((("encoder", CONV), ("preprocess", "preprocess: {{resize: none}}"), ("novelty", _novelty(BANK)))),
    "bank_points": Recipe(
        (
            ("encoder", CONV),
            ("preprocess", "preprocess: {{resize: none}}"),
            ("novelty", _novelty(f"{{target_frr: 0.1, bank: {POINTS}}}")),
        )
    ),
    # One cluster: radii of three tight ones (.02) would show roundings of the contrast 600 times larger.
    "bank_contrast": Recipe(
        (
            ("encoder", CONV),
            ("preprocess", CONTRAST),
            ("method", "method: {{name: ae_kmeans, n_clusters: 1}}"),
            ("novelty", _novelty(BANK)),
        ),
        side_px=36,  # the last cells of the local contrast, of 8 pixels, are not whole
    ),
    "bank_places": Recipe(
        (("encoder", CONV), ("novelty", _novelty(f"{{target_frr: 0.1, bank: {PLACES}}}"))),
        side_px=48,
        frame=(48, 48),
    ),
}
SQUEEZENETS = {
    "squeezenet": ("{height_px: 128, width_px: 128, normalise: imagenet, resize: none}", 128),
    "squeezenet_half": ("{height_px: 96, width_px: 96, normalise: imagenet}", 192),
}


def export_models(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Trains and exports the named models; a SqueezeNet needs its weights (EDGE_DKM_SHARED) and is left out, said, without them."""
    paths = []
    for name in names:
        if name in SQUEEZENETS and not WEIGHTS.exists():
            print(f"{name}: left out, {WEIGHTS} is not there (EDGE_DKM_SHARED names the folder that holds weights/)")
            continue
        paths.append(_export(folder, name))
    return paths


def _export(folder: Path, name: str) -> Path:
    recipe = RECIPES[name] if name in RECIPES else Recipe(side_px=SQUEEZENETS[name][1])
    images = folder / f"images-{recipe.side_px}"
    if not images.exists():
        write_folder(images, side_px=recipe.side_px)
    run = fit(load_text(TrainSettings, _settings(name, recipe, images), name), FitOptions(out=folder / f"run-{name}"))
    path = folder / f"{name}.onnx"
    export_run(run, path, ExportOptions(frame=recipe.frame))
    return path


def _settings(name: str, recipe: Recipe, images: Path) -> str:
    if name in SQUEEZENETS:
        return SQUEEZENET.format(path=images, preprocess=SQUEEZENETS[name][0], weights=WEIGHTS)
    changes = dict(recipe.changes)
    return "\n".join(changes.get(line.split(":")[0], line) for line in TINY.splitlines()).format(path=images)
