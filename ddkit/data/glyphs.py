"""The built-in practice images: letters of random position, size, angle and colors on a noisy background.

They need no download. Pillow's own font draws them, so they are the same wherever Pillow draws it the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ddkit.challenge import GLYPHS
from ddkit.data.class_names import CLASS_NAMES
from ddkit.data.listing import PixelSplit, Source

LETTERS = CLASS_NAMES["glyphs"]
PER_CLASS = {"train": 500, "test": 100}

_load_font = functools.cache(ImageFont.load_default)
_SIDE = GLYPHS.image_size
_SCALE = 2  # letters are drawn larger and reduced, so that turned edges are smooth
_SEED = 2024
_ANGLE = 20.0  # degrees either way
_FONT_SIZES = (19, 27)  # pixels of the finished image
_SHIFT = 4.0  # pixels of the finished image either way


def source() -> Source:
    """Both splits, drawn when they are asked for."""
    return Source("drawn letters", None, LETTERS, {split: _split(split, count) for split, count in PER_CLASS.items()})


def _split(split: str, per_class: int) -> PixelSplit:
    def blocks() -> Iterator[NDArray[np.uint8]]:
        for label in range(len(LETTERS)):
            yield np.stack([draw(split, label, index) for index in range(per_class)])

    return PixelSplit(tuple(label for label in range(len(LETTERS)) for _ in range(per_class)), _SIDE, blocks)


def draw(split: str, label: int, index: int) -> NDArray[np.uint8]:
    """Image `index` of a class, (3, 32, 32) uint8; the same whenever it is drawn."""
    random = np.random.default_rng([_SEED, list(PER_CLASS).index(split), label, index])
    shape = _letter(LETTERS[label], random)
    # The letter is always lighter than the background, so that it can be read.
    ground, ink = random.uniform(0.25, 0.55, 3), random.uniform(0.75, 1.0, 3)
    slope, across = random.uniform(-0.12, 0.12, (2, 3, 1, 1)), np.linspace(-1, 1, _SIDE)  # light falls off across it
    picture = ground[:, None, None] + (slope[0] * across + slope[1] * across[:, None])
    picture += random.normal(0, 0.04, picture.shape)
    picture += shape * (ink[:, None, None] - picture) * random.uniform(0.9, 1.0)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _letter(name: str, random: np.random.Generator) -> NDArray[np.floating]:
    """The share of each pixel that the letter covers, (S, S) in [0, 1]."""
    side = _SIDE * _SCALE
    canvas = Image.new("L", (side, side))
    font = _load_font(int(random.integers(_FONT_SIZES[0], _FONT_SIZES[1] + 1)) * _SCALE)
    ImageDraw.Draw(canvas).text((side / 2, side / 2), name, fill=255, font=font, anchor="mm", stroke_width=2)
    shift = random.uniform(-_SHIFT, _SHIFT, 2) * _SCALE
    left, down = shift.round().astype(int).tolist()
    turned = canvas.rotate(random.uniform(-_ANGLE, _ANGLE), Image.Resampling.BILINEAR, translate=(left, down))
    return np.asarray(turned.reduce(_SCALE), np.float32) / 255
