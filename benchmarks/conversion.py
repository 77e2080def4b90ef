"""What a Dense2MoE conversion keeps: `python -m benchmarks.conversion training/recipes/moe.toml --out runs/moe`, ~10 minutes.

Losses on held-out pictures with fixed noise and times: the dense teacher; the split network before any training, by kind of
importance and by count of active experts; the distilled student of the run, by count of active experts; and how evenly its
experts are loaded. Writes benchmarks/results/conversion.json.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch

from benchmarks.machine import RESULTS, record, write_json
from dit.dense2moe import convert, magnitude_scores, random_scores
from dit.experts.mixture import layers_of, set_active, watched
from dit.ledger import activated_of, parameters_of
from training.distill import Distiller
from training.train import asked

COUNTS = (0, 2, 4, 12)
PICTURES, BATCH = 128, 32


@torch.no_grad()
def held_out(trainer: Distiller, model: Any) -> float:
    """Return the mean loss of a network over fixed held-out pictures, noise and times."""
    dice = torch.Generator().manual_seed(1)
    latents, prompts = trainer.held.draw(PICTURES, 0.0, dice)
    noise = torch.randn(latents.shape, generator=dice).to(latents.device)
    times = torch.linspace(0.02, 0.98, PICTURES).to(latents.device)
    total = 0.0
    for i in range(0, PICTURES, BATCH):
        rows = slice(i, i + BATCH)
        words = {name: one[rows] for name, one in prompts.items()}

        def denoise(noisy: torch.Tensor, level: torch.Tensor, words: dict[str, Any] = words) -> torch.Tensor:
            return torch.as_tensor(model(noisy, level * 1000, **words, return_dict=False)[0])

        total += float(trainer.objective.losses(denoise, latents[rows], noise[rows], times[rows]).sum())
    return total / PICTURES


def by_count(trainer: Distiller, model: Any) -> dict[str, float]:
    """Return the loss for each count of active experts, and leave the count as it was."""
    before = next(iter(layers_of(model).values())).active
    found = {}
    for count in COUNTS:
        set_active(model, count)
        found[str(count)] = held_out(trainer, model)
    set_active(model, before)
    return found


def load(trainer: Distiller, model: Any) -> dict[str, float]:
    """Return how many tokens the busiest expert of each mixture gets, by the mean of its mixture."""
    with watched(model) as layers:
        held_out(trainer, model)
        ratios = []
        for layer in layers.values():
            assert layer.decision is not None
            assert layer.decision.active is not None
            counts = layer.decision.active.flatten(0, -2).sum(dim=0)
            ratios.append(float(counts.max() / counts.mean()))
    return {"mean": sum(ratios) / len(ratios), "worst": max(ratios)}


def main() -> None:
    """Measure, print, and write."""
    recipe, given = asked(__doc__)
    recipe["run"]["compile"] = False
    trainer = Distiller(recipe, given.out, None)
    trainer.load_data()
    rows: dict[str, Any] = {"teacher": held_out(trainer, trainer.teacher)}
    print(json.dumps(rows), flush=True)
    experts, seed = recipe["student"]["experts"], recipe["run"]["seed"]
    for kind in ("taylor", "magnitude", "random"):
        split = copy.deepcopy(trainer.teacher).requires_grad_(True)
        scores = {"magnitude": magnitude_scores, "random": lambda dense: random_scores(dense, seed)}
        chosen = scores[kind](split) if kind in scores else trainer.importance(split, recipe["student"])
        report = convert(split, experts, chosen)
        rows[f"split by {kind}"] = by_count(trainer, split) | {"kept": report.converted[0].kept}
        print(json.dumps({kind: rows[f"split by {kind}"]}), flush=True)
    with trainer._averaged():
        student = trainer.model.eval()
        rows["student"] = by_count(trainer, student)
        rows["load of the busiest expert by the mean"] = load(trainer, student)
        rows["parameters"] = {"all": parameters_of(student), "activated": activated_of(student)}
    rows["parameters"]["teacher"] = parameters_of(trainer.teacher)
    rows["samples_seen"] = trainer.seen
    print(json.dumps(rows))
    write_json(RESULTS / "conversion.json", record() | {"experts": experts, "held_out_loss": rows})


if __name__ == "__main__":
    main()
