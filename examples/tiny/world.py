"""A world that two CPU cores can learn: a rocket that flies in the direction of its nose.

A seed determines a scene, and one picture of it determines the clip: the rocket keeps its heading and moves by

    displacement per frame = SPEED * (motion_bucket_id / 127) / fps        (in shorter picture sides)

At the default bucket 127 and fps 7, it moves by 1/32 of the picture per frame. Lengths are in units of the shorter
side, so that pictures of every size show the same scene. x points to the right and y down; headings turn clockwise from
+x. Shapes are signed distances that are converted to coverage of pixels, which gives antialiased edges.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

SPEED = 7 / 32  # shorter picture sides per second at motion bucket 127
SCALE = 1.25  # of the rocket as drawn below, which is 0.4 long
MARGIN = 0.21  # least distance of the rocket's centre from the border: half its length, without the tip of the flame
FPS_RANGE = (6, 10)
BUCKET_RANGE = (16, 255)
HELD_OUT_START = 1_000_000_000  # training uses only smaller seeds

SKY_TOP, SKY_BOTTOM = (0.02, 0.03, 0.10), (0.10, 0.06, 0.22)  # the same in every scene; only the stars differ

Float = npt.NDArray[np.float32]
Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """The parameters of a clip. `start` is the centre of the rocket in frame 0; `stars` are (x, y, radius, light)."""

    seed: int
    heading: float  # radians
    start: tuple[float, float]
    body: Colour
    trim: Colour
    stars: tuple[tuple[float, float, float, float], ...]
    fps: int
    motion_bucket_id: int

    @property
    def direction(self) -> tuple[float, float]:
        """Unit vector (x, y) of the nose and of the flight."""
        return float(np.cos(self.heading)), float(np.sin(self.heading))

    @property
    def displacement(self) -> float:
        """Movement of the rocket per frame, in shorter picture sides."""
        return displacement(self.motion_bucket_id, self.fps)


def displacement(motion_bucket_id: float, fps: float) -> float:
    """Movement per frame, in shorter picture sides."""
    return SPEED * (motion_bucket_id / 127) / fps


def held_out_seeds(count: int) -> Iterator[int]:
    """The first `count` seeds that are held out from training."""
    return iter(range(HELD_OUT_START, HELD_OUT_START + count))


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def make_scene(
    seed: int,
    num_frames: int = 8,
    fps: int | None = None,
    motion_bucket_id: int | None = None,
    aspect: float = 1.0,
) -> Scene:
    """Draws a scene from `seed`. The rocket stays in view for `num_frames` frames if its speed allows that.

    `fps` and `motion_bucket_id` are drawn too if they are None. Their values change only the start of the rocket, not
    how the scene looks. `aspect` is width / height.
    """
    rng = np.random.default_rng(seed)
    drawn_fps = int(rng.integers(FPS_RANGE[0], FPS_RANGE[1] + 1))
    drawn_bucket = int(rng.integers(BUCKET_RANGE[0], BUCKET_RANGE[1] + 1))
    fps = drawn_fps if fps is None else fps
    motion_bucket_id = drawn_bucket if motion_bucket_id is None else motion_bucket_id
    heading = float(rng.uniform(0, 2 * np.pi))
    place = rng.uniform(0, 1, 2)
    hue = float(rng.uniform())
    width, height = max(aspect, 1.0), max(1 / aspect, 1.0)
    stars: list[tuple[float, float, float, float]] = []
    if rng.uniform() < 0.5:
        for _ in range(int(rng.integers(2, 6))):
            x, y, r, light = rng.uniform(0, 1, 4)
            stars.append((x * width, y * height, 0.012 + 0.012 * r, 0.35 + 0.4 * light))
    scene = Scene(
        seed=seed,
        heading=heading,
        start=(0.0, 0.0),
        body=_hsv(hue, 0.12, 0.97),
        trim=_hsv(hue, 0.85, 0.92),
        stars=tuple(stars),
        fps=fps,
        motion_bucket_id=motion_bucket_id,
    )
    travel = scene.displacement * (num_frames - 1)
    start = [
        _place(float(u), travel * c, side) for u, c, side in zip(place, scene.direction, (width, height), strict=True)
    ]
    return replace(scene, start=(start[0], start[1]))


def _place(u: float, travel: float, side: float) -> float:
    """A start from which `travel` stays in [MARGIN, side - MARGIN], or a centred flight if it is too long for that."""
    low, high = MARGIN - min(travel, 0.0), side - MARGIN - max(travel, 0.0)
    return low + u * (high - low) if high > low else (low + high) / 2


def _cover(distance: Float, pixel: float) -> Float:
    """The covered share of a pixel, from the signed distance (negative inside) to the edge."""
    cover: Float = np.clip(0.5 - distance / pixel, 0.0, 1.0).astype(np.float32)
    return cover


def _polygon(u: Float, v: Float, corners: list[tuple[float, float]]) -> Float:
    """A bound of the signed distance to a convex polygon with counter-clockwise corners (u right, v up)."""
    distance = np.full_like(u, -np.inf)
    for (u0, v0), (u1, v1) in zip(corners, corners[1:] + corners[:1], strict=True):
        length = float(np.hypot(u1 - u0, v1 - v0))
        np.maximum(distance, ((v1 - v0) * (u - u0) - (u1 - u0) * (v - v0)) / length, out=distance)
    return distance


def _paint(canvas: Float, cover: Float, colour: Colour) -> None:
    canvas += cover[..., None] * (np.asarray(colour, np.float32) - canvas)


def _grid(height: int, width: int) -> tuple[Float, Float, float]:
    pixel = 1.0 / min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5) * pixel
    y = (np.arange(height, dtype=np.float32) + 0.5) * pixel
    return x[None, :], y[:, None], pixel


def draw_sky(scene: Scene, height: int, width: int) -> Float:
    """The picture without the rocket, `[H,W,3]` in [0,1]."""
    x, y, pixel = _grid(height, width)
    blend = np.broadcast_to((y / (height * pixel))[..., None], (height, width, 3))
    top, bottom = np.asarray(SKY_TOP, np.float32), np.asarray(SKY_BOTTOM, np.float32)
    sky = np.ascontiguousarray(top + blend * (bottom - top), np.float32)
    for star_x, star_y, radius, light in scene.stars:
        distance = np.hypot(x - star_x, y - star_y) - radius
        _paint(sky, light * _cover(distance.astype(np.float32), 2 * pixel), (1.0, 1.0, 0.9))
    return sky


def draw_frames(scene: Scene, frames: npt.ArrayLike, height: int, width: int) -> Float:
    """The frames with the given numbers, which may be fractions, as `[F,H,W,3]` float32 in [0,1]."""
    x, y, pixel = _grid(height, width)
    step = scene.displacement * np.asarray(frames, np.float32).reshape(-1, 1, 1)
    cos, sin = scene.direction
    dx, dy = x - (scene.start[0] + step * cos), y - (scene.start[1] + step * sin)
    u, v = (
        ((dx * cos + dy * sin) / SCALE).astype(np.float32),
        ((dy * cos - dx * sin) / SCALE).astype(np.float32),
    )
    pixel /= SCALE
    canvas = np.repeat(draw_sky(scene, height, width)[None], len(step), axis=0)
    side = np.abs(v)  # the rocket is symmetric about its axis
    flame = _polygon(u, v, [(-0.115, -0.042), (-0.115, 0.042), (-0.215, 0.0)])
    _paint(canvas, _cover(flame, pixel), (1.0, 0.55, 0.05))
    _paint(canvas, _cover(flame + 0.018, pixel), (1.0, 0.95, 0.45))
    fin = _polygon(u, side, [(-0.125, 0.0), (-0.125, 0.105), (-0.09, 0.105), (0.0, 0.05), (0.0, 0.0)][::-1])
    _paint(canvas, _cover(fin, pixel), scene.trim)
    hull = np.maximum(side - 0.055, np.abs(u + 0.01) - 0.105)
    _paint(canvas, _cover(hull, pixel), scene.body)
    nose = _polygon(u, v, [(0.095, -0.055), (0.185, 0.0), (0.095, 0.055)])
    _paint(canvas, _cover(nose, pixel), scene.trim)
    window = np.hypot(u - 0.035, v) - 0.028
    _paint(canvas, _cover(window.astype(np.float32), pixel), (0.1, 0.2, 0.45))
    return canvas


def draw_clip(scene: Scene, num_frames: int = 8, height: int = 32, width: int = 32) -> npt.NDArray[np.uint8]:
    """The true clip, `[F,H,W,3]` uint8. Frame 0 is the input picture of the model."""
    return np.round(draw_frames(scene, np.arange(num_frames), height, width) * 255).astype(np.uint8)
