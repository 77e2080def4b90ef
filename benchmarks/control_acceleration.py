"""Every adapter under every accelerator: `python -m benchmarks.control_acceleration [--adapter FILE ...] [--write]`.

On the shipped `emoji` model, with the adapters that lie beside it and those that are given, and with random weights for kinds of
which there are none. Held-out pictures give the prompts, and each its own condition. About a minute of one core for each adapter
and eight pictures.

Two figures for each pair. *Identical inputs*: every step is given the same, so what is reused or forecast must be what would be
computed; the largest relative error of a step. *Growth*: how far the accelerated pictures are from exact ones with the adapter,
over how far they are without it, the root mean square over the pictures; 1 means that control costs an accelerator nothing.
Beside it stands the range that holds nine of ten such figures when pictures are drawn again from these, with replacement:
one picture of sixteen can weigh as much as all the others, so a figure of two pictures says nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import control
from acceleration.base import Accelerator, Untouched, accelerated
from benchmarks.machine import RESULTS, ROOT, record, write_json
from control._files import load
from control._instructed import Instructed
from control.base import Refused, Use, controlled
from dit.seams import announce
from dit.spec import parse
from pipelines import catalog
from pipelines._adapter_files import adapters_in, read_adapter
from pipelines.request import RequestError, accelerator_kinds
from training.data import Pictures, load_pictures
from training.scenes import made_of

METHODS = (
    "delta-cache:interval=2", "delta-cache:interval=2,mode=whole", "taylor-cache:interval=3", "step-forecast:interval=2",
    "guidance-skip:interval=2", "token-merge:ratio=0.25,min_tokens=16,window=4",
)  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {"diffscaler": {"rank": 4}, "relactrl": {"heads": 4}}
STEPS, GUIDANCE, SAME_STEPS = 16, 3.0, 6
DRAWS, INSIDE = 2000, 0.9
"""How often pictures are drawn again for a range, and the part of the figures that lies inside."""


class Bench:
    """A pipeline, held-out pictures with their captions, and what adapters are given of them."""

    def __init__(self, pipeline: Any, pictures: Pictures) -> None:
        self.pipeline, self.pictures = pipeline, pictures
        self.prompts = [row["caption"] for row in pictures.rows]

    def condition(self, adapter: Any, kind: str, count: int) -> Any:
        """Return the conditions of the first `count` pictures, as an adapter reads them; `kind` as it was trained."""
        if not adapter.needs_condition:
            return None
        codec = self.pipeline.codec
        made = made_of(self.pictures.pixels[:count], kind).to(codec.dtype) / 127.5 - 1
        latents = codec.encode(made).float()
        if adapter.control.name != "unic-adapter":
            return latents
        told = self.pipeline.encode_prompt(["Generate image from canny edge"])
        return Instructed(latents, told.tokens, told.pooled)

    def drawn(self, uses: list[Use], methods: list[Accelerator]) -> Tensor:
        """Draw the prompts, each with its own seed; return their latents [B, C, H, W]."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(controlled(self.pipeline.transformer, *uses, steps=STEPS))
            stack.enter_context(accelerated(self.pipeline.transformer, *methods, steps=STEPS))
            made = self.pipeline(
                prompt=self.prompts, seeds=range(len(self.prompts)), num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                output_type="latent",
            )  # fmt: skip
        found: Tensor = made.images
        return found


def adapters_of(network: Any, files: list[Path]) -> dict[str, tuple[str, Any, str]]:
    """Return adapters by name, each with where its weights come from and its condition: those of `files`, the shipped ones,
    and one of random weights for every other kind. Raises: Refused for a file that does not fit.
    """
    found: dict[str, tuple[str, Any, str]] = {}
    kinds = set()
    shipped = list(adapters_in(catalog.CHECKPOINTS / "emoji").values())
    for path in [*shipped, *files]:
        file = read_adapter(path)
        told = file.about.get("condition")
        kind = told if isinstance(told, str) and told != "none" else "edges"
        adapter = load(path, network)
        name = f"{file.kind}, {kind}" if adapter.needs_condition else file.kind
        found.setdefault(name, ("shipped" if path in shipped else "trained", adapter, kind))
        kinds.add(file.kind)
    for kind_name, kind_of in control.methods().items():
        made = kind_of(**SETTINGS.get(kind_name, {}))
        if kind_name not in kinds and made.refuses(network) is None:
            found[kind_name] = ("random", shaken(made.build(network)), "edges")
    for _, adapter, _ in found.values():
        adapter.requires_grad_(False)
    return dict(sorted(found.items()))


