"""Draw docs/overview.png, the picture at the top of README.md; twice as large as it is saved, for smooth edges.

python docs/overview.py runs/digits/samples/merged  # a folder of sample_ddp.py's: its first images are shown
"""

import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

Canvas = ImageDraw.ImageDraw
LEFT = 492  # where the drawings begin
RIGHT = 2320
MIDDLE = 1406
GAP = 52  # between the boxes of two ranges
STEP = (RIGHT - LEFT + GAP) / 4  # from one range to the next
COLOURS = ("#1f7a8c", "#3f5fa8", "#7d4a9e", "#c2456d")  # of the ranges
INK = "#1c2636"
GREY = "#5b6675"
WORDS = {  # heading → where it stands, the lines below it
    "Noise": (132, "one digit from", "t = 0 to t = 999"),
    "Decouple": (424, "one finetuned", "copy per range"),
    "Merge": (704, "into one network"),
    "Sample": (988, "images from the", "merged network"),
}
SHAPES = {  # glyphs that Pillow's font lacks: width and corners, in ems above the baseline
    "Σ": (0.66, [(0.56, 0.58), (0.56, 0.7), (0.08, 0.7), (0.36, 0.35), (0.08, 0), (0.56, 0), (0.56, 0.12)]),
    "–": (0.5, [(0.02, 0.28), (0.48, 0.28)]),
}


def write(draw: Canvas, x: float, y: float, line: str, size: int, fill: str, bold: int = 0, centred=False) -> None:
    """Write a line that starts, or has its centre, at x; its baseline is y, `_k` is a subscript."""
    parts = re.findall(r"_\w|[Σ–]|[^_Σ–]+", line)
    fonts = [ImageFont.load_default(0.66 * size if part[0] == "_" else size) for part in parts]
    texts = [part.lstrip("_") for part in parts]
    widths = [SHAPES[t][0] * size if t in SHAPES else font.getlength(t) for t, font in zip(texts, fonts, strict=True)]
    x -= sum(widths) / 2 if centred else 0
    for part, text, font, width in zip(parts, texts, fonts, widths, strict=True):
        if text in SHAPES:
            draw.line([(x + a * size, y - b * size) for a, b in SHAPES[text][1]], fill, round(0.085 * size), "curve")
        else:
            draw.text((x, y + 0.16 * size * (part != text)), text, fill, font, "ls", stroke_width=bold)
        x += width


def arrow(draw: Canvas, x: float, top: int, bottom: int, fill: str) -> None:
    """Draw a line downwards that ends in a triangle."""
    draw.line([(x, top), (x, bottom - 16)], fill, 6)
    draw.polygon([(x - 16, bottom - 22), (x + 16, bottom - 22), (x, bottom)], fill)


def noised(digit: np.ndarray, timestep: int) -> Image.Image:
    """√ᾱ x₀ + √(1 − ᾱ) ε as an image."""
    kept = np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: timestep + 1])
    pixels = kept**0.5 * digit + (1 - kept) ** 0.5 * np.random.default_rng(timestep).standard_normal(digit.shape)
    return Image.fromarray(((pixels.clip(-1, 1) + 1) * 127.5).astype(np.uint8)).resize((128, 128))


def main(samples: Path) -> None:
    """Draw the picture from top to bottom."""
    picture = Image.new("RGB", (2400, 1216), "white")
    draw = ImageDraw.Draw(picture)
    for heading, (y, *lines) in WORDS.items():
        write(draw, 80, y, heading, 60, INK, bold=1)
        for number, line in enumerate(lines):
            write(draw, 80, y + 64 + 54 * number, line, 46, GREY)
    digit = load_digits().images[0] / 8 - 1
    timesteps = np.linspace(0, 999, 12).round().astype(int)
    for k, colour in enumerate(COLOURS):
        left, centre, right = (LEFT + k * STEP + part * (STEP - GAP) for part in (0, 0.5, 1))
        for i, timestep in enumerate(timesteps[3 * k : 3 * k + 3]):
            picture.paste(noised(digit, timestep), (round(left + i * (right - left - 128) / 2), 80))
        draw.line([(left, 226), (left, 246), (right, 246), (right, 226)], colour, 8, "curve")
        write(draw, centre, 306, f"{250 * k}–{250 * (k + 1)}", 50, colour, bold=1, centred=True)
        arrow(draw, centre, 330, 384, colour)
        draw.rounded_rectangle([left, 392, right, 512], 24, colour)
        write(draw, centre, 470, f"expert {k + 1}", 56, "white", bold=1, centred=True)
        arrow(draw, centre, 520, 634, colour)
        write(draw, centre + 32, 590, f"w_{k + 1}", 50, colour, bold=1)
        stripe = [left - GAP / 2 * (k > 0), 642, right + GAP / 2 * (k < 3), 664]
        draw.rounded_rectangle(stripe, 20, colour, corners=(k == 0, k == 3, False, False))
    draw.rounded_rectangle([LEFT, 664, RIGHT, 800], 20, INK, corners=(False, False, True, True))
    write(draw, MIDDLE, 752, "merged = pretrained + Σ w_k (finetuned_k – pretrained)", 60, "white", centred=True)
    arrow(draw, MIDDLE, 808, 876, INK)
    for i, file in enumerate(sorted(samples.glob("*.png"))[:28] or sys.exit(f"{samples}: no images")):
        image = Image.open(file).convert("L").resize((112, 112))
        picture.paste(image, (round(LEFT + i % 14 * (RIGHT - LEFT - 112) / 13), 896 + i // 14 * 132))
    picture.reduce(2).quantize(256).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits/samples/merged"))
