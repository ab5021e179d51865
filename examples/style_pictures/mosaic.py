#!/usr/bin/env python3
"""Draws a stained-glass window: jewel-coloured Voronoi panes with lead lines, lit from behind.

mosaic.py mosaic.png [--size 768] [--panes 420] [--seed 7]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[np.float32]

# Jewel tones, RGB: each group colours one part of the window.
SKY = [(14, 42, 148), (20, 84, 196), (24, 138, 214), (66, 186, 222), (72, 40, 150), (18, 24, 96)]
SUN = [(250, 186, 22), (252, 214, 70), (242, 132, 18), (255, 236, 150), (228, 84, 20)]
LAND = [(8, 110, 74), (22, 150, 92), (92, 178, 60), (6, 84, 100), (168, 200, 54)]
FLOWERS = [(196, 14, 42), (226, 38, 82), (150, 12, 88), (240, 92, 60), (124, 24, 130), (250, 240, 226)]


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> Array:
    """Random values on a coarse grid, smoothly scaled up to ``[size, size]``, about -1..1."""
    grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC))


def nearest_two(points: Array, size: int) -> tuple[NDArray[np.intp], Array]:
    """For each pixel of a unit square: the nearest point's index, and the pixels to its pane's edge.

    The edge between the two nearest points p and q is their bisector, at (|x-q|^2 - |x-p|^2) / (2 |p-q|)
    from x.
    """
    owner = np.empty((size, size), np.intp)
    edge = np.empty((size, size), np.float32)
    xs = (np.arange(size, dtype=np.float32) + 0.5) / size
    for row in range(size):
        distance = np.square(xs[:, None] - points[None, :, 0]) + np.square(xs[row] - points[None, :, 1])
        # Lead of even width needs the closest of several bisectors, not only that of the second-nearest
        # point.
        order = np.argpartition(distance, 6, axis=1)[:, :6]
        near = np.take_along_axis(distance, order, 1)
        rank = np.argsort(near, axis=1)
        order, near = np.take_along_axis(order, rank, 1), np.take_along_axis(near, rank, 1)
        owner[row] = order[:, 0]
        between = np.sqrt(np.square(points[order[:, 1:]] - points[order[:, :1]]).sum(2))
        edge[row] = ((near[:, 1:] - near[:, :1]) / (2 * between)).min(1) * size
    return owner, edge


def place_panes(rng: np.random.Generator, panes: int) -> Array:
    """Spreads points unevenly, small panes around the sun, and relaxes them once towards even shapes."""
    candidates = rng.uniform(-0.04, 1.04, (panes * 30, 2)).astype(np.float32)
    points = candidates[:1]
    for start in range(1, panes):
        # Best of several candidates: blue noise, denser where the scale is small.
        tries = candidates[start * 29 : start * 29 + 29]
        gap = np.sqrt(np.square(tries[:, None] - points[None]).sum(2)).min(1)
        scale = 0.45 + 0.9 * np.hypot(tries[:, 0] - 0.68, tries[:, 1] - 0.3)
        points = np.concatenate([points, tries[np.argmax(gap / scale)][None]])
    return points


def pane_colours(rng: np.random.Generator, points: Array) -> Array:
    """Chooses each pane's colour from the palette of the part of the window it lies in."""
    colours = np.empty((len(points), 3), np.float32)
    for index, (x, y) in enumerate(points):
        radius = np.hypot(x - 0.68, y - 0.3)
        horizon = 0.64 + 0.07 * np.sin(7 * x + 0.6)
        ring = (radius * 11) % 1
        if radius < 0.13 or (radius < 0.46 and ring < 0.34 and y < horizon):
            palette = SUN
        elif y < horizon:
            palette = SKY
        else:
            palette = FLOWERS if rng.random() < 0.42 else LAND
        if rng.random() < 0.10:
            palette = (SKY, SUN, LAND, FLOWERS)[rng.integers(4)]
        colours[index] = np.array(palette[rng.integers(len(palette))]) + rng.normal(0, 9, 3)
    return np.clip(colours, 0, 255)


def draw(size: int, panes: int, seed: int) -> Image.Image:
    """Draws the window, ``size`` pixels a side."""
    rng = np.random.default_rng(seed)
    big = 2 * size  # drawn at twice the size and scaled down, which smooths the lead lines
    points = place_panes(rng, panes)
    owner, edge = nearest_two(points, big)
    colours = pane_colours(rng, points)

    # Each pane is lit along its own direction, and thick or thin glass makes it lighter or darker.
    ys, xs = np.mgrid[0:big, 0:big].astype(np.float32) / big
    angle = rng.uniform(0, 2 * np.pi, len(points)).astype(np.float32)
    offset = (xs - points[owner, 0]) * np.cos(angle)[owner] + (ys - points[owner, 1]) * np.sin(angle)[owner]
    slope = rng.uniform(3.0, 9.0, len(points)).astype(np.float32)
    light = 1 + np.clip(offset * slope[owner], -0.38, 0.38)
    light *= 1 + 0.07 * smooth_noise(rng, big, 60) + 0.05 * smooth_noise(rng, big, 150)
    lead = 2.6 * big / 768
    depth = np.clip((edge - lead) / (big / 64), 0, 1)
    light *= 0.70 + 0.36 * depth  # the glass darkens towards the lead
    glass = colours[owner] * light[..., None]
    # A pale streak in each pane, where the light falls straight through.
    streak = np.exp(-np.square((offset * big - big / 150) / (big / 190))) * depth
    glass += (26 + 0.22 * (255 - colours[owner])) * streak[..., None]

    came = np.array([22, 19, 26], np.float32) * (1 + 0.5 * smooth_noise(rng, big, 200))[..., None]
    ridge = np.clip(1 - np.abs(edge - lead * 0.35) / (lead * 0.35), 0, 1)
    came = came + 46 * ridge[..., None] * np.clip(0.5 + smooth_noise(rng, big, 90), 0, 1)[..., None]
    cover = np.clip((lead - edge) / 1.5 + 0.5, 0, 1)[..., None]
    picture = Image.fromarray(np.clip(glass * (1 - cover) + came * cover, 0, 255).astype(np.uint8))
    # Bright panes bleed a little light over the lead.
    bloom = np.asarray(picture.filter(ImageFilter.GaussianBlur(big / 130)), np.float32)
    mixed = np.clip(np.asarray(picture, np.float32) + 0.10 * bloom, 0, 255).astype(np.uint8)
    return Image.fromarray(mixed).resize((size, size), Image.Resampling.LANCZOS)


def main() -> None:
    """Reads the command line and writes the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--panes", type=int, default=420)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    draw(options.size, options.panes, options.seed).save(options.out)


if __name__ == "__main__":
    main()
