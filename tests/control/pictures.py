"""A picture of things for the tests of conditions."""

from __future__ import annotations

from PIL import Image, ImageDraw


def scene(width: int = 60, height: int = 44) -> Image.Image:
    image = Image.new("RGB", (width, height), (240, 240, 236))
    draw = ImageDraw.Draw(image)
    draw.rectangle((6, 8, 25, 30), fill=(200, 30, 40))
    draw.ellipse((34, 12, 54, 32), fill=(20, 60, 200))
    return image
