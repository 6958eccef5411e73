from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_dkm import Inspector
from edge_dkm.cli import main
from edge_dkm.families.finding import Beside, FamilyOptions, find_families
from edge_dkm.frames.index import FrameRow, frame_name
from edge_dkm.frames.ring import FrameRing, ModelSpace, RingLimits
from edge_dkm.message import new_result_id
from tests.images import draw

K, EDGE = 4, 1.6
Vectors = NDArray[np.float32]


class World:
    """Known clusters of standard deviation 1 in `dims` dimensions, far apart; radius = median distance to the mean, edge = 99th percentile."""

    def __init__(self, dims: int = 32, seed: int = 0) -> None:
        self.rng, self.dims = np.random.default_rng(seed), dims
        self.mean = (self.rng.normal(0, 8, (K, dims))).astype(np.float32)
        sample = np.linalg.norm(self.rng.normal(0, 1, (4000, dims)), axis=1)
        self.radius = np.full(K, np.median(sample), np.float32)
        self.edge = float(np.quantile(sample, 0.99) / np.median(sample))

    def around(self, centre: Vectors, count: int, scale: float = 1.0) -> Vectors:
        return (centre + self.rng.normal(0, scale, (count, self.dims))).astype(np.float32)

    def false_rejects(self, count: int) -> Vectors:
        """Ordinary parts beyond the edge, as the line gives them: good parts that are strange by chance."""
        found: list[Vectors] = []
        while len(found) < count:
            k = int(self.rng.integers(K))
            z = self.around(self.mean[k], 400)
            found.extend(z[np.linalg.norm(z - self.mean[k], axis=1) > self.edge * self.radius[k]])
        return np.stack(found[:count])

    def novel_place(self, radii: float = 3.0) -> Vectors:
        direction = self.rng.normal(0, 1, self.dims)
        return (self.mean[1] + direction / np.linalg.norm(direction) * radii * self.radius[1]).astype(np.float32)

    def ordinary(self, count: int = 400) -> Vectors:
        return np.concatenate([self.around(mean, count // K) for mean in self.mean])

    def find(self, z: Vectors, ordinary: Vectors | None = None) -> list[set[int]]:
        groups, options, beside = np.arange(len(z)), FamilyOptions(self.edge), Beside(ordinary=ordinary)
        found = find_families(z, groups, self.mean, self.radius, beside, options)
        return [set(family.members.tolist()) for family in found]


@pytest.mark.parametrize(("dims", "radii"), [(8, 4.0), (32, 3.0), (128, 3.0)])
@pytest.mark.parametrize("seed", range(3))
def test_parts_of_a_new_kind_are_one_family_and_chance_joins_none(dims: int, radii: float, seed: int) -> None:
    world = World(dims, seed)
    new = world.around(world.novel_place(radii), 15)
    (found,) = world.find(np.concatenate([world.false_rejects(40), new]))
    assert len(found & set(range(40, 55))) >= 14 and len(found - set(range(40, 55))) <= 1


@pytest.mark.parametrize("dims", [2, 8, 32, 128])
@pytest.mark.parametrize("seed", range(3))
def test_control_ordinary_parts_beyond_the_edge_are_no_family(dims: int, seed: int) -> None:
    world = World(dims, seed)
    assert world.find(world.false_rejects(200)) == []


@pytest.mark.parametrize("dims", [8, 32, 128])
@pytest.mark.parametrize("seed", range(3))
def test_control_parts_that_are_strange_each_in_its_own_way_are_no_family(dims: int, seed: int) -> None:
    world = World(dims, seed)
    z = np.stack([world.around(world.novel_place(3.0), 1)[0] for _ in range(100)])
    assert world.find(z) == []


@pytest.mark.parametrize("dims", [8, 32, 128])
@pytest.mark.parametrize("seed", range(3))
def test_with_ordinary_parts_to_compare_with_a_family_beside_the_edge_is_found_and_chance_is_not(
    dims: int, seed: int
) -> None:
    """Its middle lies within the edge; its parts are novel by what they differ among themselves, half of them not at all."""
    world = World(dims, seed)
    z = world.around(world.novel_place(8.0 / float(world.radius[0])), 60)
    new = z[np.linalg.norm(z - world.mean[1], axis=1) > world.edge * world.radius[1]]
    stream = np.concatenate([world.false_rejects(40), new])
    (found,) = world.find(stream, world.ordinary())
    assert len(found & set(range(40, len(stream)))) > 0.8 * len(new) and len(found & set(range(40))) <= 2
    assert world.find(world.false_rejects(200), world.ordinary()) == []
    assert world.find(world.false_rejects(200), world.ordinary(40)) == []  # too few of them to compare with


@pytest.mark.parametrize("law", ["normal", "laplace"])
@pytest.mark.parametrize("seed", range(4))
def test_control_with_ordinary_parts_the_end_of_a_long_cluster_is_no_family(law: str, seed: int) -> None:
    world = World(16, seed)
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 0.3, (4000, 16)) + world.mean[0]
    z[:, 0] += getattr(rng, law)(0, 3.0, 4000)
    distance = np.linalg.norm(z - world.mean[0], axis=1)
    world.radius[:] = np.median(distance)
    world.edge = float(np.quantile(distance, 0.98) / np.median(distance))
    is_novel = distance > world.edge * np.median(distance)
    assert world.find(z[is_novel].astype(np.float32), z[~is_novel][:500].astype(np.float32)) == []


@pytest.mark.parametrize("seed", range(5))
def test_control_the_tail_of_a_long_cluster_is_no_family(seed: int) -> None:
    """Parts that grow darker with the lamp: one direction in which a cluster reaches beyond its edge, less and less."""
    world = World(8, seed)
    axis = np.eye(8, dtype=np.float32)[0]
    tail = world.edge * world.radius[0] * (1 + world.rng.exponential(0.15, 120))
    z = world.mean[0] + tail[:, None] * axis + world.rng.normal(0, 0.3, (120, 8))
    assert world.find(z.astype(np.float32)) == []


def test_two_kinds_are_two_families_the_larger_first() -> None:
    world = World()
    first, second = world.around(world.novel_place(3.5), 12), world.around(world.novel_place(3.5), 20)
    assert world.find(np.concatenate([first, second])) == [set(range(12, 32)), set(range(12))]


def test_what_is_known_of_a_family_is_what_was_put_in() -> None:
    world = World()
    place = world.novel_place(3.0)
    z = world.around(place, 400, 0.5)
    moments = np.linspace(1000.0, 1000.0 + 3600 * 10, 400)
    (family,) = find_families(
        z, np.arange(400) // 4, world.mean, world.radius, Beside(moments), FamilyOptions(world.edge)
    )
    assert family.nearest_cluster == 1 and family.n_groups == 100 and len(family.members) == 400
    assert family.raw_score == pytest.approx(3.0, rel=0.05) and family.scatter == pytest.approx(
        world.radius[0] / 2, rel=0.05
    )
    assert family.distance == pytest.approx(3 * world.radius[1], rel=0.05)
    assert np.linalg.norm(family.centre - place) < 0.3
    assert (family.first_s, family.last_s) == (1000.0, 37000.0) and family.rate_per_h == pytest.approx(39.9)


def test_a_family_keeps_coming() -> None:
    """One part in front of a camera that triggers on and on, and one bad batch of ten minutes, are none."""
    world = World()
    z = world.around(world.novel_place(), 20, 0.5)
    often, at_once = np.arange(20, dtype=np.float64) * 900, np.arange(20, dtype=np.float64) * 10
    known = world.mean, world.radius
    options = FamilyOptions(world.edge)
    assert len(find_families(z, np.arange(20), *known, Beside(often), options)) == 1
    assert find_families(z, np.arange(20), *known, Beside(at_once), options) == []
    assert find_families(z, np.zeros(20, int), *known, Beside(often), options) == []
    assert find_families(z[:7], np.arange(7), *known, Beside(often[:7]), options) == []


def test_a_loose_crowd_is_no_family() -> None:
    world = World()
    assert world.find(world.around(world.novel_place(6.0), 40, 2.5)) == []


def test_parts_that_are_all_alike_are_a_family_without_scatter() -> None:
    world = World()
    z = np.repeat(world.novel_place()[None], 12, 0)
    (family,) = find_families(z, np.arange(12), world.mean, world.radius, None, FamilyOptions(world.edge))
    assert family.scatter == pytest.approx(0.0, abs=1e-4)


def test_nothing_and_numbers_that_are_none_are_no_family() -> None:
    world = World()
    assert world.find(np.zeros((0, 32), np.float32)) == []
    assert world.find(np.full((50, 32), np.nan, np.float32)) == []
    z = world.around(world.novel_place(), 12, 0.5)
    z[3, 0] = np.inf
    assert world.find(z) == [set(range(12)) - {3}]


def test_the_order_of_parts_changes_nothing_and_input_stays_as_it_is() -> None:
    world = World()
    z = np.concatenate([world.false_rejects(30), world.around(world.novel_place(4.0), 15)])
    order, before = world.rng.permutation(45), z.copy()
    (found,), (again,) = world.find(z), world.find(z[order])
    assert {int(order[n]) for n in again} == found and np.array_equal(z, before)


def novel_kind(rng: np.random.Generator) -> NDArray[np.uint8]:
    """A bright cross, which the tiny model has not seen."""
    image = np.full((32, 32, 3), 150, np.float32)
    cv2.line(image, (4, 4), (28, 28), (20, 20, 250), 6)
    cv2.line(image, (28, 4), (4, 28), (20, 20, 250), 6)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def strange(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Coarse patches of any colour: each is novel in a way of its own."""
    patches = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(patches, (32, 32), interpolation=cv2.INTER_NEAREST), np.uint8)


@pytest.fixture
def station(tiny_model_path: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Writes a line file whose ring holds ordinary parts and a part of a kind every quarter of an hour."""

    def make(kind: str) -> Path:
        rng = np.random.default_rng(1)
        state = tmp_path / "state"
        with Inspector(tiny_model_path) as inspector:
            space = ModelSpace(inspector.file.sha256, inspector.metadata.embed_dim)
            ring = FrameRing(state / "frames/top", RingLimits(1e9, 1e12), space)
            for n in range(40):
                image = draw("disc", rng)
                if n % 2:
                    image = novel_kind(rng) if kind == "new" else strange(rng)
                found = inspector.inspect(image)
                assert found.is_novel or n % 2 == 0
                ts, key = f"2026-11-20T{n // 4:02d}:{n % 4 * 15:02d}:00.000000Z", new_result_id()
                score = f"{found.novelty_score:.6g}"
                name = frame_name("top", ts, key)
                row = FrameRow(name, "top", ts, str(n), key, found.cluster.name, score, found.verdict, "", "")
                ring.add(row, bytes(np.asarray(cv2.imencode(".png", image)[1]).tobytes()), found.embedding)
            ring.close()
        path = tmp_path / "line.yaml"
        source = f"{{source: '{tmp_path}', pace: max}}"
        path.write_text(
            f"station: st1\nmodel: {tiny_model_path}\nstate: {state}\ncameras: {{top: {source}, side: {source}}}"
        )
        return path

    return make


def test_the_command_proposes_a_family_with_its_pictures_in_one_file(
    station: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, page = str(station("new")), tmp_path / "families.html"
    assert main(["families", line, "--json", "--html", str(page)]) == 0
    top, side = json.loads(capsys.readouterr().out)
    (family,) = top["families"]
    assert (family["n"], family["groups"], top["frames"], side["frames"]) == (20, 20, 40, 0)
    assert family["first"] == "2026-11-20T00:15:00.000000Z" and family["last"] == "2026-11-20T09:45:00.000000Z"
    assert all(Path(file).exists() for file in family["files"]) and family["nearest"]["raw_score"] > 1
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") >= 20 and 'src="http' not in text and "href" not in text
    assert main(["families", line]) == 0
    assert "family 1  20 parts of 20 groups" in capsys.readouterr().out


def test_control_novel_parts_of_no_kind_are_not_proposed(
    station: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = str(station("strange"))
    assert main(["families", line, "--camera", "top", "--json"]) == 0
    (top,) = json.loads(capsys.readouterr().out)
    assert top["novel"] >= 20 and top["families"] == []


def test_a_station_without_frames_and_a_damaged_index_are_said(
    station: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = str(station("new"))
    assert main(["families", line, "--camera", "bottom"]) == 2
    (tmp_path / "state/frames/top/index.csv").write_bytes(b"\0\0")
    assert main(["families", line]) == 7
    assert main(["families", line, "--set", f"state={tmp_path / 'nothing'}"]) == 7
    said = capsys.readouterr().err
    assert "expected one of top, side" in said and "S-CORRUPT" in said and "kept no frames yet" in said
