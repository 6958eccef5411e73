"""A drawn conveyor: several part types, rare defects, belt texture, noise. No camera and no file needed.

Used by `source: synthetic:...` for a first try without hardware, and by the demo, which films two of these belts.
The scene is a pure function of its seed: the same options give the same frames.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from devices.errors import CameraError
from devices.frame import Frame, Pacer

WIDTH_PX, HEIGHT_PX = 480, 270
SPRITE_PX = 128                     # side of the square a part is drawn in
PART_TYPES = ("plate", "ring", "bracket")
DEFECTS = ("scratch", "stain", "foreign")

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ConveyorOptions:
    """What the belt carries. Rates are shares of all parts; `foreign` replaces the part by an object of another kind."""

    seed: int = 0
    parts: int = 60
    fps: float = 30.0
    speed_px: float = 10.0          # per frame
    spacing_px: float = 170.0       # between part centres; the region of 160 px then holds one part at a time
    scratch: float = 0.02
    stain: float = 0.0
    foreign: float = 0.0
    types: int = 3


@dataclass(frozen=True)
class PlannedPart:
    """One part of the plan: `number` counts from 1 in the order in which parts cross the middle of the picture."""

    number: int
    kind: str
    defect: str | None
    offset_y_px: float
    angle_deg: float
    gain: float
    seed: int


@dataclass
class Conveyor:
    """The moving scene. `plan` is the truth; `render(i)` draws frame i."""

    options: ConveyorOptions
    plan: list[PlannedPart] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.options.seed)
        self.plan = [self._plan_part(n, rng) for n in range(1, self.options.parts + 1)]
        self._belt = _draw_belt(rng)
        self._sprites: dict[int, tuple[Image, NDArray[np.float32]]] = {}

    @property
    def n_frames(self) -> int:
        """Frames until the last part has left the picture."""
        o = self.options
        return math.ceil((WIDTH_PX + SPRITE_PX + o.parts * o.spacing_px) / o.speed_px)

    def render(self, index: int) -> Image:
        """Frame `index`: (HEIGHT_PX, WIDTH_PX, 3) uint8 BGR; parts move from right to left."""
        o = self.options
        travel = index * o.speed_px
        shift = int(travel) % self._belt.shape[1]
        frame = np.roll(self._belt, -shift, axis=1)[:, :WIDTH_PX].astype(np.float32)
        for part in self.plan:
            x = WIDTH_PX + SPRITE_PX / 2 + (part.number - 1) * o.spacing_px - travel
            if -SPRITE_PX < x < WIDTH_PX + SPRITE_PX:
                self._paste(frame, part, x)
            elif part.number in self._sprites and x <= -SPRITE_PX:
                del self._sprites[part.number]
        noise = np.random.default_rng((o.seed, index)).normal(0.0, 3.0, frame.shape).astype(np.float32)
        return np.clip(frame + noise, 0, 255).astype(np.uint8)

    def _plan_part(self, number: int, rng: np.random.Generator) -> PlannedPart:
        o = self.options
        kind = PART_TYPES[int(rng.integers(o.types))]
        chance = rng.random()
        defect = None
        for name, rate in (("scratch", o.scratch), ("stain", o.stain), ("foreign", o.foreign)):
            if chance < rate:
                defect = name
                break
            chance -= rate
        return PlannedPart(number, kind, defect, float(rng.normal(0, 3)), float(rng.normal(0, 4)),
                           float(rng.normal(1, 0.03)), int(rng.integers(2**31)))

    def _paste(self, frame: NDArray[np.float32], part: PlannedPart, x: float) -> None:
        if part.number not in self._sprites:
            self._sprites[part.number] = _draw_part(part)
        colour, alpha = self._sprites[part.number]
        matrix = cv2.getRotationMatrix2D((SPRITE_PX / 2, SPRITE_PX / 2), part.angle_deg, 1.0)
        matrix[0, 2] += x - SPRITE_PX / 2
        matrix[1, 2] += HEIGHT_PX / 2 + part.offset_y_px - SPRITE_PX / 2
        size = (WIDTH_PX, HEIGHT_PX)
        # The shadow first: it is what an evenly lit belt shows around any object.
        moved = cv2.warpAffine(alpha, matrix, size)[..., None]
        shadow = cv2.GaussianBlur(np.roll(moved, (3, 3), axis=(0, 1)), (0, 0), 4)[..., None]
        frame *= 1 - 0.35 * shadow
        drawn = cv2.warpAffine(colour, matrix, size).astype(np.float32) * part.gain
        frame[:] = frame * (1 - moved) + drawn * moved


class SyntheticSource:
    """A conveyor as a camera. `spec`: `seed=1,parts=60,...` (fields of ConveyorOptions), may be empty."""

    kind = "synthetic"
    live = False

    def __init__(self, spec: str, pace: str = "source") -> None:
        self.conveyor = Conveyor(_parse_options(spec))
        self._pacer = Pacer(self.conveyor.options.fps if pace == "source" else None)
        self._closed = False

    def __iter__(self) -> Iterator[Frame]:
        for index in range(self.conveyor.n_frames):
            if self._closed:
                return
            self._pacer.wait()
            yield Frame.now(self.conveyor.render(index), index)

    def close(self) -> None:
        self._closed = True
        self._pacer.stop()


def _parse_options(spec: str) -> ConveyorOptions:
    known: Mapping[str, type] = {"seed": int, "parts": int, "types": int} | dict.fromkeys(
        ("fps", "speed_px", "spacing_px", "scratch", "stain", "foreign"), float)
    values: dict[str, float] = {}
    for item in filter(None, spec.split(",")):
        key, _, text = item.partition("=")
        if key not in known:
            raise CameraError("C-SPEC", f"source synthetic:{spec} has the option '{key}', expected one of {', '.join(known)}")
        try:
            values[key] = known[key](text)
        except ValueError:
            raise CameraError("C-SPEC", f"source synthetic:{spec} has {key}='{text}', expected a number") from None
    options = ConveyorOptions(**values)  # type: ignore[arg-type]
    if options.parts < 1 or options.fps <= 0 or not 1 <= options.types <= len(PART_TYPES):
        raise CameraError("C-SPEC", f"source synthetic:{spec}: expected parts >= 1, fps > 0 and types 1 to {len(PART_TYPES)}")
    return options


def _draw_belt(rng: np.random.Generator) -> Image:
    width = 4 * WIDTH_PX
    weave = rng.normal(0, 1, (HEIGHT_PX, width)).astype(np.float32)
    weave = cv2.GaussianBlur(weave, (0, 0), 1.2) * 6
    ribs = 4 * np.sin(np.arange(width) * 2 * np.pi / 12)[None, :]
    light = 8 * np.cos((np.arange(HEIGHT_PX) - HEIGHT_PX / 2) / HEIGHT_PX * np.pi)[:, None]
    grey = 46 + weave + ribs + light
    return np.clip(grey[..., None] * np.array([1.02, 1.0, 0.97]), 0, 255).astype(np.uint8)


def _draw_part(part: PlannedPart) -> tuple[Image, NDArray[np.float32]]:
    """Returns colour (S, S, 3) and coverage (S, S) in 0..1, drawn at 4x and averaged down."""
    rng = np.random.default_rng(part.seed)
    s = 4
    side = SPRITE_PX * s
    colour = np.zeros((side, side, 3), np.uint8)
    alpha = np.zeros((side, side), np.uint8)
    {"plate": _plate, "ring": _ring, "bracket": _bracket, "foreign": _bolt}["foreign" if part.defect == "foreign" else part.kind](colour, alpha, s)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (side, side // 8)).astype(np.float32), (0, 0), 1.5)
    grain = cv2.resize(grain, (side, side)) * 5
    shaded = colour.astype(np.float32) + np.where(alpha > 0, grain, 0)[..., None]
    if part.defect == "scratch":
        _scratch(shaded, alpha, rng, s)
    elif part.defect == "stain":
        _stain(shaded, alpha, rng, s)
    small = cv2.resize(np.clip(shaded, 0, 255), (SPRITE_PX, SPRITE_PX), interpolation=cv2.INTER_AREA)
    cover = cv2.resize(alpha.astype(np.float32) / 255, (SPRITE_PX, SPRITE_PX), interpolation=cv2.INTER_AREA)
    return small.astype(np.uint8), cover


def _plate(colour: Image, alpha: Image, s: int) -> None:
    cv2.rectangle(colour, (20 * s, 34 * s), (108 * s, 94 * s), (186, 182, 176), -1)
    cv2.rectangle(alpha, (20 * s, 34 * s), (108 * s, 94 * s), 255, -1)
    for x in (38, 90):
        cv2.circle(alpha, (x * s, 64 * s), 9 * s, 0, -1)
    cv2.rectangle(colour, (54 * s, 50 * s), (74 * s, 78 * s), (150, 146, 140), -1)


def _ring(colour: Image, alpha: Image, s: int) -> None:
    cv2.circle(colour, (64 * s, 64 * s), 42 * s, (92, 170, 206), -1)
    cv2.circle(alpha, (64 * s, 64 * s), 42 * s, 255, -1)
    cv2.circle(colour, (64 * s, 64 * s), 30 * s, (72, 140, 176), 3 * s)
    cv2.circle(alpha, (64 * s, 64 * s), 16 * s, 0, -1)


def _bracket(colour: Image, alpha: Image, s: int) -> None:
    outline = np.array([(28, 26), (62, 26), (62, 70), (102, 70), (102, 102), (28, 102)]) * s
    cv2.fillPoly(colour, [outline], (150, 104, 70))
    cv2.fillPoly(alpha, [outline], 255)
    for x, y in ((45, 42), (86, 86)):
        cv2.circle(colour, (x * s, y * s), 7 * s, (96, 66, 44), -1)


def _bolt(colour: Image, alpha: Image, s: int) -> None:
    """The foreign object: a hexagon bolt, unlike every part type."""
    hexagon = np.array([(64 + 20 * math.cos(a), 36 + 20 * math.sin(a)) for a in np.arange(6) * math.pi / 3])
    for canvas, value in ((colour, (60, 62, 66)), (alpha, 255)):
        cv2.fillPoly(canvas, [(hexagon * s).astype(int)], value)
        cv2.rectangle(canvas, (55 * s, 50 * s), (73 * s, 112 * s), value, -1)
    for y in range(58, 112, 6):
        cv2.line(colour, (55 * s, y * s), (73 * s, (y + 3) * s), (110, 112, 116), s)


def _scratch(shaded: NDArray[np.float32], alpha: Image, rng: np.random.Generator, s: int) -> None:
    cy, cx = _point_on_part(alpha, rng)
    angle, half = rng.uniform(0, math.pi), rng.uniform(18, 28) * s
    line = np.zeros(alpha.shape, np.uint8)
    dx, dy = half * math.cos(angle), half * math.sin(angle)
    cv2.line(line, (int(cx - dx), int(cy - dy)), (int(cx + dx), int(cy + dy)), 255, int(3 * s), cv2.LINE_AA)
    shaded += (np.minimum(line, alpha) > 0)[..., None] * np.float32(rng.choice((-90.0, 75.0)))


def _stain(shaded: NDArray[np.float32], alpha: Image, rng: np.random.Generator, s: int) -> None:
    cy, cx = _point_on_part(alpha, rng)
    blob = np.zeros(alpha.shape, np.float32)
    for _ in range(3):
        centre = (int(cx + rng.normal(0, 4) * s), int(cy + rng.normal(0, 4) * s))
        cv2.circle(blob, centre, int(rng.uniform(8, 12) * s), 1.0, -1)
    blob = cv2.GaussianBlur(blob, (0, 0), 1.5 * s) * (alpha > 0)
    shaded *= 1 - 0.65 * blob[..., None] * np.array([1.0, 0.85, 0.7], np.float32)


def _point_on_part(alpha: Image, rng: np.random.Generator) -> tuple[int, int]:
    """A random point well inside the part, so that the defect is visible."""
    inside = cv2.erode(alpha, np.ones((33, 33), np.uint8))
    rows, columns = np.nonzero(inside)
    pick = int(rng.integers(len(rows)))
    return int(rows[pick]), int(columns[pick])
