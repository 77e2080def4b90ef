"""Train an adapter beside a frozen model: `python -m training.adapters training/recipes/control-edges.toml --out runs/edges`.

Every kind of `control` learns through the door it is used by, `controlled(...)`, and nothing but its own weights gets a gradient;
the base is compared byte by byte whenever the adapter is saved. Pictures, conditions and prompts are encoded once, before the first
step. Schedule, stops and resuming are those of `training.train`; the adapter is written as one safetensors file.

Paper: EasyControl, Zhang et al. 2025, arXiv:2503.07027 (loss on the picture alone, prompts dropped).
Differs: where the condition is dropped a blank one is given. Leaving the entry out would teach nothing: the base is frozen, and
without the condition no weight of the adapter is asked.
"""

from __future__ import annotations

import json
import math
import random
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from control import Control, ControlAdapter, Memory, Refused, Use, controlled, load, methods
from control._files import base_digest, save
from control._instructed import Instructed
from dit.spec import parse
from training import scenes
from training.bases import Base, Prompts, load_base, weights_digest
from training.data import STYLES, Pictures, choose, load_pictures, wording
from training.objectives import euler
from training.train import Trainer, _atomic, _mosaic, asked

RECIPES = Path(__file__).parent / "recipes"
MOVED = ("edges", "masks", "depth")
"""Conditions that lie on their picture and move with it; a subject does not."""
SHOWN = 8  # pictures on the sample sheet


@dataclass(slots=True)
class Examples:
    """Latents, the latents of their conditions (None where the adapter takes none), and the wordings of each."""

    latents: Tensor
    conditions: Tensor | None
    choices: Tensor

    def __len__(self) -> int:
        return len(self.latents)


