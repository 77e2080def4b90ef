"""`make demo`: one prompt, made exact and accelerated with the shipped model, side by side, with the run report."""

from __future__ import annotations

import sys
from pathlib import Path

PROMPT = "a red apple, 3d render"
METHOD = "delta-cache"
FOLDER = Path("outputs/demo")


def main() -> int:
    """Make both pictures, save them and their comparison, and print what was measured."""
    from PIL import Image, ImageDraw

    from pipelines.compare import difference
    from pipelines.generate import generate
    from pipelines.request import Request

    prompt = " ".join(sys.argv[1:]) or PROMPT
    plain = Request(prompt=prompt, seed=7)
    generate(plain)  # loads the model and warms the machine up, so that both runs below are measured alike
    exact, fast = generate(plain), generate(plain.replace(accelerators=(METHOD,)))
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, result in (("exact", exact), ("accelerated", fast)):
        print(*result.save(FOLDER / f"{name}.png", overwrite=True), sep="\n")
    size, gap = 256, 16
    board = Image.new("RGB", (2 * size + 3 * gap, size + 3 * gap), "white")
    for i, (name, result) in enumerate((("exact", exact), ("accelerated", fast))):
        left = gap + i * (size + gap)
        board.paste(result.images[0].resize((size, size), Image.Resampling.LANCZOS), (left, gap))
        ImageDraw.Draw(board).text((left, size + gap + 8), name, fill="black")
    board.save(FOLDER / "side_by_side.png")
    seconds = [result.report["timings"]["denoise"] for result in (exact, fast)]
    print(FOLDER / "side_by_side.png")
    print(f"\nprompt       {prompt}")
    print(f"exact        {seconds[0]:.2f} s denoising; {exact.report['summary']}")
    print(f"accelerated  {seconds[1]:.2f} s denoising; {fast.report['summary']}")
    print(
        f"this picture {seconds[0] / seconds[1]:.2f}x faster; {difference(exact.images[0], fast.images[0])}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
