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
from devices.settings import CameraSettings

WIDTH_PX, HEIGHT_PX = 480, 270
SPRITE_PX = 128  # side of the square a part is drawn in
PATCH_PX = 160  # side of the square that a turned part and its shadow touch
NOISE_SHIFT_PX = 61
PART_TYPES = ("plate", "ring", "bracket")
DEFECTS = ("scratch", "stain", "foreign")

Image = NDArray[np.uint8]
Canvas = NDArray[np.float32]


@dataclass(frozen=True)
class ConveyorOptions:
    """What the belt carries. Rates are shares of all parts; `foreign` replaces the part by an object of another kind."""

    seed: int = 0
    parts: int = 60
    fps: float = 30.0
    speed_px: float = 10.0  # per frame
    spacing_px: float = 170.0  # between part centres; the region of 160 px then holds one part at a time
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
        # One field of noise, read at another offset for every frame: drawing fresh noise would cost more than all the rest.
        self._noise = rng.normal(0.0, 3.0, (HEIGHT_PX + NOISE_SHIFT_PX, WIDTH_PX + NOISE_SHIFT_PX, 3)).astype(np.int16)
        self._sprites: dict[int, tuple[Canvas, Canvas]] = {}

    @property
    def n_frames(self) -> int:
        """Frames until the last part has left the picture."""
        o = self.options
        return math.ceil((WIDTH_PX + SPRITE_PX + o.parts * o.spacing_px) / o.speed_px)

    def render(self, index: int) -> Image:
        """Frame `index`: (HEIGHT_PX, WIDTH_PX, 3) uint8 BGR; parts move from right to left."""
        o = self.options
        travel = index * o.speed_px
        shift = int(travel) % (self._belt.shape[1] - WIDTH_PX)
        frame = self._belt[:, shift : shift + WIDTH_PX].astype(np.int16)
        for part in self.plan:
            x = WIDTH_PX + SPRITE_PX / 2 + (part.number - 1) * o.spacing_px - travel
            if -PATCH_PX / 2 < x < WIDTH_PX + PATCH_PX / 2:
                self._paste(frame, part, x)
            elif x <= -PATCH_PX / 2:
                self._sprites.pop(part.number, None)
        top, left = (int(v) for v in np.random.default_rng((o.seed, index)).integers(0, NOISE_SHIFT_PX, 2))
        frame += self._noise[top : top + HEIGHT_PX, left : left + WIDTH_PX]
        return np.clip(frame, 0, 255).astype(np.uint8)

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
        # Guide rails bound the position, the light is steady: uniform, without tails.
        return PlannedPart(
            number,
            kind,
            defect,
            float(rng.uniform(-4, 4)),
            float(rng.uniform(-6, 6)),
            float(rng.uniform(0.95, 1.05)),
            int(rng.integers(2**31)),
        )

    def _paste(self, frame: NDArray[np.int16], part: PlannedPart, x: float) -> None:
        """Blends the part, centred at column x, into the frame; only a patch around it is touched."""
        if part.number not in self._sprites:
            self._sprites[part.number] = _draw_part(part)
        colour, cover = self._sprites[part.number]
        left, top = math.floor(x - PATCH_PX / 2), math.floor(HEIGHT_PX / 2 + part.offset_y_px - PATCH_PX / 2)
        matrix = cv2.getRotationMatrix2D((SPRITE_PX / 2, SPRITE_PX / 2), part.angle_deg, 1.0)
        matrix[:, 2] += np.array([x - left - SPRITE_PX / 2, HEIGHT_PX / 2 + part.offset_y_px - top - SPRITE_PX / 2])
        moved = np.asarray(cv2.warpAffine(cover, matrix, (PATCH_PX, PATCH_PX)), np.float32)
        drawn = np.asarray(cv2.warpAffine(colour, matrix, (PATCH_PX, PATCH_PX)), np.float32)
        # A soft shadow first: it is what an evenly lit belt shows around any object.
        shadow = np.asarray(cv2.blur(np.roll(moved, (3, 3), axis=(0, 1)), (9, 9)), np.float32)
        rows, columns = (
            slice(max(0, top), min(HEIGHT_PX, top + PATCH_PX)),
            slice(max(0, left), min(WIDTH_PX, left + PATCH_PX)),
        )
        inner = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
        cover_here = moved[inner][..., None]
        belt = frame[rows, columns] * (1 - 0.35 * shadow[inner][..., None])
        frame[rows, columns] = belt * (1 - cover_here) + drawn[inner] * part.gain * cover_here


class SyntheticSource:
    """A conveyor as a camera. `spec`: `seed=1,parts=60,...` (fields of ConveyorOptions), may be empty."""

    kind = "synthetic"
    live = False

    def __init__(self, spec: str, settings: CameraSettings) -> None:
        self.conveyor = Conveyor(_parse_options(spec))
        fps = settings.fps or self.conveyor.options.fps
        self._pacer = Pacer(fps if settings.pace == "source" else None)
        self._loop, self._closed = settings.loop, False

    def __iter__(self) -> Iterator[Frame]:
        index = 0
        while not self._closed and (self._loop or index < self.conveyor.n_frames):
            self._pacer.wait()
            yield Frame.now(self.conveyor.render(index % self.conveyor.n_frames), index)
            index += 1

    def close(self) -> None:
        self._closed = True
        self._pacer.stop()