class AdapterTrainer(Trainer):
    """One run: the base with its weights as they are, and an adapter that learns."""

    def __init__(
        self,
        recipe: dict[str, Any],
        out: Path,
        minutes: float | None,
        start: Path | None = None,
        base: Base | None = None,
    ) -> None:
        self.base = load_base(recipe["base"]["model"]) if base is None else base
        self.kind: str = recipe.get("condition", {}).get("kind", "none")
        recipe["run"].setdefault("compile", False)
        check_recipe(recipe)
        super().__init__(recipe, out, minutes, start)

    def make(self, start: Path | None) -> ControlAdapter:
        """Return a fresh adapter of the recipe's kind, or that of the file `start`. Raises: Refused."""
        transformer = self.base.transformer.to(self.device, torch.float32)
        methods()
        settings: Control = parse(Control, dict(self.recipe["control"]))
        reason = settings.refuses(transformer)
        if reason is not None:
            raise Refused(f"{settings.name}: {reason}")
        adapter = settings.build(transformer) if start is None else load(start, transformer)
        if type(adapter.control) is not type(settings):
            raise Refused(
                f"start: the file holds {adapter.control.name}, the recipe asks for {settings.name}"
            )
        transformer.to(getattr(torch, self.recipe["run"]["precision"]))
        self.digest, self.bytes = base_digest(transformer), weights_digest(transformer)
        return adapter.requires_grad_(True).train()

    # The data, encoded once.

    def load_data(self) -> None:
        """Read the pictures, make their conditions, and encode all of it and every wording."""
        pictures, exact = self._pictures()
        dice = random.Random(self.recipe["run"]["seed"])
        words: dict[str, int] = {"": 0}
        splits = [[row["split"] == name for row in pictures.rows] for name in ("train", "val_pair")]
        self.train, self.held = (
            self._examples(
                pictures.only(keep), None if exact is None else exact[torch.tensor(keep)], words, dice, copies
            )
            for keep, copies in zip(splits, (self.recipe["data"].get("copies", 1), 1), strict=True)
        )
        self.shown = pictures.only(splits[1]).pixels[:SHOWN] if any(splits[1]) else pictures.pixels[:SHOWN]
        held = [row["caption"] for row in pictures.only(splits[1]).rows[:SHOWN]]
        length = self.recipe["data"]["text_tokens"]
        self.words = self.base.texts(list(words), length)
        self.sheet_words = self.base.texts(held or [""] * len(self.shown), length)
        self.blank = self._encoded(torch.full_like(pictures.pixels[:1], 255 if self.kind == "subject" else 0))
        told = self.recipe.get("condition", {}).get("instruction", "")
        self.instruction = self.base.texts([told], length)
        print(f"{len(self.train)} examples to learn, {len(self.held)} held out", file=sys.stderr)

    def _pictures(self) -> tuple[Pictures, Tensor | None]:
        """Return pictures, and their exact conditions where they are scenes."""
        data = self.recipe["data"]
        if "scenes" in data:
            found = scenes.truths(data["scenes"], seed=self.recipe["run"]["seed"], size=data["size"])
            made, held = scenes.as_pictures(found), max(1, len(found) // 20)
            for row in made.rows[-held:]:
                row["split"] = "val_pair"
            return made, None if self.kind == "none" else scenes.exact_conditions(found, self.kind)
        return choose(load_pictures(Path(data["folder"]), size=data["size"]), **chosen(data)), None

    def _examples(
        self,
        pictures: Pictures,
        exact: Tensor | None,
        words: dict[str, int],
        dice: random.Random,
        copies: int,
    ) -> Examples:
        data = self.recipe["data"]
        choices = []
        for row in pictures.rows:
            drawn = [
                dice.choice(STYLES[row["style"]])
                if dice.random() < data.get("unnamed", 0.0)
                else self._wording(row, dice)
                for _ in range(data["wordings"])
            ]
            choices.append([words.setdefault(text, len(words)) for text in drawn])
        latents, conditions = [], []
        still = exact
        if still is None and self.kind != "none":
            still = scenes.made_of(pictures.pixels, self.kind)
        for copy in range(copies):
            pixels, condition = pictures.pixels, still
            if copy:  # the first is the picture as it is
                moves = _moves(len(pixels), data.get("shift", 0), data.get("mirror", 0.0), dice)
                pixels = moved(pixels, moves, 255)
                condition = moved(still, moves, 0) if still is not None and self.kind in MOVED else still
                if self.kind == "subject" and still is not None:
                    condition = scenes.turned(still, seed=dice.randrange(2**31))
            latents.append(self.base.pictures(pixels).half())
            if condition is not None:
                conditions.append(self._encoded(condition).half())
        joined = torch.cat(conditions) if conditions else None
        return Examples(torch.cat(latents), joined, torch.tensor(choices).repeat(copies, 1))

    def _encoded(self, condition: Tensor) -> Tensor:
        """Encode condition pictures at the recipe's part of the picture's side."""
        part = self.recipe.get("condition", {}).get("size", 1.0)
        if part != 1.0:
            side = round(condition.shape[-1] * part)
            condition = F.interpolate(condition.float(), size=(side, side), mode="area").round().byte()
        return self.base.pictures(condition)

    @staticmethod
    def _wording(row: dict[str, Any], dice: random.Random) -> str:
        return row["caption"] if row["style"] == "scene" else wording(row, dice)

    # Steps.

    def draw(
        self, part: Examples, count: int, dice: torch.Generator, *, drop: bool
    ) -> tuple[Tensor, Tensor | None, Prompts]:
        """Return `count` random examples: latents, conditions, prompts; with `drop` some lack the prompt, some the condition."""
        pick = torch.randint(len(part), (count,), generator=dice)
        which = part.choices[pick, torch.randint(part.choices.shape[1], (count,), generator=dice)]
        lots = torch.rand(2, count, generator=dice)
        if drop:
            which = torch.where(lots[0] < self.recipe["data"]["drop"], 0, which)
        latents = part.latents[pick.to(part.latents.device)].float()
        conditions = None
        if part.conditions is not None:
            conditions = part.conditions[pick.to(part.conditions.device)].float()
            blank = (lots[1] < self.recipe["condition"].get("drop", 0.0) * drop).to(conditions.device)
            conditions = torch.where(blank[:, None, None, None], self.blank.to(conditions), conditions)
        return latents, conditions, {name: x[which.to(x.device)] for name, x in self.words.items()}

    def use(self, conditions: Tensor | None) -> Use:
        """Return the adapter in use with condition latents [B, C, h, w]."""
        if conditions is None or not self.model.needs_condition:
            return Use(self.model)
        if self.model.control.name == "unic-adapter":
            text, pooled = (self.instruction.get(n) for n in ("encoder_hidden_states", "pooled_projections"))
            kind = self.base.transformer.dtype
            told = [
                None if x is None else x.to(kind).expand(len(conditions), *x.shape[1:])
                for x in (text, pooled)
            ]
            return Use(self.model, Instructed(conditions.to(kind), told[0], told[1]))  # type: ignore[arg-type]
        return Use(self.model, conditions)

    def losses(
        self, drawn: tuple[Tensor, Tensor | None, Prompts], noise: Tensor, times: Tensor, *, on: bool = True
    ) -> Tensor:
        """Return the loss of each sample [B], with the adapter or without."""
        latents, conditions, prompts = drawn
        steering = controlled(self.base.transformer, self.use(conditions)) if on else nullcontext()

        def denoise(noisy: Tensor, level: Tensor) -> Tensor:
            return self.base.velocity(noisy, level, prompts)

        with steering:
            return self.objective.losses(denoise, latents, noise, times)

    def step(self) -> float:
        """One batch, one move of the adapter's weights. Raises: FloatingPointError where the loss is no number."""
        noises = self.recipe["run"].get("noises", 1)
        drawn = self.draw(self.train, self.recipe["run"]["batch"] // noises, self.dice, drop=True)
        if noises > 1:  # one pass over a condition serves several noises of its picture
            drawn = (
                drawn[0].repeat(noises, 1, 1, 1),
                drawn[1],
                {name: x.repeat(noises, *(1,) * (x.dim() - 1)) for name, x in drawn[2].items()},
            )
        noise = torch.randn(drawn[0].shape, generator=self.dice).to(self.device)
        times = self.objective.times(len(noise), self.dice).to(self.device)
        loss = self.losses(drawn, noise, times).mean()
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} in step {self.steps()}: the weights were left as they were; lower the rate"
            )
        self.accelerator.backward(loss)
        self.master.step(self.factor(), self.recipe["optimizer"]["clip"])
        self.seen += len(noise) * self.accelerator.num_processes
        return float(loss.detach())

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Losses of the averaged weights with fixed noise and times: on learnt and held-out pictures, and on these with another
        picture's condition and without the adapter.
        """
        count, result = self.recipe["run"].get("checked", 96), {}
        with self._averaged():
            for name, part in (("learnt", self.train), ("held_out", self.held)):
                dice = torch.Generator().manual_seed(1)
                drawn = self.draw(part, count, dice, drop=False)
                noise = torch.randn(drawn[0].shape, generator=dice).to(self.device)
                spread = torch.special.ndtri(torch.linspace(0.02, 0.98, count))  # as the objective draws them
                times = torch.sigmoid(spread * self.objective.std + self.objective.mean).to(self.device)
                result[name] = float(self.losses(drawn, noise, times).mean())
            if drawn[1] is not None:
                other = (drawn[0], drawn[1].roll(1, 0), drawn[2])
                result["shuffled"] = float(self.losses(other, noise, times).mean())
            if not hasattr(self, "plain"):
                self.plain = float(self.losses(drawn, noise, times, on=False).mean())
        return result | {"without": self.plain}

    # What is left behind.

    def save(self) -> None:
        """Write resume state, adapter, progress and sample sheet. Raises: RuntimeError where the base has changed."""
        if not self.accelerator.is_main_process:
            return
        if weights_digest(self.base.transformer) != self.bytes:
            raise RuntimeError(
                "the base's weights have changed while the adapter was trained: nothing was saved"
            )
        progress = json.dumps(self.counts())
        _atomic(
            self.out / "state.safetensors", lambda path: save_file(self.state(), path, {"progress": progress})
        )
        _atomic(self.out / "progress.json", lambda path: path.write_text(progress))
        with self._averaged():
            save(self.model, self.out / "adapter.safetensors", self.base.transformer, self.about())
            if hasattr(self, "shown"):
                sheets = self.out / "sheets"
                sheets.mkdir(exist_ok=True)
                self.sheet_of().save(sheets / f"{self.seen:08d}.png")
                self.sheet_of().save(self.out / "sheet.png")

    def about(self) -> dict[str, Any]:
        """Return what the file says of itself beside its settings: condition, base, how long it was trained, the recipe."""
        return {
            "condition": self.kind, "preprocessor": scenes.PREPROCESSORS.get(self.kind),
            "base": self.base.name, "seen": self.seen, "steps": self.steps(),
            "seconds": round(self.spent, 1), "recipe": self.recipe, "last": self.log[-1] if self.log else None,
        }  # fmt: skip

    def counts(self) -> dict[str, Any]:
        """Return how far the run is, and beside which weights it was made."""
        return super().counts() | {"base": self.digest, "control": self.model.control.to_dict()}

    def restore(self, tensors: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Take up a run. Raises: Refused where it was made beside other weights or with other settings."""
        for name, here in (("base", self.digest), ("control", self.model.control.to_dict())):
            if json.loads(json.dumps(here)) != counts[name]:
                raise Refused(
                    f"{self.out.name} holds a run with {name} {counts[name]}, this one has {here}: give another --out"
                )
        super().restore(tensors, counts)

    @torch.no_grad()
    def sheet_of(self, scale: float = 3.0, steps: int = 20) -> Image.Image:
        """Draw held-out pictures: condition, what is made of it, and the real one, in three rows."""
        count = len(self.shown)
        conditions = None if self.held.conditions is None else self.held.conditions[:count].float()
        start = torch.Generator().manual_seed(0)
        noise = torch.randn(count, *self.held.latents.shape[1:], generator=start).to(self.device)
        empty = {name: x[:1].expand(count, *x.shape[1:]) for name, x in self.words.items()}

        def guided(noisy: Tensor, times: Tensor) -> Tensor:
            plain = self.base.velocity(noisy, times, empty)
            return plain + scale * (self.base.velocity(noisy, times, self.sheet_words) - plain)

        with controlled(self.base.transformer, self.use(conditions), steps=steps, memory=Memory()):
            made = self.base.decoded(euler(guided, noise, steps))
        real = (self.shown.float() / 127.5 - 1).to(made.device)
        rows = [made, real]
        if conditions is not None:
            rows.insert(0, F.interpolate(self.base.decoded(conditions), size=tuple(real.shape[-2:])))
        return _mosaic(torch.cat(rows), columns=count, enlarge=2)


