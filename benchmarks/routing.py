"""Does Switch-DiT's routing follow the noise level, and what does it buy? `python -m benchmarks.routing SWITCH DENSE`.

Both are run folders of `training.train` with the recipe switch.toml, the second with plain experts and the same steps. Writes
the gates of every block over the noise level as a picture, how much neighbouring levels share their experts, and the held-out
loss of both by quarter of the noise level, with the same pictures, noise and times.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import RESULTS, record, write_json
from dit.backbones.mmdit import MMDiT
from dit.experts.switch import SwitchRouter
from dit.ledger import analytic, parameters_of
from training.train import Trainer

LEVELS = 50
CELL = (12, 9)


def gates(model: MMDiT) -> tuple[Tensor, Tensor]:
    """Return probabilities and 0/1 choices, [blocks, E, levels], from low noise to high."""
    times = (torch.arange(LEVELS) + 0.5) * (1000 / LEVELS)
    routers = [one for one in model.modules() if isinstance(one, SwitchRouter)]
    with torch.no_grad():
        embedded = model.embed_time(times, torch.float32)
        found = [one.gate(embedded) for one in routers]
    return torch.stack([one.gates.T for one in found]), torch.stack([one.active.T for one in found])


def sharing(active: Tensor) -> dict[str, float]:
    """Return the mean Jaccard overlap of the experts of two noise levels, by their distance in thousandths."""
    flat = active.flatten(0, 1).T.bool()  # [levels, blocks * E]
    found = {}
    for distance in (1, 5, 10, 25, LEVELS - 1):
        a, b = flat[:-distance], flat[distance:]
        overlap = (a & b).sum(dim=1) / (a | b).sum(dim=1)
        found[str(round(1000 * distance / LEVELS))] = round(float(overlap.mean()), 3)
    return found


def losses(folder: Path, recipe: dict[str, Any]) -> dict[str, float]:
    """Return the held-out loss of the averaged weights by quarter of the noise level, and over all."""
    trainer = Trainer(recipe, folder, None, None)
    trainer.load_data()
    trainer.model.eval()
    found: dict[str, list[float]] = {}
    with torch.no_grad(), trainer._averaged():
        for seed in range(8):
            dice = torch.Generator().manual_seed(100 + seed)
            latents, prompts = trainer.held.draw(128, 0.0, dice)
            noise, times = torch.randn(latents.shape, generator=dice), torch.linspace(0.02, 0.98, len(latents))
            each = trainer.objective.losses(trainer._denoiser(prompts), latents, noise, times)
            for quarter in range(4):
                inside = (times >= quarter / 4) & (times < (quarter + 1) / 4)
                found.setdefault(f"noise {quarter / 4:.2f}-{(quarter + 1) / 4:.2f}", []).append(float(each[inside].mean()))
            found.setdefault("all", []).append(float(each.mean()))
    return {name: round(sum(values) / len(values), 5) for name, values in found.items()}


def picture(probabilities: Tensor, active: Tensor) -> str:
    """Return an SVG: a row an expert, a column a noise level; darker is more probable, a dot marks what is chosen."""
    blocks, experts, levels = probabilities.shape
    wide, high = CELL
    left, top = 86, 24
    rows = []
    for b in range(blocks):
        for e in range(experts):
            y = top + (b * (experts + 1) + e) * high
            if e == 0:
                rows.append(f'<text x="4" y="{y + high * 1.6:.0f}" font-size="11">block {b + 1}</text>')
            for i in range(levels):
                shade = round(255 * (1 - float(probabilities[b, e, i])))
                x = left + i * wide
                rows.append(f'<rect x="{x}" y="{y}" width="{wide}" height="{high}" fill="rgb({shade},{shade},{shade})"/>')
                if active[b, e, i]:
                    ink = "#fff" if shade < 128 else "#000"
                    rows.append(f'<circle cx="{x + wide / 2}" cy="{y + high / 2}" r="1.6" fill="{ink}"/>')
    width, height = left + levels * wide + 8, top + blocks * (experts + 1) * high + 26
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    names = (
        f'<text x="{left}" y="15" font-size="12">probability of each expert (dark: high; dot: in use)</text>'
        f'<text x="{left}" y="{height - 8}" font-size="11">low noise</text>'
        f'<text x="{width - 8}" y="{height - 8}" font-size="11" text-anchor="end">high noise</text>'
    )
    return head + f'<rect width="{width}" height="{height}" fill="#fff"/>' + names + "".join(rows) + "</svg>\n"


def main() -> None:
    """Read both runs, write routing.json and routing.svg."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("switch", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument("--recipe", type=Path, default=Path("training/recipes/switch.toml"))
    parser.add_argument("--data", help="folder of the pictures, where it is not the recipe's")
    given = parser.parse_args()
    recipe = tomllib.loads(given.recipe.read_text())
    if given.data:
        recipe["data"]["folder"] = given.data
    rows: dict[str, Any] = {}
    for name, folder in (("switch", given.switch), ("dense", given.dense)):
        own = recipe | {"model": recipe["model"] | ({} if name == "switch" else {"experts": "dense"})}
        model = MMDiT.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval()
        cost = analytic(model, 32, 32, text=12)
        progress = json.loads((folder / "progress.json").read_text()) if (folder / "progress.json").is_file() else {}
        rows[name] = {
            "parameters": parameters_of(model), "parameters_activated": cost.activated, "macs": cost.macs,
            "samples": progress.get("seen"), "held_out_loss": losses(folder, own),
        }  # fmt: skip
        if name == "switch":
            probabilities, active = gates(model)
    always = active.bool().all(dim=2)
    found = {
        **record(), "runs": rows, "experts_shared_by_distance_of_noise_level": sharing(active),
        "experts_used_at_every_level": always.sum(dim=1).tolist(), "levels": LEVELS,
    }  # fmt: skip
    write_json(RESULTS / "routing.json", found)
    (RESULTS / "routing.svg").write_text(picture(probabilities, active))
    print(json.dumps({name: found[name] for name in list(found)[3:]}, indent=1))


if __name__ == "__main__":
    main()