def _parse_options(spec: str) -> ConveyorOptions:
    known: Mapping[str, type] = {"seed": int, "parts": int, "types": int} | dict.fromkeys(
        ("fps", "speed_px", "spacing_px", "scratch", "stain", "foreign"), float
    )
    values: dict[str, float] = {}
    for item in filter(None, spec.split(",")):
        key, _, text = item.partition("=")
        if key not in known:
            raise CameraError(
                "C-SPEC", f"source synthetic:{spec} has the option '{key}', expected one of {', '.join(known)}"
            )
        try:
            values[key] = known[key](text)
        except ValueError:
            raise CameraError("C-SPEC", f"source synthetic:{spec} has {key}='{text}', expected a number") from None
    options = ConveyorOptions(**values)  # type: ignore[arg-type]
    if options.parts < 1 or options.fps <= 0 or not 1 <= options.types <= len(PART_TYPES):
        raise CameraError(
            "C-SPEC", f"source synthetic:{spec}: expected parts >= 1, fps > 0 and types 1 to {len(PART_TYPES)}"
        )
    return options


def _draw_belt(rng: np.random.Generator) -> Image:
    width = 4 * WIDTH_PX
    weave = np.asarray(cv2.GaussianBlur(rng.normal(0, 1, (HEIGHT_PX, width)), (0, 0), 1.2)) * 6
    ribs = 4 * np.sin(np.arange(width) * 2 * np.pi / 12)[None, :]
    light = 8 * np.cos((np.arange(HEIGHT_PX) - HEIGHT_PX / 2) / HEIGHT_PX * np.pi)[:, None]
    grey = 46 + weave + ribs + light
    return np.asarray(np.clip(grey[..., None] * np.array([1.02, 1.0, 0.97]), 0, 255), np.uint8)


def _draw_part(part: PlannedPart) -> tuple[Canvas, Canvas]:
    """Colour (S, S, 3) in grey levels and coverage (S, S) in 0..1, drawn at 4x and averaged down."""
    rng = np.random.default_rng(part.seed)
    s = 4
    side = SPRITE_PX * s
    colour = np.zeros((side, side, 3), np.uint8)
    alpha = np.zeros((side, side), np.uint8)
    drawers = {"plate": _plate, "ring": _ring, "bracket": _bracket, "foreign": _bolt}
    drawers["foreign" if part.defect == "foreign" else part.kind](colour, alpha, s)
    grain = cv2.resize(cv2.GaussianBlur(rng.normal(0, 1, (side, side // 8)), (0, 0), 1.5), (side, side))
    shaded = np.asarray(colour + np.where(alpha > 0, 5 * np.asarray(grain), 0)[..., None], np.float32)
    if part.defect == "scratch":
        _scratch(shaded, alpha, rng, s)
    elif part.defect == "stain":
        _stain(shaded, alpha, rng, s)
    size = (SPRITE_PX, SPRITE_PX)
    return (
        np.asarray(cv2.resize(np.clip(shaded, 0, 255), size, interpolation=cv2.INTER_AREA), np.float32),
        np.asarray(cv2.resize(alpha, size, interpolation=cv2.INTER_AREA), np.float32) / np.float32(255),
    )


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
    for canvas, value in ((colour, (138, 142, 150)), (alpha, 255)):
        cv2.fillPoly(canvas, [(hexagon * s).astype(int)], value)
        cv2.rectangle(canvas, (55 * s, 50 * s), (73 * s, 112 * s), value, -1)
    for y in range(58, 112, 6):
        cv2.line(colour, (55 * s, y * s), (73 * s, (y + 3) * s), (84, 88, 94), s)


def _scratch(shaded: Canvas, alpha: Image, rng: np.random.Generator, s: int) -> None:
    """Two or three nearly parallel lines, as something hard leaves them that slid over the part."""
    cy, cx = _point_on_part(alpha, rng)
    angle, half = rng.uniform(0, math.pi), rng.uniform(24, 34) * s
    line = np.zeros(alpha.shape, np.uint8)
    for n in range(int(rng.integers(2, 4))):
        tilt = angle + rng.uniform(-0.08, 0.08)
        dx, dy = half * math.cos(tilt), half * math.sin(tilt)
        x, y = cx - 9 * s * n * math.sin(angle), cy + 9 * s * n * math.cos(angle)
        cv2.line(line, (int(x - dx), int(y - dy)), (int(x + dx), int(y + dy)), 255, int(2.5 * s), cv2.LINE_AA)
    shaded += (np.minimum(line, alpha) > 0)[..., None] * np.float32(rng.choice((-90.0, 70.0)))


def _stain(shaded: Canvas, alpha: Image, rng: np.random.Generator, s: int) -> None:
    cy, cx = _point_on_part(alpha, rng)
    blob = np.zeros(alpha.shape, np.uint8)
    for _ in range(3):
        centre = (int(cx + rng.normal(0, 4) * s), int(cy + rng.normal(0, 4) * s))
        cv2.circle(blob, centre, int(rng.uniform(8, 12) * s), 255, -1)
    soft = np.asarray(cv2.GaussianBlur(blob, (0, 0), 1.5 * s), np.float32) / 255 * (alpha > 0)
    shaded *= 1 - 0.65 * soft[..., None] * np.array([1.0, 0.85, 0.7], np.float32)


def _point_on_part(alpha: Image, rng: np.random.Generator) -> tuple[int, int]:
    """A random point well inside the part, so that the defect is visible."""
    inside = cv2.erode(alpha, np.ones((33, 33), np.uint8))
    rows, columns = np.nonzero(inside)
    pick = int(rng.integers(len(rows)))
    return int(rows[pick]), int(columns[pick])
