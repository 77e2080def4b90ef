"""The strip of pictures in the README: exact above, accelerated below: `python -m benchmarks.strip`."""

from __future__ import annotations

import argparse
import json
import statistics

from PIL import Image, ImageDraw

from benchmarks.machine import RESULTS, ROOT, record, write_json
from pipelines.compare import difference
from pipelines.generate import generate
from pipelines.request import Request

PROMPTS = (
    "red apple, 3d render", "dog, cartoon", "pizza, flat illustration", "cat, black and white icon", "blue heart, 3d render",
    "cactus, cartoon", "strawberry, flat illustration", "penguin, cartoon",
)  # fmt: skip


def main() -> None:
    """Make the pictures, lay them out and write assets/strip.png and benchmarks/results/strip.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerate", default="delta-cache")
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    side, gap, label = 112, 12, 74
    board = Image.new("RGB", (label + len(PROMPTS) * (side + gap), 2 * (side + gap) + 34), "white")
    draw = ImageDraw.Draw(board)
    rows = []
    generate(Request(prompt=PROMPTS[0], model=given.model))
    for column, prompt in enumerate(PROMPTS):
        plain = Request(prompt=prompt, seed=given.seed, model=given.model)
        exact, fast = generate(plain), generate(plain.replace(accelerators=(given.accelerate,)))
        for row, result in enumerate((exact, fast)):
            picture = result.images[0].resize((side, side), Image.Resampling.LANCZOS)
            board.paste(picture, (label + column * (side + gap), gap + row * (side + gap)))
        found = difference(exact.images[0], fast.images[0])
        seconds = [result.report["timings"]["denoise"] for result in (exact, fast)]
        rows.append({"prompt": prompt, "seconds": seconds, "ratio": seconds[0] / seconds[1]} | found.to_dict())
        left = label + column * (side + gap) + side / 2
        words = "\n".join(prompt.split(", "))
        draw.text((left, 2 * (side + gap) + 6), words, fill="#444", anchor="ma", align="center", font_size=12)
    for row, name in enumerate(("exact", "delta-\ncache")):
        draw.text((gap, gap + row * (side + gap) + side / 2), name, fill="#111", anchor="lm", font_size=15)
    (ROOT / "assets").mkdir(exist_ok=True)
    board.save(ROOT / "assets" / "strip.png", optimize=True)
    ratio = statistics.median(row["ratio"] for row in rows)
    write_json(RESULTS / "strip.json", record() | {"accelerator": given.accelerate, "median_ratio": ratio, "pictures": rows})
    print(json.dumps({"denoise_ratio": ratio, "psnr_db": [row["psnr_db"] for row in rows]}))


if __name__ == "__main__":
    main()
