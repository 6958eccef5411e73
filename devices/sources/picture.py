"""One compressed picture as a frame. Decoders fill in what a damaged picture lacks; this says so instead."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from devices.frame import Frame
from devices.sources.decoder_words import WORDS

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
TAIL_BYTES = 64  # cameras pad behind the end mark
FILL_LEVEL = 128  # what a JPEG decoder shows where the data ended
MIN_FILLED_ROWS = 4


def decode_picture(data: bytes, where: str, index: int, *, check_damage: bool = True) -> Frame:
    """The picture, or a faulty frame: F-DECODE no picture, F-TOO-LARGE, F-DAMAGED a JPEG whose end is missing."""
    if not data:
        return Frame.faulty("F-DECODE", f"{where}: empty (0 bytes)", index)
    is_jpeg = data.startswith(JPEG_START)
    is_cut = is_jpeg and JPEG_END not in data[-TAIL_BYTES:]
    WORDS.clear()
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        code = "F-TOO-LARGE" if "MAX_IMAGE" in error.err or "pixels" in error.err else "F-DECODE"
        return Frame.faulty(code, f"{where}: {error.err}", index)
    if image is None and is_cut:
        return Frame.faulty("F-DAMAGED", f"{where}: the picture ends before its end mark ({len(data)} bytes)", index)
    if image is None:
        return Frame.faulty("F-DECODE", f"{where}: not an image ({len(data)} bytes)", index)
    if image.dtype != np.uint8:
        return Frame.faulty("F-DECODE", f"{where}: {image.dtype} pixels, expected 8 bits per channel", index)
    picture = np.asarray(image, np.uint8)
    complaint = WORDS.take() if is_jpeg else None
    if is_jpeg and check_damage:
        rows = filled_rows(picture)
        if is_cut or rows >= MIN_FILLED_ROWS:
            detail = f"{rows} of {len(picture)} rows were filled in" if rows else "its end mark is missing"
            return Frame.faulty("F-DAMAGED", f"{where}: the picture is damaged, {detail}", index)
        if complaint is not None:
            return Frame.faulty("F-DAMAGED", f"{where}: the picture is damaged, the decoder says: {complaint}", index)
    return Frame.now(picture, index)


def filled_rows(image: NDArray[np.uint8]) -> int:
    """Rows at the bottom that a JPEG decoder has filled in for missing data: exactly mid-grey. A picture that is all grey has none."""
    if not (image[-1] == FILL_LEVEL).all():
        return 0
    is_filled = (image == FILL_LEVEL).all(axis=(1, 2))
    return 0 if is_filled.all() else int(np.argmin(is_filled[::-1]))