def check_recipe(recipe: dict[str, Any]) -> None:
    """Look at a recipe before anything is loaded. Raises: ValueError naming the setting, what was given and what is allowed."""
    condition = recipe.get("condition", {})
    kind = condition.get("kind", "none")
    known = ("none", *scenes.PREPROCESSORS, *(("depth",) if "scenes" in recipe["data"] else ()))
    if kind not in known:
        raise ValueError(f"condition.kind must be one of {', '.join(known)}, got {kind!r}")
    batch, noises = recipe["run"]["batch"], recipe["run"].get("noises", 1)
    if not (isinstance(noises, int) and noises >= 1 and batch % noises == 0):
        raise ValueError(f"run.noises must be a whole number that divides run.batch={batch}, got {noises!r}")
    if recipe["run"]["compile"]:
        raise ValueError(
            "run.compile must be false: an adapter takes hold of blocks that run as they are written"
        )
    for section, name in (("condition", "drop"), ("data", "drop"), ("data", "mirror"), ("data", "unnamed")):
        value = recipe.get(section, {}).get(name, 0.0)
        if not 0 <= value <= 1:
            raise ValueError(f"{section}.{name} must be from 0 to 1, got {value!r}")
    if not 0 < condition.get("size", 1.0) <= 1:
        raise ValueError(f"condition.size must be above 0 and at most 1, got {condition['size']!r}")


