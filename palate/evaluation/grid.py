"""One PNG: pairs of pictures, before beside after, each with its prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from palate.base.errors import UserError
from palate.base.files import write_atomically

PAPER, INK, FAINT, ACCENT = "#faf9f6", "#26241f", "#77736a", "#1f7a5a"
MARGIN, GAP, SEAM, LINES = 28, 28, 4, 3


def before_after_grid(
    prompts: Sequence[str],
    base_images: Sequence[Image.Image],
    tuned_images: Sequence[Image.Image],
    path: str | Path,
    *,
    columns: int = 3,
    tile: int = 224,
) -> None:
    """Write a PNG of ``columns`` pairs a row, every picture fitted into ``tile`` x ``tile`` pixels (Lanczos)."""
    if not len(prompts) == len(base_images) == len(tuned_images) or not len(prompts):
        raise UserError(
            f"{len(prompts)} prompts, {len(base_images)} and {len(tuned_images)} pictures; give as many of each, at least one"
        )
    columns = min(columns, len(prompts))
    rows = -(-len(prompts) // columns)
    label, caption = ImageFont.load_default(size=14), ImageFont.load_default(size=15)
    wide = 2 * tile + SEAM
    wrapped = [_wrap(prompt, caption, wide) for prompt in prompts]
    top, line = 24, 20
    heights = [top + tile + 8 + line * max(len(w) for w in wrapped[r * columns : (r + 1) * columns]) for r in range(rows)]
    size = (2 * MARGIN + columns * wide + (columns - 1) * GAP, 2 * MARGIN + sum(heights) + (rows - 1) * GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, lines in enumerate(wrapped):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * (wide + GAP), MARGIN + sum(heights[:row]) + row * GAP
        draw.text((x, y), "before", FAINT, label)
        draw.text((x + tile + SEAM, y), "after", ACCENT, label)
        sheet.paste(_fit(base_images[index], tile), (x, y + top))
        sheet.paste(_fit(tuned_images[index], tile), (x + tile + SEAM, y + top))
        for number, text in enumerate(lines):
            draw.text((x, y + top + tile + 8 + number * line), text, INK, caption)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    write_atomically(path, buffer.getvalue())


def _fit(image: Image.Image, tile: int) -> Image.Image:
    scale = tile / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGB", (tile, tile), PAPER)
    square.paste(small, ((tile - size[0]) // 2, (tile - size[1]) // 2))
    return square


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """At most three lines no wider than ``width``; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        # A single word wider than the line is cut into pieces that fit.
        while font.getlength(word) > width:
            cut = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines, word = [*lines, word[:cut]], word[cut:]
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [line for line in lines if line]
    if len(lines) > LINES:
        last = lines[LINES - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: LINES - 1], last.rstrip(" ,") + "…"]
    return lines