def shaken(adapter: Any) -> Any:
    """Give an adapter random weights that do something."""
    draw = torch.Generator().manual_seed(1)
    for one in adapter.parameters():
        one.data = one.data + torch.randn(one.shape, generator=draw).to(one) * 0.02
    return adapter


def same_error(bench: Bench, uses: list[Use], method: Accelerator) -> float:
    """Give every step the same inputs; return the largest relative error of a step."""
    network, told = bench.pipeline.transformer, bench.pipeline.encode_prompt(bench.prompts[:2])
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


def apart(one: Tensor, other: Tensor) -> Tensor:
    """Return the relative distance of each of two sets of pictures [B]."""
    return (one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)


def level(values: Tensor) -> Tensor:
    """Return the root mean square of the last dimension."""
    return values.square().mean(dim=-1).sqrt()


def growth(found: Tensor, plain: Tensor) -> dict[str, float]:
    """Return how much larger distances [B] are than those of the same prompts without control, with its range."""
    rows = torch.randint(len(found), (DRAWS, len(found)), generator=torch.Generator().manual_seed(0))
    again = (level(found[rows]) / level(plain[rows])).sort().values
    rest = round(DRAWS * (1 - INSIDE) / 2)
    return {
        "difference": float(level(found)), "without": float(level(plain)), "growth": float(level(found) / level(plain)),
        "growth_low": float(again[rest]), "growth_high": float(again[-rest - 1]),
    }  # fmt: skip


@torch.no_grad()
def measured(bench: Bench, files: list[Path]) -> list[dict[str, Any]]:
    """Return a row for every pair of adapter and accelerator."""
    accelerator_kinds()
    methods = {text: parse(Accelerator, text) for text in METHODS}  # type: ignore[type-abstract,unused-ignore]
    adapters = adapters_of(bench.pipeline.transformer, files)
    exact, rows = bench.drawn([], []), []
    plain = {text: apart(bench.drawn([], [method]), exact) for text, method in methods.items()}
    for name, (weights, adapter, kind) in adapters.items():
        use, one = (Use(adapter, bench.condition(adapter, kind, count)) for count in (len(bench.prompts), 1))
        steered = bench.drawn([use], [])
        for text, method in methods.items():
            row: dict[str, Any] = {
                "adapter": name, "weights": weights, "accelerator": text, "changes": float(level(apart(steered, exact))),
            }  # fmt: skip
            try:
                row |= growth(apart(bench.drawn([use], [method]), steered), plain[text])
                if not text.startswith("token-merge"):  # which approximates, whatever its inputs
                    row["identical"] = same_error(bench, [one], method)
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
        return f"{same}x {row['growth']:.2f} ({row['growth_low']:.2f}-{row['growth_high']:.2f})"

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
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], metavar="FILE", help="trained; repeatable"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/emoji64")
    parser.add_argument("--count", type=int, default=16, help="held-out pictures (at least 2)")
    parser.add_argument("--write", action="store_true", help="write results/control_acceleration.json")
    options = parser.parse_args()
    if options.count < 2:
        parser.error("--count: at least 2")
    pipeline = catalog.load("emoji").pipeline
    try:
        pictures = load_pictures(options.data)
        held = pictures.only([row["split"] == "val_pair" for row in pictures.rows])
        places = {
            round(i * len(held) / options.count) for i in range(options.count)
        }  # spread over styles and concepts
        held = held.only([i in places for i in range(len(held))])
        rows = measured(Bench(pipeline, held), options.adapter)
    except (OSError, Refused, RequestError) as error:
        parser.error(str(error))
    print(table(rows))
    growths = [row["growth"] for row in rows if "growth" in row]
    worst = max(row.get("identical", 0.0) for row in rows)
    mean = math.exp(sum(math.log(one) for one in growths) / len(growths))
    print(f"\nlargest error on identical inputs {worst:.1e}")
    print(
        f"growth {min(growths):.2f} to {max(growths):.2f}, geometric mean {mean:.2f}, over {len(held)} pictures"
    )
    if options.write:
        asked = {"steps": STEPS, "guidance": GUIDANCE, "pictures": len(held)}
        write_json(RESULTS / "control_acceleration.json", {**record(), **asked, "rows": rows})


if __name__ == "__main__":
    main()
