"""RelaCtrl against a ControlNet of half the blocks: `python -m benchmarks.relactrl --relactrl FILE --controlnet FILE`.

What each adds to a model in parameters, multiply-accumulates (MACs, not FLOPs) and time, and how well pictures keep to
held-out edges under each; beside it no control, another picture's edges, and the real pictures through the codec. `--count`
needs no trained files: it builds what the two recipes say, and counts. The paper's own size, PixArt-alpha, is counted in
both cases, on the meta device.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._control_scores import score
from benchmarks.control import Bench, adapter_of
from benchmarks.machine import RESULTS, ROOT, interleaved, record, write_json
from control import Control, Refused, Use, controlled, methods
from control.base import ControlAdapter
from control.controlnet import ControlNet, ControlNetAdapter
from control.relactrl import RelaCtrl, released
from dit.ledger import Ledger, counted, macs_of, parameters_of
from dit.seams import blocks_of
from dit.spec import parse
from training.bases import Base, load_base
from training.data import Pictures, load_pictures
from training.judge import Court, load_judge
from training.scenes import made_of

NAMES = ("relactrl", "controlnet")
RECIPES = ROOT / "training" / "recipes"
GOALS = {
    # "About 15 %", and at most a fifth: the paper's own adapter has 17 to 19 % of the MACs of its ControlNet.
    "parameters_share": ("at most", 0.2), "macs_share": ("at most", 0.2), "accuracy_share": ("at least", 0.95),
}  # fmt: skip
TEXT = 12  # tokens of a prompt, as in the recipes
CALLS = 5  # of the transformer, in each time that is taken
Inputs = Mapping[str, Any]
Adapters = Mapping[str, ControlAdapter]


# Costs.


def costs(
    transformer: nn.Module, adapters: Adapters, inputs: Inputs, condition: Tensor, tokens: int
) -> dict[str, Any]:
    """Return parameters and MACs of a model and of what each adapter adds to it, and RelaCtrl's shares of the ControlNet's.

    Args:
        inputs: of one call, for one picture of `tokens` tokens. condition: latents [1, C, H, W].

    The MACs are those of everything computed in the call under the adapter, less those of the call without it. On the meta device,
    where no adapter can act, they are those of the copied blocks in the model's own count with the maps of zeros, and
    RelaCtrl's own.
    """
    plain = counted(transformer, inputs, tokens=tokens)
    found: dict[str, Any] = {
        "tokens": tokens,
        "model": {"parameters": parameters_of(transformer), "macs": plain.macs},
    }
    for name in NAMES:
        adapter: Any = adapters[name]
        if condition.is_meta:
            macs = (
                _copied(plain, transformer, adapter, tokens) if name == "controlnet" else adapter.macs(tokens)
            )
        else:
            with controlled(transformer, Use(adapter, condition)):
                macs = counted(transformer, inputs, tokens=tokens).macs - plain.macs
        found[name] = {
            "parameters": parameters_of(adapter),
            "macs": macs,
            "acts_behind": list(adapter.places),
        }
    for what in ("parameters", "macs"):
        found[f"{what}_share"] = found["relactrl"][what] / found["controlnet"][what]
    return found


def _copied(plain: Ledger, transformer: nn.Module, adapter: ControlNetAdapter, tokens: int) -> int:
    """Return the MACs of a ControlNet by the model's own count of the blocks that it copies."""
    paths = tuple(f"{block.path}." for block in list(blocks_of(transformer))[: len(adapter.places)])
    blocks = sum(part.macs for part in plain.parts if f"{part.path}.".startswith(paths))
    return blocks + sum(macs_of(one, tokens) for one in (adapter.before_proj, *adapter.after_proj))


def model_costs(base: Base, adapters: Adapters, size: int) -> dict[str, Any]:
    """Return the costs beside a model of ours, for one picture of `size` px and a prompt of `TEXT` tokens."""
    transformer, config = base.transformer, base.transformer.config
    latent = base.pictures(torch.zeros(1, 3, size, size, dtype=torch.uint8)).to(transformer.dtype)
    inputs = {
        "hidden_states": latent, "timestep": torch.full((1,), 500.0), "return_dict": False,
        "encoder_hidden_states": torch.zeros(1, TEXT, config.context_dim),
    }  # fmt: skip
    if config.get("pooled_dim"):
        inputs["pooled_projections"] = torch.zeros(1, config.pooled_dim)
    tokens = latent.shape[2] * latent.shape[3] // config.patch_size**2
    return costs(transformer, adapters, inputs, latent, tokens)


