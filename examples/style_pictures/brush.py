#!/usr/bin/env python3
"""Paints swirling brush strokes: layers of bristle marks that follow a flow field around bright vortices.

brush.py brush.png [--size 768] [--seed 3]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float64]

# Vortices: x, y, radius, strength and sense of rotation, in parts of the picture's side.
VORTICES = [
    (0.30, 0.30, 0.20, 1.0), (0.72, 0.22, 0.13, -1.0), (0.62, 0.52, 0.17, 1.0),
    (0.14, 0.68, 0.12, -1.0), (0.88, 0.66, 0.11, 1.0), (0.42, 0.82, 0.13, -1.0),
]  # fmt: skip
NIGHT = [
    (16, 28, 84),
    (24, 52, 132),
    (38, 88, 170),
    (72, 134, 196),
    (20, 72, 112),
    (122, 172, 204),
    (44, 56, 128),
]
GLOW = [(250, 214, 84), (255, 238, 166), (240, 168, 40), (226, 126, 34), (255, 248, 216)]
RIM = [(84, 160, 150), (150, 196, 160), (196, 208, 130), (58, 128, 160)]
EARTH = [
    (40, 84, 60),
    (84, 116, 52),
    (140, 132, 50),
    (176, 96, 40),
    (150, 52, 38),
    (28, 54, 66),
    (206, 160, 66),
]


class Flow:
    """The direction in which the strokes run, and what lies where."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.phase = rng.uniform(0, 2 * np.pi, 8)

    def direction(self, x: float, y: float) -> tuple[float, float]:
        """Unit direction at a place of the unit square: waves, bent around each vortex."""
        p = self.phase
        angle = (
            0.35 * np.sin(5.2 * x + p[0])
            + 0.30 * np.sin(7.1 * y + 3.0 * x + p[1])
            + 0.12 * np.sin(17 * x + p[2])
        )
        if y > self.horizon(x):
            angle += 0.5 + 0.5 * np.sin(9 * x + p[3])
        dx, dy = np.cos(angle), np.sin(angle)
        for vx, vy, radius, sense in VORTICES:
            rx, ry = x - vx, y - vy
            distance = np.hypot(rx, ry) + 1e-6
            pull = 2.6 * np.exp(-np.square(distance / radius))
            # Slightly inwards, so that strokes spiral.
            dx += pull * (-sense * ry - 0.18 * rx) / distance
            dy += pull * (sense * rx - 0.18 * ry) / distance
        length = np.hypot(dx, dy) + 1e-9
        return dx / length, dy / length

    def horizon(self, x: float) -> float:
        """Height of the hills' outline."""
        return 0.80 + 0.06 * np.sin(5 * x + self.phase[4]) + 0.03 * np.sin(13 * x + self.phase[5])

    def palette(self, x: float, y: float, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """The colours in use at a place: rings of glow around the vortices, night elsewhere, earth below."""
        for vx, vy, radius, _ in VORTICES:
            distance = np.hypot(x - vx, y - vy) / radius
            if distance < 0.32:
                return GLOW
            if distance < 1.0:
                chance = 0.62 * np.square(np.cos(np.pi * 1.7 * distance)) + 0.10
                if rng.random() < chance:
                    return GLOW
                return RIM if rng.random() < 0.45 else NIGHT
        if y > self.horizon(x):
            return EARTH
        if rng.random() < 0.05:
            return EARTH
        return RIM if rng.random() < 0.10 else NIGHT


def stroke(
    draw: ImageDraw.ImageDraw,
    flow: Flow,
    rng: np.random.Generator,
    place: tuple[float, float],
    length: float,
    width: float,
    scale: int,
) -> None:
    """Paints one stroke as a bundle of bristle marks of slightly different lightness.

    Args:
        draw: what to paint on.
        flow: direction and colours.
        rng: source of chance.
        place: middle of the stroke in the unit square.
        length: in parts of the side.
        width: in parts of the side.
        scale: side of the canvas, pixels.
    """
    steps = 9
    spine = [np.array(place)]
    for sense in (-1.0, 1.0):
        x, y = place
        for _ in range(steps // 2):
            dx, dy = flow.direction(x, y)
            x, y = x + sense * dx * length / steps, y + sense * dy * length / steps
            spine.insert(0 if sense < 0 else len(spine), np.array((x, y)))
    line = np.stack(spine)
    tangent = np.gradient(line, axis=0)
    normal = np.stack([-tangent[:, 1], tangent[:, 0]], 1)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    palette = flow.palette(*place, rng)
    base = np.array(palette[rng.integers(len(palette))], float) + rng.normal(0, 9, 3)
    bristles = max(4, round(width * scale / 2.4))
    # Paint piles up on one side of the stroke: it is lighter there and darker on the other.
    for index in range(bristles):
        across = (index + 0.5) / bristles * 2 - 1
        first, last = rng.integers(0, 2), len(line) - rng.integers(0, 2)
        taper = np.sin(np.linspace(0.25, np.pi - 0.25, len(line)))[:, None] ** 0.5
        points = (line + normal * taper * across * width / 2)[first:last] * scale
        shade = 1 + 0.20 * across + rng.normal(0, 0.10)
        colour = np.clip(base * shade + 16 * (across > 0.6) - 14 * (across < -0.7), 0, 255)
        thickness = max(2, round(width * scale / bristles * 1.25))
        draw.line(
            [tuple(point) for point in points],
            fill=tuple(int(c) for c in colour),
            width=thickness,
            joint="curve",
        )


def draw_picture(size: int, seed: int) -> Image.Image:
    """Paints the picture, ``size`` pixels a side: broad strokes first, fine ones over them."""
    rng = np.random.default_rng(seed)
    flow = Flow(rng)
    scale = 2 * size  # painted at twice the size and scaled down, which smooths the bristles
    canvas = Image.new("RGB", (scale, scale), (22, 36, 88))
    draw = ImageDraw.Draw(canvas)
    for count, length, width in ((900, 0.16, 0.030), (2200, 0.115, 0.019), (3000, 0.085, 0.0125)):
        # Jittered grid: every place is covered, no rows are seen.
        side = int(np.sqrt(count))
        cells = rng.permutation(side * side)
        for cell in cells:
            x = (cell % side + rng.uniform(-0.4, 1.4)) / side
            y = (cell // side + rng.uniform(-0.4, 1.4)) / side
            stroke(
                draw,
                flow,
                rng,
                (x, y),
                length * rng.uniform(0.7, 1.3),
                width * rng.uniform(0.75, 1.25),
                scale,
            )
    # Relief: light from the upper left on the ridges of paint.
    pixels = np.asarray(canvas, np.float32)
    height = np.asarray(canvas.convert("L").filter(ImageFilter.GaussianBlur(1.2)), np.float32)
    relief = height - np.roll(height, (2, 2), (0, 1))
    lit = np.clip(pixels + 0.55 * relief[..., None], 0, 255).astype(np.uint8)
    return Image.fromarray(lit).resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    """Reads the command line and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    draw_picture(options.size, options.seed).save(options.out)


if __name__ == "__main__":
    main()