def chosen(data: dict[str, Any]) -> dict[str, Any]:
    """Return which styles, subgroups and concepts a recipe learns from: its own, or those of the recipe it names."""
    import tomllib

    other: dict[str, Any] = {}
    if "concepts_of" in data:
        other = tomllib.loads((RECIPES / data["concepts_of"]).read_text())["data"]
    return {key: data.get(key, other.get(key, [])) for key in ("styles", "subgroups", "concepts")}


def moved(pictures: Tensor, moves: list[tuple[int, int, bool]], fill: int) -> Tensor:
    """Mirror and shift pictures [n, 3, H, W] by whole pixels; what comes in is `fill`."""
    most, (height, width) = max(1, *(max(abs(y), abs(x)) for y, x, _ in moves)), pictures.shape[-2:]
    padded = F.pad(pictures, (most,) * 4, value=fill)
    return torch.stack([
        (one.flip(-1) if flip else one)[:, most + y : most + y + height, most + x : most + x + width]
        for one, (y, x, flip) in zip(padded, moves, strict=True)
    ])  # fmt: skip


def _moves(count: int, shift: int, mirror: float, dice: random.Random) -> list[tuple[int, int, bool]]:
    return [
        (dice.randint(-shift, shift), dice.randint(-shift, shift), dice.random() < mirror)
        for _ in range(count)
    ]


def main() -> None:
    """Read the command line and train."""
    recipe, given = asked(__doc__)
    trainer = AdapterTrainer(recipe, given.out, given.minutes, given.start)
    trainer.run()
    print(json.dumps(trainer.log[-1] if trainer.log else {}))


if __name__ == "__main__":
    main()