def released_costs(size: int) -> dict[str, Any]:
    """Return the costs at the paper's own size: its adapter and its ControlNet of 13 blocks beside PixArt-alpha, at `size` px."""
    from diffusers import PixArtTransformer2DModel

    side = size // 8
    with torch.device("meta"):
        model = PixArtTransformer2DModel(
            caption_channels=4096, sample_size=128, use_additional_conditions=False
        )
        latent = torch.zeros(1, 4, side, side)
        inputs = {
            "hidden_states": latent, "timestep": torch.zeros(1), "encoder_hidden_states": torch.zeros(1, 120, 4096),
        }  # fmt: skip
        adapters = {"relactrl": released().build(model), "controlnet": ControlNet(copies=13).build(model)}
    return costs(model, adapters, inputs, latent, side * side // 4)


def times(base: Base, adapters: Adapters, pixels: Tensor, *, rounds: int) -> dict[str, dict[str, float]]:
    """Return the time of a step with guidance (two branches), in seconds and as a ratio against no control."""
    latents, transformer = base.pictures(pixels[:1]), base.transformer
    prompts = base.texts(["", "a dog, cartoon"], TEXT)
    noise = torch.randn(1, *latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand(
        2, -1, -1, -1
    )

    def step(*uses: Use) -> None:
        with controlled(transformer, *uses):
            for _ in range(CALLS):
                base.velocity(noise.to(transformer.dtype), torch.full((2,), 0.5), prompts)

    ways: dict[str, Callable[[], object]] = {"none": step}
    for name in NAMES:
        ways[name] = partial(step, Use(adapters[name], latents))
    taken = interleaved(ways, rounds=rounds)
    return {
        name: {"seconds": row["median"] / CALLS, "of_none": 1 / row["ratio"]} for name, row in taken.items()
    }


# Accuracy.


def accuracy(bench: Bench, adapters: Adapters) -> dict[str, Any]:
    """Return the F1 of edges: without control, of the real pictures, and under each adapter with the right and with other edges."""
    edges = made_of(bench.pictures.pixels, "edges")
    without, ceiling = (score("edges", made, edges) for made in (bench.make(), bench.ceiling()))
    found: dict[str, Any] = {"pictures": len(edges), "without": without, "ceiling": ceiling}
    for name in NAMES:
        own, other = (
            score("edges", bench.make([(adapters[name], given, 1.0)]), edges)
            for given in (edges, edges.roll(1, 0))
        )
        found[name] = {
            "edge_f1": own, "shuffled": other, "share_of_ceiling": own / ceiling,
            # Things in the middle of a white picture fit each other by chance; this is what is added, of what there is to add.
            "gap_closed": (own - without) / max(ceiling - without, 1e-9),
        }  # fmt: skip
    return found | {
        "accuracy_share": found["relactrl"]["edge_f1"] / max(found["controlnet"]["edge_f1"], 1e-9)
    }


def goals(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every goal beside what was reached; those whose figure was not measured are left out."""
    found = []
    for name, (way, goal) in GOALS.items():
        for part, row in figures.items():
            if isinstance(row, Mapping) and name in row:
                met = row[name] >= goal if way == "at least" else row[name] <= goal
                found.append({"what": f"{part}: {name}", "reached": row[name], "goal": f"{way} {goal:g}", "met": met})  # fmt: skip
    return found


def table(figures: Mapping[str, Any]) -> str:
    """Return the figures as Markdown, for the README."""
    lines = [
        "| | parameters | MACs a step | time of a step | edges, F1 | another's edges |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    costs, taken, scored = (figures.get(name, {}) for name in ("costs", "times", "accuracy"))
    for name, words in (
        ("relactrl", "RelaCtrl"),
        ("controlnet", "ControlNet"),
        ("none", "no control"),
        ("ceiling", "real pictures"),
    ):
        cost, took, row = costs.get(name), taken.get(name), scored.get(name, {})
        f1 = (
            scored.get({"none": "without"}.get(name, name))
            if name in ("none", "ceiling")
            else row.get("edge_f1")
        )
        cells = [
            f"+{cost['parameters'] / 1e6:.2f} M" if cost else "",
            f"+{cost['macs'] / 1e9:.3f} G" if cost else "",
            f"x {took['of_none']:.2f}" if took else "",
            f"{f1:.3f}" if isinstance(f1, float) else "",
            f"{row['shuffled']:.3f}" if isinstance(row, Mapping) and "shuffled" in row else "",
        ]
        if any(cells):
            lines.append(f"| {words} | " + " | ".join(cells) + " |")
    share = [f"{figures[part][what]:.1%}" if part in figures else "" for part, what in
             (("costs", "parameters_share"), ("costs", "macs_share"), ("accuracy", "accuracy_share"))]  # fmt: skip
    return "\n".join([*lines, f"| RelaCtrl of ControlNet | {share[0]} | {share[1]} | | {share[2]} | |"])


# What is given.


def fresh(name: str, transformer: nn.Module) -> ControlAdapter:
    """Return the untrained adapter of a recipe, `training/recipes/control-NAME.toml`."""
    methods()
    settings = tomllib.loads((RECIPES / f"control-{name}.toml").read_text(encoding="utf-8"))["control"]
    return parse(Control, settings).build(transformer).requires_grad_(False).eval()


def trained(name: str, file: Path, base: Base) -> ControlAdapter:
    """Return the adapter of a file. Raises: Refused for one of another kind, or that was trained for something else than edges."""
    adapter = adapter_of("edges", file, base)
    wanted = {"relactrl": RelaCtrl, "controlnet": ControlNet}[name]
    if not isinstance(adapter.control, wanted):
        raise Refused(f"{file.name} holds {adapter.control.name}, and it is given as --{name}")
    return adapter


def held_out(data: Path, court: Court, count: int) -> Pictures:
    """Return the held-out pictures that `benchmarks.control` looks at: those whose style and concept the judge knows."""
    pictures = load_pictures(data)
    held = pictures.only([
        row["split"] == "val_pair" and row["style"] in court.styles and row["concept"] in court.concepts for row in pictures.rows
    ])  # fmt: skip
    return held.only([place < count for place in range(len(held))])


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, count or measure, print table and goals, and write relactrl.json unless only counted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.relactrl", description=__doc__.split("\n\n")[0]
    )
    for name in NAMES:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"trained {name} adapter for edges")
    parser.add_argument(
        "--count",
        action="store_true",
        help="count parameters and MACs, of the recipes where no files are given",
    )
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data/emoji64")
    parser.add_argument("--judge", type=Path, default=ROOT / "benchmarks" / "judge")
    parser.add_argument("--pictures", type=int, default=68, help="held-out pictures")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in px, for the count")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=17)
    parser.add_argument("--rounds", type=int, default=9, help="times taken of each")
    parser.add_argument("--out", type=Path, default=RESULTS / "relactrl.json")
    given = parser.parse_args(arguments)
    files = {name: getattr(given, name) for name in NAMES}
    if not given.count and None in files.values():
        parser.error("give both --relactrl and --controlnet, or --count")
    base = load_base(given.model)
    adapters = {
        name: fresh(name, base.transformer) if file is None else trained(name, file, base)
        for name, file in files.items()
    }
    figures: dict[str, Any] = {"costs": model_costs(base, adapters, given.size)}
    figures |= {f"costs of PixArt-alpha, {size} px": released_costs(size) for size in (512, 1024)}
    if not given.count:
        held = held_out(given.data, load_judge(given.judge), given.pictures)
        bench = Bench(base, held, steps=given.steps, guidance=given.guidance, batch=given.batch)
        with torch.no_grad():
            figures["times"] = times(base, adapters, held.pixels, rounds=given.rounds)
            figures["accuracy"] = accuracy(bench, adapters)
    reached = goals(figures)
    print(table(figures), *(f"{'met   ' if one['met'] else 'MISSED'} {one['what']}: {one['reached']:.3f} ({one['goal']})"
                            for one in reached), sep="\n")  # fmt: skip
    if given.count:
        return 0
    asked = {name: getattr(given, name) for name in ("model", "pictures", "steps", "guidance")}
    about = {
        name: {"control": one.control.to_dict(), "file": files[name].name} for name, one in adapters.items()
    }
    write_json(given.out, record() | {"asked": asked, "adapters": about, "goals": reached} | figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
