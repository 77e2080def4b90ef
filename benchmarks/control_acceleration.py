"""Every adapter under every accelerator: `python -m benchmarks.control_acceleration [--write]`. About two minutes of one core.

On the shipped `emoji` model, with the adapters that lie beside it, and with random weights for kinds that have none there.
Two figures for each pair. *Identical inputs*: every step is given the same, so what is reused or forecast must be what would be
computed; the largest relative error of a step. *Growth*: how far the accelerated pictures are from exact ones with the adapter,
over how far they are without it; 1 means that control costs an accelerator nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import control
from acceleration.base import Accelerator, Untouched, accelerated
from benchmarks.machine import RESULTS, record, write_json
from control.base import Refused, Use, controlled
from control.conditions import condition_of, read_picture
from dit.seams import announce
from dit.spec import parse
from pipelines import catalog
from pipelines._adapter_files import adapters_in, read_adapter
from pipelines._steering import encoded
from pipelines.request import accelerator_kinds

METHODS = (
    "delta-cache:interval=2", "delta-cache:interval=2,mode=whole", "taylor-cache:interval=3", "step-forecast:interval=2",
    "guidance-skip:interval=2", "token-merge:ratio=0.25,min_tokens=16,window=4",
)  # fmt: skip
PROMPTS = ("red apple, 3d render", "dog, cartoon")
SETTINGS: dict[str, dict[str, Any]] = {"diffscaler": {"rank": 4}, "relactrl": {"heads": 4}}
STEPS, GUIDANCE, SAME_STEPS = 16, 3.0, 6


def scene() -> Any:
    """A round thing on white, as a condition's picture [64, 64, 3]."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 14, 50, 52), fill=(200, 40, 40))
    return read_picture(image)


def uses_of(pipeline: Any) -> dict[str, tuple[str, Use]]:
    """Return a use of every kind of adapter, with where its weights come from: shipped, or random."""
    from control._files import load

    network, found = pipeline.transformer, {}
    for path in adapters_in(catalog.CHECKPOINTS / "emoji").values():
        file = read_adapter(path)
        if file.kind not in found:
            with contextlib.suppress(Refused):
                found[file.kind] = ("shipped", load(path, network))
    for name, kind in control.methods().items():
        if name not in found:
            made = kind(**SETTINGS.get(name, {}))
            if made.refuses(network) is None:
                found[name] = ("random", shaken(made.build(network)))
    return {
        name: (weights, Use(adapter, condition(pipeline, adapter)))
        for name, (weights, adapter) in sorted(found.items())
    }


def shaken(adapter: Any) -> Any:
    """Give an adapter random weights that do something."""
    draw = torch.Generator().manual_seed(1)
    for one in adapter.parameters():
        one.data = one.data + torch.randn(one.shape, generator=draw).to(one) * 0.02
    return adapter.requires_grad_(False)


def condition(pipeline: Any, adapter: Any) -> Any:
    """Return the condition of an adapter: edges; with an instruction where it reads one."""
    if not adapter.needs_condition:
        return None
    edges = condition_of(parse(control.conditions.Condition, "canny"), scene())  # type: ignore[attr-defined]
    latents = encoded(pipeline, edges)
    if adapter.control.name != "unic-adapter":
        return latents
    from control.unic_adapter import Instructed

    told = pipeline.encode_prompt(["Generate image from canny edge"])
    return Instructed(latents, told.tokens, told.pooled)


def drawn(pipeline: Any, uses: list[Use], methods: list[Accelerator]) -> Tensor:
    """Draw the prompts; return their latents [B, C, H, W]."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(controlled(pipeline.transformer, *uses, steps=STEPS))
        stack.enter_context(accelerated(pipeline.transformer, *methods, steps=STEPS))
        made = pipeline(
            prompt=list(PROMPTS),
            seeds=range(len(PROMPTS)),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
        )
    found: Tensor = made.images
    return found


def same_error(pipeline: Any, uses: list[Use], method: Accelerator) -> float:
    """Give every step the same inputs; return the largest relative error of a step."""
    network, told = pipeline.transformer, pipeline.encode_prompt(list(PROMPTS[:2]))
    given = {
        "hidden_states": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)),
        "encoder_hidden_states": told.tokens, "encoder_attention_mask": told.mask, "pooled_projections": told.pooled,
        "timestep": torch.full((2,), 500.0), "return_dict": False,
    }  # fmt: skip
    worst = 0.0
    with controlled(network, *uses, steps=SAME_STEPS):
        exact = network(**given)[0]
        with contextlib.suppress(Untouched), accelerated(network, method, steps=SAME_STEPS):
            for step in range(SAME_STEPS):
                announce(network, step=step, branch="uncond+cond", steps=SAME_STEPS)
                worst = max(worst, float((network(**given)[0] - exact).norm() / exact.norm()))
    return worst


def apart(one: Tensor, other: Tensor) -> float:
    """Return the relative distance of two sets of pictures."""
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def measured() -> list[dict[str, Any]]:
    """Return a row for every pair of adapter and accelerator."""
    accelerator_kinds()
    pipeline = catalog.load("emoji").pipeline
    methods = {text: parse(Accelerator, text) for text in METHODS}  # type: ignore[type-abstract,unused-ignore]
    rows, plain = [], {}
    exact = drawn(pipeline, [], [])
    for text, method in methods.items():
        plain[text] = apart(drawn(pipeline, [], [method]), exact)
    for name, (weights, use) in uses_of(pipeline).items():
        steered = drawn(pipeline, [use], [])
        for text, method in methods.items():
            row: dict[str, Any] = {
                "adapter": name,
                "weights": weights,
                "accelerator": text,
                "changes": apart(steered, exact),
            }
            try:
                found = apart(drawn(pipeline, [use], [method]), steered)
                row |= {"difference": found, "without": plain[text], "growth": found / plain[text]}
                if not text.startswith("token-merge"):  # which approximates, whatever its inputs
                    row["identical"] = same_error(pipeline, [use], method)
            except ValueError as error:
                row["refused"] = str(error)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table: an adapter a row, an accelerator a column."""
    adapters, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("adapter", "accelerator"))
    by = {(row["adapter"], row["accelerator"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        if "refused" in row:
            return "refused"
        same = f"{row['identical']:.0e}; " if "identical" in row else ""
        return f"{same}x {row['growth']:.2f}"

    lines = [
        f"| adapter | {' | '.join(f'`{one}`' for one in methods)} |",
        "| --- " * (len(methods) + 1) + "|",
    ]
    for name in adapters:
        weights = by[name, methods[0]]["weights"]
        lines.append(f"| {name} ({weights}) | {' | '.join(cell(by[name, one]) for one in methods)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print; write the figures with --write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control_acceleration", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--write", action="store_true", help="write results/control_acceleration.json")
    options = parser.parse_args()
    rows = measured()
    print(table(rows))
    growths = [row["growth"] for row in rows if "growth" in row]
    worst = max(row.get("identical", 0.0) for row in rows)
    mean = math.exp(sum(math.log(one) for one in growths) / len(growths))
    print(f"\nlargest error on identical inputs {worst:.1e}")
    print(f"growth {min(growths):.2f} to {max(growths):.2f}, geometric mean {mean:.2f}")
    if options.write:
        write_json(
            RESULTS / "control_acceleration.json",
            {**record(), "steps": STEPS, "guidance": GUIDANCE, "rows": rows},
        )


if __name__ == "__main__":
    main()
