"""The figures set: jointed figures that move in rhythm, to pretrain on before real videos.

A torso with a head and up to five limbs; every joint swings with the period of its figure, to its
own extent. Some figures travel, some hop, some lean to and fro. One or two of them, of random
shapes, colours and sizes, in front of a still background with lines. Synthetic videos with ever
more properties of natural ones pretrain a VideoMAE nearly as well as natural videos do: Yu et al.,
arXiv 2410.24213. The class is where the figures travel.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from arvideo_ds.shards.synthetic import Surface, SyntheticSet, background

HEIGHT, WIDTH, FRAMES = 40, 50, 44
TRAVEL = {"left": -1, "nowhere": 0, "right": 1}
_MAX_LINES, _MAX_LIMBS = 6, 5


def render(kind: int, generator: np.random.Generator) -> np.ndarray:
    """One video, uint8, FRAMES x HEIGHT x WIDTH x 3."""
    frames = np.repeat(_scenery(generator)[None], FRAMES, axis=0)
    for _ in range(1 + int(generator.random() < 0.25)):
        Figure(generator, list(TRAVEL.values())[kind]).draw(frames)
    frames += generator.normal(0, generator.uniform(0, 4), frames.shape)  # a camera's noise
    return np.clip(frames, 0, 255).round().astype(np.uint8)


class Swing:
    """An angle, in radians, that swings around its middle once or twice in a period of frames."""

    def __init__(
        self, generator: np.random.Generator, period: float, middle: float, extent: float
    ) -> None:
        self._middle, self._extent = middle, generator.uniform(0, extent)
        self._speed = math.tau * generator.choice([1, 1, 1, 2]) / period
        self._phase = generator.uniform(0, math.tau)

    def __call__(self, frame: int) -> float:
        return self._middle + self._extent * math.sin(self._speed * frame + self._phase)


class Limb:
    """One or two parts of random length, on a torso."""

    def __init__(self, generator: np.random.Generator, period: float, size: float) -> None:
        self._place = generator.uniform(-0.5, 0.5)  # along the torso
        self._lengths = size * generator.uniform(0.35, 0.7, generator.integers(1, 3))
        self._radius = size * generator.uniform(0.06, 0.14)
        # Some hips are stiff.
        extent = 1.4 * (generator.random() < 0.8)
        self._hip = Swing(generator, period, generator.uniform(0, math.tau), extent)
        self._knee = Swing(generator, period, generator.uniform(-1, 1), 1.2)

    def cover(self, frame: int, middle: np.ndarray, torso: np.ndarray) -> np.ndarray:
        """The share of each pixel that it covers in a frame: H W, 0..1."""
        start, angle = middle + self._place * torso, self._hip(frame)
        covers = np.zeros((HEIGHT, WIDTH))
        for length in self._lengths:
            end = start + length * _direction(angle)
            covers = np.maximum(covers, line(start, end, self._radius))
            start, angle = end, angle + self._knee(frame)
        return covers


class Figure:
    """travel: -1 to the left, 1 to the right, 0 stays where it is."""

    def __init__(self, generator: np.random.Generator, travel: int) -> None:
        period, size = generator.uniform(8, 36), generator.uniform(10, 20)
        middle = (generator.uniform(0.3, 0.7) * WIDTH, generator.uniform(0.35, 0.65) * HEIGHT)
        speed = (generator.uniform(0.2, 1.6), generator.normal(0, 0.1))
        self._middle, self._velocity = np.array(middle), np.array(speed) * (travel, abs(travel))
        self._hop = generator.uniform(0, 0.25) * size * (generator.random() < 0.5)
        self._step = Swing(generator, 2 * period, 0, math.pi)
        upright = generator.normal(-math.pi / 2, 0.3)
        self._lean = Swing(generator, period, upright, 0.9 * (generator.random() < 0.3))
        self._length = size * generator.uniform(0.3, 0.6)
        self._width = size * generator.uniform(0.08, 0.2)
        self._head = size * generator.uniform(0.08, 0.16) * (generator.random() < 0.8)
        limbs = generator.integers(1, _MAX_LIMBS + 1)
        self._limbs = [Limb(generator, period, size) for _ in range(limbs)]
        self._surface, self._light = Surface(generator, WIDTH), generator.uniform(0.2, 1.1)

    def draw(self, frames: np.ndarray) -> None:
        """Draw it into frames F H W 3, 0..255."""
        x, y = _pixels(HEIGHT, WIDTH)
        for number, frame in enumerate(frames):
            middle = self._middle + self._velocity * (number - len(frames) / 2)
            middle[1] -= self._hop * abs(math.sin(self._step(number)))
            up = _direction(self._lean(number))
            torso = self._length * up
            top = middle + torso / 2
            parts = [line(middle - torso / 2, top, self._width)]
            if self._head:
                parts.append(line(top + self._head * up, top + 1.2 * self._head * up, self._head))
            parts += [limb.cover(number, middle, torso) for limb in self._limbs]
            share = np.maximum.reduce(parts)[..., None]
            colours = self._light * self._surface(x - middle[0], y - middle[1])
            frame[:] = frame * (1 - share) + np.clip(colours, 0, 255) * share


def line(
    start: np.ndarray, end: np.ndarray, radius: float, height: int = HEIGHT, width: int = WIDTH
) -> np.ndarray:
    """The share of each pixel that a line with round ends covers: height x width, 0..1.

    start, end: right and down, in pixels.
    """
    x, y = _pixels(height, width)
    right, down = end - start
    along = ((x - start[0]) * right + (y - start[1]) * down) / max(right**2 + down**2, 1e-6)
    along = np.clip(along, 0, 1)
    distance = np.hypot(x - start[0] - along * right, y - start[1] - along * down)
    return np.clip(0.5 - (distance - radius), 0, 1)


def _scenery(generator: np.random.Generator) -> np.ndarray:
    """A still background: HEIGHT x WIDTH x 3, 0..255."""
    picture = background(generator, WIDTH) * generator.uniform(0.5, 1)
    x, y = _pixels(WIDTH, WIDTH)
    waves = Surface(generator, WIDTH)(x - WIDTH / 2, y - WIDTH / 2)
    picture += 0.4 * generator.uniform(0, 1) * waves
    for _ in range(generator.integers(_MAX_LINES + 1)):
        start, end = generator.uniform(0, WIDTH, (2, 2))
        share = line(start, end, generator.uniform(0.3, 3), WIDTH, WIDTH)[..., None]
        picture = picture * (1 - share) + generator.uniform(0, 255, 3) * share
    return np.clip(picture[:HEIGHT], 0, 255)


def _pixels(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The middles of all pixels: right and down."""
    y, x = np.mgrid[:height, :width] + 0.5
    return x, y


def _direction(angle: float) -> np.ndarray:
    """Right and down; y grows downwards, so -pi / 2 is up."""
    return np.array([math.cos(angle), math.sin(angle)])


FIGURES = SyntheticSet(
    name="figures",
    splits={"train": 1500, "test": 150},
    classes=tuple(TRAVEL),
    rate=Fraction(25),
    draw=render,
)
