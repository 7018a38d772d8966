"""A procedural world of small landscapes: what the miniature models see, and the truth its judges are measured against.

A scene is seven attributes; its caption names all of them. A flaw (blur, noise, a wrong colour, ...) spoils a picture
*without the caption saying so*, so a model trained on the captions learns good and bad pictures alike, as web-scale
models do, and preference alignment has something to mend.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from palate.miniature.captions import ATTRIBUTES, COLOURS, Scene

SIZE = 64
SUPERSAMPLING = 4


FLAWS = ("blur", "washed", "noise", "dark", "tilt")


@dataclass(frozen=True)
class Flaw:
    """One way in which a picture is bad: ``kind`` is one of :data:`FLAWS`, ``strength`` lies in (0, 1]."""

    kind: str
    strength: float


def is_held_out(scene: Scene) -> bool:
    """Whether a scene belongs to the tenth that no preference pair uses: the unseen prompts of every evaluation."""
    digest = hashlib.sha256("|".join(map(str, scene.labels())).encode()).digest()
    return digest[0] % 10 == 0


def random_scene(rng: np.random.Generator) -> Scene:
    return Scene(*(str(rng.choice(values)) for values in ATTRIBUTES.values()))


_SKY_COLOURS = {
    "day": ((74, 150, 230), (190, 226, 250)),
    "dawn": ((142, 162, 222), (252, 204, 196)),
    "sunset": ((88, 44, 112), (255, 150, 64)),
    "night": ((8, 10, 36), (34, 42, 92)),
}
_GROUND_COLOURS = {
    "meadow": ((96, 176, 70), (44, 112, 44)),
    "sand": ((232, 200, 126), (184, 140, 74)),
    "snow": ((240, 244, 250), (186, 200, 220)),
    "water": ((58, 128, 194), (18, 60, 122)),
}
_LIGHT = {"day": (1.0, 1.0, 1.0), "dawn": (0.97, 0.88, 0.9), "sunset": (0.86, 0.68, 0.62), "night": (0.5, 0.53, 0.72)}
_PAINT = {
    "red": (212, 44, 40),
    "blue": (40, 84, 214),
    "yellow": (248, 206, 48),
    "purple": (142, 58, 180),
    "white": (242, 242, 244),
}
_TRUNK = (104, 68, 40)


class _Brush:
    """Draws shapes given in units of the shorter side, from the corner of the middle square, lit by the hour of the day."""

    def __init__(self, image: Image.Image, light: tuple[float, float, float]):
        self.draw, self.side, self.light = ImageDraw.Draw(image), min(image.size), light
        self.left, self.top = ((side / self.side - 1) / 2 for side in image.size)

    def across(self, share: float) -> float:
        """A place so far across the whole picture."""
        return share * (1 + 2 * self.left) - self.left

    def down(self, share: float) -> float:
        """A place so far down the whole picture."""
        return share * (1 + 2 * self.top) - self.top

    def at(self, *places: float) -> list[float]:
        """Pixels of x, y, x, y, ..."""
        return [(place + (self.top if i % 2 else self.left)) * self.side for i, place in enumerate(places)]

    def lit(self, colour: tuple[int, int, int], shade: float = 1.0) -> tuple[int, int, int]:
        r, g, b = (int(min(255, c * k * shade)) for c, k in zip(colour, self.light, strict=True))
        return r, g, b

    def polygon(self, points: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        self.draw.polygon(self.at(*(place for point in points for place in point)), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        self.draw.rectangle(self.at(x0, y0, x1, y1), fill=colour)

    def rounded(self, x0: float, y0: float, x1: float, y1: float, radius: float, colour: tuple[int, int, int]) -> None:
        self.draw.rounded_rectangle(self.at(x0, y0, x1, y1), radius * self.side, fill=colour)

    def disc(self, x: float, y: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
        self.draw.ellipse(self.at(x - rx, y - ry, x + rx, y + ry), fill=colour)


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    ramp = np.linspace(0.0, 1.0, height)[:, None, None]
    rows = np.asarray(top, np.float32) * (1 - ramp) + np.asarray(bottom, np.float32) * ramp
    return np.broadcast_to(rows, (height, width, 3)).astype(np.uint8)


def _backdrop(brush: _Brush, scene: Scene, horizon: float, rng: np.random.Generator) -> None:
    if scene.backdrop == "plain":
        return
    haze = np.asarray(_SKY_COLOURS[scene.sky][1], np.float32)
    for centre in (rng.uniform(0.12, 0.3), rng.uniform(0.68, 0.9), rng.uniform(0.4, 0.6)):
        height, width, centre = rng.uniform(0.17, 0.3), rng.uniform(0.2, 0.3), brush.across(centre)
        peak, rock = horizon - height, np.asarray(brush.lit((112, 108, 132)), np.float32)
        r, g, b = (int(c) for c in 0.75 * rock + 0.25 * haze)
        brush.polygon([(centre - width, horizon), (centre, peak), (centre + width, horizon)], (r, g, b))
        brush.polygon(
            [(centre, peak), (centre + width, horizon), (centre + 0.15 * width, horizon)],
            (int(r * 0.82), int(g * 0.82), int(b * 0.86)),
        )
        snow = 0.3
        brush.polygon(
            [
                (centre - snow * width, peak + snow * height),
                (centre, peak),
                (centre + snow * width, peak + snow * height),
                (centre, peak + 0.2 * height),
            ],
            brush.lit((244, 246, 252), 1.05),
        )


def _orb(brush: _Brush, scene: Scene, rng: np.random.Generator) -> None:
    x, share, r = brush.across(rng.uniform(0.2, 0.8)), rng.uniform(0.13, 0.2), 0.085
    y = brush.down(share)
    if scene.orb == "sun":
        brush.disc(x, y, r, r, (255, 238, 150))
        brush.disc(x, y, 0.78 * r, 0.78 * r, (255, 248, 196))
    elif scene.orb == "moon":
        sky = np.asarray(_SKY_COLOURS[scene.sky], np.float32)
        red, green, blue = (int(c) for c in sky[0] * (1 - share / 0.6) + sky[1] * (share / 0.6))
        brush.disc(x, y, r, r, (246, 246, 236))
        brush.disc(x + 0.55 * r, y - 0.25 * r, 0.88 * r, 0.88 * r, (red, green, blue))


def _subject(brush: _Brush, scene: Scene, x: float, base: float, k: float) -> None:
    paint = _PAINT[scene.colour]
    body, shade, light = brush.lit(paint), brush.lit(paint, 0.72), brush.lit(paint, 1.18)
    if scene.object == "house":
        brush.box(x - 0.14 * k, base - 0.17 * k, x + 0.14 * k, base, body)
        brush.box(x + 0.04 * k, base - 0.17 * k, x + 0.14 * k, base, shade)
        brush.polygon(
            [(x - 0.18 * k, base - 0.17 * k), (x, base - 0.33 * k), (x + 0.18 * k, base - 0.17 * k)], brush.lit((96, 60, 50))
        )
        brush.box(x - 0.04 * k, base - 0.11 * k, x + 0.02 * k, base, brush.lit((60, 40, 32)))
        brush.box(
            x + 0.065 * k,
            base - 0.12 * k,
            x + 0.115 * k,
            base - 0.07 * k,
            (255, 226, 140) if scene.sky == "night" else brush.lit((206, 228, 244)),
        )
    elif scene.object == "tree":
        brush.box(x - 0.026 * k, base - 0.18 * k, x + 0.026 * k, base, brush.lit(_TRUNK))
        for dx, dy, r in ((-0.075, -0.23, 0.1), (0.075, -0.23, 0.1), (0.0, -0.32, 0.115)):
            brush.disc(x + dx * k, base + dy * k, r * k, r * k, shade)
        for dx, dy, r in ((-0.085, -0.245, 0.08), (0.055, -0.25, 0.08), (-0.015, -0.335, 0.095)):
            brush.disc(x + dx * k, base + dy * k, r * k, r * k, body)
    elif scene.object == "tower":
        brush.polygon(
            [(x - 0.085 * k, base), (x - 0.06 * k, base - 0.38 * k), (x + 0.06 * k, base - 0.38 * k), (x + 0.085 * k, base)],
            body,
        )
        brush.polygon(
            [(x + 0.02 * k, base), (x + 0.02 * k, base - 0.38 * k), (x + 0.06 * k, base - 0.38 * k), (x + 0.085 * k, base)],
            shade,
        )
        brush.box(x - 0.09 * k, base - 0.43 * k, x + 0.09 * k, base - 0.38 * k, shade)
        for dx in (-0.09, -0.025, 0.04):
            brush.box(x + dx * k, base - 0.48 * k, x + (dx + 0.05) * k, base - 0.42 * k, body)
        brush.box(x - 0.03 * k, base - 0.3 * k, x + 0.01 * k, base - 0.22 * k, brush.lit((46, 40, 48)))
    elif scene.object == "sailboat":
        brush.polygon(
            [(x - 0.16 * k, base - 0.08 * k), (x + 0.16 * k, base - 0.08 * k), (x + 0.1 * k, base), (x - 0.1 * k, base)],
            brush.lit((112, 72, 44)),
        )
        brush.box(x - 0.012 * k, base - 0.42 * k, x + 0.012 * k, base - 0.08 * k, brush.lit(_TRUNK))
        brush.polygon([(x + 0.02 * k, base - 0.42 * k), (x + 0.02 * k, base - 0.1 * k), (x + 0.16 * k, base - 0.1 * k)], body)
        brush.polygon([(x - 0.02 * k, base - 0.36 * k), (x - 0.02 * k, base - 0.1 * k), (x - 0.13 * k, base - 0.1 * k)], shade)
    else:
        w = 0.05 * k
        brush.rounded(x - w, base - 0.38 * k, x + w, base, w, body)
        for sign, low, high in ((-1, 0.15, 0.29), (1, 0.19, 0.33)):
            inner, outer = x + sign * 0.03 * k, x + sign * 0.16 * k
            brush.rounded(min(inner, outer), base - (low + 0.07) * k, max(inner, outer), base - low * k, 0.034 * k, body)
            tip = x + sign * 0.128 * k
            brush.rounded(tip - 0.034 * k, base - high * k, tip + 0.034 * k, base - low * k, 0.034 * k, body)
        brush.box(x - 0.006 * k, base - 0.33 * k, x + 0.008 * k, base - 0.02 * k, light if scene.colour != "white" else shade)


def render(
    scene: Scene, rng: np.random.Generator, flaws: tuple[Flaw, ...] = (), size: tuple[int, int] = (SIZE, SIZE)
) -> Image.Image:
    """Draw a scene as an RGB picture of ``size`` (width, height). ``rng`` places what the caption leaves open; ``flaws`` spoil
    the result. What is drawn is as large as the shorter side wants, and its places spread over the longer one."""
    width, height = (side * SUPERSAMPLING for side in size)
    share = float(rng.uniform(0.56, 0.64))
    light = _LIGHT[scene.sky]
    rows = int(share * height)
    top, bottom = _GROUND_COLOURS[scene.ground]
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:rows] = _gradient(*_SKY_COLOURS[scene.sky], rows, width)
    near = tuple(int(c * k) for c, k in zip(top, light, strict=True))
    far = tuple(int(c * k) for c, k in zip(bottom, light, strict=True))
    canvas[rows:] = _gradient((near[0], near[1], near[2]), (far[0], far[1], far[2]), height - rows, width)
    image = Image.fromarray(canvas)
    brush = _Brush(image, light)
    horizon = brush.down(share)

    if scene.sky == "night":
        for _ in range(14):
            x, y, r = rng.uniform(0, 1), rng.uniform(0, share - 0.1), rng.uniform(0.006, 0.01)
            brush.disc(brush.across(x), brush.down(y), r, r, (226, 228, 250))
    _orb(brush, scene, rng)
    if scene.sky == "day":
        for _ in range(2):
            x, y = rng.uniform(0.05, 0.95), rng.uniform(0.28, 0.4)
            for dx, r in ((-0.06, 0.035), (0.0, 0.05), (0.065, 0.032)):
                brush.disc(brush.across(x) + dx, brush.down(y), 1.5 * r, 0.6 * r, (246, 250, 254))
    _backdrop(brush, scene, horizon, rng)
    if scene.ground == "water":
        for _ in range(7):
            x, y, w = brush.across(rng.uniform(0, 1)), brush.down(rng.uniform(share + 0.05, 0.98)), rng.uniform(0.06, 0.13)
            brush.box(x - w, y, x + w, y + 0.012, brush.lit((124, 180, 226)))
    elif scene.ground == "sand":
        brush.disc(brush.across(rng.uniform(0.1, 0.9)), brush.down(1.02), 0.5, 0.14, brush.lit((222, 182, 104)))
    elif scene.ground == "meadow":
        brush.disc(brush.across(rng.uniform(0.1, 0.9)), brush.down(1.02), 0.55, 0.15, brush.lit((66, 142, 56)))
    else:
        brush.disc(brush.across(rng.uniform(0.1, 0.9)), brush.down(1.02), 0.5, 0.13, brush.lit((250, 252, 255)))

    x = brush.across(float(rng.uniform(0.22, 0.32) if scene.side == "left" else rng.uniform(0.68, 0.78)))
    base, scale = horizon + float(rng.uniform(0.1, 0.18)), float(rng.uniform(1.05, 1.25))
    if scene.ground != "water":
        brush.disc(x, base, 0.16 * scale, 0.022 * scale, tuple(int(0.72 * c) for c in near))  # type: ignore[arg-type]
    _subject(brush, scene, x, base, scale)

    for flaw in flaws:
        if flaw.kind == "tilt":
            angle = math.copysign(8 + 14 * flaw.strength, rng.uniform(-1, 1))
            image = image.resize((int(width * 1.35), int(height * 1.35)), Image.Resampling.BILINEAR)
            image = image.rotate(angle, Image.Resampling.BILINEAR)
            left, upper = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, upper, left + width, upper + height))
    image = image.resize(size, Image.Resampling.BOX)
    for flaw in flaws:
        image = _spoil(image, flaw, rng)
    return image


def _spoil(image: Image.Image, flaw: Flaw, rng: np.random.Generator) -> Image.Image:
    if flaw.kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(1.2 + 2.0 * flaw.strength))
    pixels = np.asarray(image, np.float32)
    if flaw.kind == "washed":
        grey = pixels.mean(axis=2, keepdims=True)
        pixels = 150 + (0.55 - 0.25 * flaw.strength) * (0.35 * pixels + 0.65 * grey - 128)
    elif flaw.kind == "noise":
        pixels = pixels + rng.normal(0, 14 + 24 * flaw.strength, pixels.shape)
    elif flaw.kind == "dark":
        pixels = pixels * (0.5 - 0.28 * flaw.strength)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def random_flaws(rng: np.random.Generator, share: float) -> tuple[Flaw, ...]:
    """No flaw with probability ``1 - share``; otherwise one, and now and then two of different kinds."""
    if rng.uniform() >= share:
        return ()
    kinds = rng.choice(FLAWS, size=2 if rng.uniform() < 0.15 else 1, replace=False)
    return tuple(Flaw(str(kind), float(rng.uniform(0.25, 1.0))) for kind in kinds)


def appeal(flaws: tuple[Flaw, ...]) -> float:
    """The truth about a picture's looks, in [0, 1]: 1 without flaws."""
    return float(np.prod([1 - 0.85 * flaw.strength**0.5 for flaw in flaws]))


@dataclass(frozen=True)
class Shot:
    """One picture with its truth: what was asked for, what is shown, and how it was spoilt."""

    asked: Scene
    shown: Scene
    flaws: tuple[Flaw, ...]
    image: Image.Image

    @property
    def appeal(self) -> float:
        return appeal(self.flaws)


def shoot(
    scene: Scene,
    rng: np.random.Generator,
    *,
    flaw_share: float = 0.45,
    wrong_share: float = 0.08,
    size: tuple[int, int] = (SIZE, SIZE),
) -> Shot:
    """Take a picture of ``scene``: spoilt with probability ``flaw_share``, in a wrong colour with ``wrong_share``."""
    shown = scene
    if rng.uniform() < wrong_share:
        shown = replace(scene, colour=str(rng.choice([c for c in COLOURS if c != scene.colour])))
    flaws = random_flaws(rng, flaw_share)
    return Shot(scene, shown, flaws, render(shown, rng, flaws, size))
