"""What an accelerator saves and what it changes, on the shipped model: `python -m benchmarks.speed [--accelerate TEXT ...]`.

Wall-clock of the denoising loop and end to end, as a ratio to the exact run of the same process, medians of interleaved
rounds; beside it the difference from the exact picture (PSNR in float64, SSIM) and the relative error of the final latent.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch

from acceleration.base import accelerated
from benchmarks.machine import RESULTS, interleaved, record, write_json
from benchmarks.measures import relative_error
from pipelines import catalog
from pipelines.compare import difference
from pipelines.generate import generate
from pipelines.request import Request

PROMPTS = (
    "dog, 3d render", "red apple, cartoon", "rocket, flat illustration", "cat, black and white icon",
    "blue heart, 3d render", "cactus, cartoon", "lion, flat illustration", "guitar, black and white icon",
)  # fmt: skip
METHODS = ("delta-cache", "delta-cache:interval=3", "delta-cache:interval=4,cached_fraction=0.9", "delta-cache:mode=whole")


def latent(request: Request) -> torch.Tensor:
    """Return the final latent of a request, [1, C, H, W], by the loaded pipeline itself."""
    loaded = catalog.load(request.model, request.dtype)
    given: dict[str, Any] = {"prompt": request.prompt, "seeds": [request.seed], "output_type": "latent"}
    given |= {"num_inference_steps": loaded.card.steps, "guidance_scale": loaded.card.guidance}
    if not request.accelerators:
        return torch.as_tensor(loaded.pipeline(**given).images)
    with accelerated(loaded.pipeline.transformer, *request.accelerators, steps=loaded.card.steps):  # type: ignore[arg-type]
        return torch.as_tensor(loaded.pipeline(**given).images)


def quality(method: str, model: str, seeds: int) -> dict[str, Any]:
    """Return medians over prompts and seeds of the difference between accelerated and exact pictures."""
    rows = []
    for prompt in PROMPTS:
        for seed in range(seeds):
            plain = Request(prompt=prompt, seed=seed, model=model)
            fast = plain.replace(accelerators=(method,))
            found = difference(generate(plain).images[0], generate(fast).images[0])
            rows.append((found.psnr, found.ssim, relative_error(latent(fast), latent(plain))))
    psnr, ssim, error = zip(*rows, strict=True)
    return {
        "pictures": len(rows), "psnr_db": statistics.median(psnr), "worst_psnr_db": min(psnr),
        "ssim": statistics.median(ssim), "latent_relative_error": statistics.median(error),
    }  # fmt: skip


def main() -> None:
    """Measure, print, and write benchmarks/results/speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--accelerate", action="append", metavar="METHOD", help="instead of the usual list; repeatable")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    methods = given.accelerate or list(METHODS)
    plain = Request(prompt=PROMPTS[0], seed=1, model=given.model)
    requests = {"exact": plain} | {one: plain.replace(accelerators=(one,)) for one in methods}
    loops: dict[str, list[float]] = {name: [] for name in requests}
    reports: dict[str, Any] = {}

    def run(name: str) -> None:
        result = generate(requests[name])
        loops[name].append(result.report["timings"]["denoise"])
        reports[name] = result.report["run"]

    times = interleaved({name: (lambda name=name: run(name)) for name in requests}, rounds=given.rounds)
    rows = {}
    for name in requests:
        tally = {key: reports[name][key] for key in ("calls", "blocks", "computed", "reused", "forecast")}
        loop = [a / b for a, b in zip(loops["exact"][1:], loops[name][1:], strict=True)]
        rows[name] = {
            "end_to_end": times[name], "denoise_seconds": statistics.median(loops[name][1:]),
            "denoise_ratio": statistics.median(loop), **tally,
        } | ({} if name == "exact" else quality(name, given.model, given.seeds))  # fmt: skip
        print(json.dumps({name: rows[name]}), flush=True)
    write_json(RESULTS / "speed.json", record() | {"model": given.model, "prompts": PROMPTS, "methods": rows})


if __name__ == "__main__":
    main()
