"""Train an In-Context LoRA on a few sets: `python -m training.panels training/recipes/in-context-lora.toml --out runs/panels`.

A set is one style with several concepts, or one concept in several styles, drawn from captioned pictures; its canvas is learnt in
any order of its panels. The base is frozen and never written; data, schedule, stops and resuming are those of `training.train`.

Paper: In-Context LoRA for Diffusion Transformers, Huang et al. 2024, arXiv:2410.23775.
Differs: panels change places from sample to sample, and in a share of the batches some panels are clean at time 0 and only the
others are learnt, so that given panels are heard; captions name what all panels share in one place, in each, or not at all.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from control import Use, controlled
from control._files import save as save_adapter
from control.in_context_lora import Captions, InContextLoRA
from pipelines.layout import Layout
from training import train
from training.data import STYLES, Pictures, choose, load_pictures
from training.distill import load_network
from training.objectives import euler
from training.optimizers import Master

KINDS = ("style", "concept")
FILE = "in-context-lora.safetensors"


@dataclass(frozen=True, slots=True)
class PictureSet:
    """The rows of a set's panels in `Pictures`, and what they share."""

    rows: tuple[int, ...]
    kind: str


def draw_sets(
    rows: Sequence[dict[str, Any]], count: int, panels: int, kinds: Sequence[str], dice: random.Random
) -> list[PictureSet]:
    """Draw `count` different sets of `panels` pictures, the kinds in turn.

    "style": one style, different concepts. "concept": one concept, different styles.

    Raises:
        ValueError: kinds that are not known, or pictures that do not make so many sets.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"data: kinds are of {', '.join(KINDS)}, got {kind!r}")
    if count < 1 or panels < 1 or not kinds:
        raise ValueError(f"data: sets and panels must be at least 1, got {count} and {panels}")
    shared: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in KINDS}
    for i, row in enumerate(rows):
        shared["style"].setdefault(row["style"], {}).setdefault(row["concept"], i)
        shared["concept"].setdefault(row["concept"], {}).setdefault(row["style"], i)
    found: dict[PictureSet, None] = {}
    for tries in range(100 * count):
        if len(found) == count:
            break
        kind = kinds[tries % len(kinds)]
        large = [one for one in shared[kind].values() if len(one) >= panels]
        if large:
            chosen = sorted(dice.sample(sorted(dice.choice(large).values()), panels))
            found.setdefault(PictureSet(tuple(chosen), kind))
    if len(found) < count:
        raise ValueError(
            f"data: {len(rows)} pictures make no {count} different sets of {panels} ({', '.join(kinds)}), only {len(found)}"
        )
    return list(found)


def captions_of(rows: Sequence[dict[str, Any]], kind: str, dice: random.Random) -> Captions:
    """Draw one way of asking for a set: what is shared is told once, in every panel, or (a style) not at all."""
    styles = [dice.choice(STYLES[row["style"]]) for row in rows]
    names = [row["concept"] for row in rows]
    way = dice.random()
    if kind == "concept":
        if way < 0.6:
            return Captions(tuple(styles), names[0])
        return Captions(tuple(f"{a}, {b}" for a, b in zip(names, styles, strict=True)))
    if way < 0.4:
        return Captions(tuple(names), styles[0])
    if way < 0.7:
        return Captions(tuple(names), dice.choice(("one style", "")))
    return Captions(tuple(f"{name}, {styles[0]}" for name in names))


def split_concepts(pictures: Pictures, share: float) -> tuple[Pictures, Pictures]:
    """Return pictures to learn (training split alone) and pictures of `share` of the concepts, which no set to learn holds."""
    every = sorted({row["concept"] for row in pictures.rows})
    kept = set(random.Random(0).sample(every, round(share * len(every))))
    learnt = [row["split"] == "train" and row["concept"] not in kept for row in pictures.rows]
    return pictures.only(learnt), pictures.only([row["concept"] in kept for row in pictures.rows])


@dataclass(slots=True)
class Canvases:
    """Sets as canvases: pixels uint8 [S, n, 3, H, W]; orders of panels [S, W, n] with a joint caption each [S, W]."""

    pixels: Tensor
    layout: Layout
    scale: int
    orders: Tensor
    choices: Tensor
    texts: train.Batches

    @property
    def latents(self) -> Tensor:
        """Every set in its own order, [S, 3, H, W]."""
        return self.canvases(self.pixels)

    def canvases(self, panels: Tensor) -> Tensor:
        """Panels uint8 [B, n, 3, H, W] -> latents of their canvas [B, 3, H, W], white between them."""
        small = train.latents_of(panels.flatten(0, 1), self.scale).unflatten(0, panels.shape[:2])
        return self.layout.divided(self.scale).joined(small, fill=1.0)

    def draw(
        self, count: int, drop: float, dice: torch.Generator, shift: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return canvases of `count` random sets in random orders, panels moved by up to `shift` px, and their captions."""
        pick = torch.randint(len(self.pixels), (count,), generator=dice)
        way = torch.randint(self.choices.shape[1], (count,), generator=dice)
        which = self.choices[pick, way]
        which = torch.where(torch.rand(count, generator=dice) < drop, 0, which)
        panels = self.pixels[pick.unsqueeze(1), self.orders[pick, way]]
        if shift:
            moves = torch.randint(2 * shift + 1, (count * self.layout.count, 2), generator=dice).tolist()
            flat = torch.nn.functional.pad(panels.flatten(0, 1), (shift,) * 4, value=255)
            height, width = panels.shape[-2:]
            moved = [one[:, y : y + height, x : x + width] for one, (y, x) in zip(flat, moves, strict=True)]
            panels = torch.stack(moved).unflatten(0, panels.shape[:2])
        return self.canvases(panels).to(self.texts.tokens.device), self.texts.prompts(which)


def canvases_of(
    pictures: Pictures,
    sets: Sequence[PictureSet],
    layout: Layout,
    recipe: dict[str, Any],
    device: torch.device,
) -> Canvases:
    """Draw orders and captions of sets and encode the captions once."""
    dice, data = random.Random(recipe["run"]["seed"]), recipe["data"]
    texts: dict[str, int] = {"": 0}
    orders, choices = [], []
    for one in sets:
        ways = [dice.sample(range(layout.count), layout.count) for _ in range(data["wordings"])]
        rows = [[pictures.rows[one.rows[i]] for i in order] for order in ways]
        asked = [captions_of(some, one.kind, dice).joint() for some in rows]
        orders.append(ways)
        choices.append([texts.setdefault(text, len(texts)) for text in asked])
    tokenizer, encoder = train.load_minilm()
    encoder, words = encoder.to(device), list(texts)
    parts = [
        train.encode(tokenizer, encoder, words[i : i + 256], length=data["text_tokens"])
        for i in range(0, len(words), 256)
    ]
    cut = sum(count > data["text_tokens"] for part in parts for count in part.counts)
    if cut:
        raise ValueError(
            f"data: text_tokens is {data['text_tokens']}, and {cut} of {len(words)} joint captions are longer: their last "
            "panels would have no caption"
        )
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "mask", "pooled")]
    pixels = torch.stack([pictures.pixels[list(one.rows)] for one in sets])
    held = torch.tensor(choices)
    texts_held = train.Batches(pixels[:1, 0], pixels[:1, 0], joined[0].bfloat16(), joined[1], joined[2], held)
    return Canvases(pixels, layout, recipe["codec"]["scale"], torch.tensor(orders), held, texts_held)


class Steered(nn.Module):
    """A frozen network and the adapter that is learnt beside it."""

    def __init__(self, base: nn.Module, adapter: nn.Module) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    @property
    def config(self) -> Any:
        """The settings of the network."""
        return self.base.config

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Return none: the parts of a frozen network have nothing to learn."""
        return {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with the adapter at full strength."""
        with controlled(self.base, Use(self.adapter)):  # type: ignore[arg-type]  # nn.Module widens the attribute
            return self.base(*args, **kwargs)


class PanelTrainer(train.Trainer):
    """A run: `[base]` of the recipe in the place of `[model]`, `[adapter]`, and sets in the place of pictures."""

    product = "adapter"

    def make(self, start: Path | None) -> Any:
        """Return the frozen base (of the recipe, or of the folder `start`) with a fresh adapter."""
        recipe = self.recipe
        if recipe["run"]["compile"]:
            raise ValueError("run: compile must be false: a compiled network does not see a LoRA")
        base = load_network(Path(recipe["base"]["folder"]) if start is None else start).requires_grad_(False)
        settings = InContextLoRA(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in recipe["adapter"].items()}
        )
        size = recipe["data"]["size"]
        self.layout = Layout.of(
            settings.panels, size, size, arrangement=settings.arrangement, gutter=recipe["data"]["gutter"]
        )
        self.multiple = recipe["codec"]["scale"] * int(base.config.patch_size)
        self.layout.check(self.multiple)
        return Steered(base, settings.build(base).requires_grad_(True))

    def optimized(self) -> Master:
        """Return master weights of the adapter, and the digest that the base has to keep."""
        self.before = ""
        return super().optimized()

    def load_data(self) -> None:
        """Draw the sets of the recipe, and others of concepts that none of them holds."""
        data = self.recipe["data"]
        pictures = choose(
            load_pictures(Path(data["folder"]), size=data["size"]),
            **{k: data[k] for k in ("styles", "subgroups", "concepts")},
        )
        learnt, held = split_concepts(pictures, data["held_concepts"])
        dice = random.Random(self.recipe["run"]["seed"])
        counts = ((learnt, data["sets"]), (held, data["held_sets"]))
        made = [
            canvases_of(part, draw_sets(part.rows, count, self.layout.count, data["kinds"], dice), self.layout,
                        self.recipe, self.device)
            for part, count in counts
        ]  # fmt: skip
        self.train, self.held = made  # type: ignore[assignment]  # canvases are drawn from as pictures are
        self.sheet = made[1].texts
        self.before = digest_of(self.model.base)
        print(
            f"{data['sets']} sets of {self.layout.count} to learn, {data['held_sets']} held out",
            file=sys.stderr,
        )

    def loss(self, latents: Tensor, prompts: dict[str, Tensor], noise: Tensor, times: Tensor) -> Tensor:
        """Return the loss of a batch; in a share of them some panels are clean at time 0 and are not learnt."""
        count, share = self.layout.count, self.recipe["data"]["given"]
        if count == 1 or not share or float(torch.rand((), generator=self.dice)) >= share:
            return super().loss(latents, prompts, noise, times)
        some = 1 + int(torch.randint(count - 1, (), generator=self.dice))
        known = torch.randperm(count, generator=self.dice)[:some].tolist()
        return self.loss_beside(known, latents, prompts, noise, times)

    def loss_beside(
        self, known: Sequence[int], latents: Tensor, prompts: dict[str, Tensor], noise: Tensor, times: Tensor
    ) -> Tensor:
        """Return the loss on all panels but the known ones, which the network sees clean and at time 0."""
        given = self.layout.divided(self.recipe["codec"]["scale"]).mask(known).to(latents.device)
        tokens = self.layout.divided(self.multiple).mask(known).flatten().to(latents.device)
        level = times.reshape(-1, 1, 1, 1) * ~given
        noisy = (1 - level) * latents + level * noise
        each = times.unsqueeze(1) * ~tokens  # [B, N]
        error = self._denoiser(prompts)(noisy, each).float() - (noise - latents).float()
        squares = torch.where(given, 0.0, error.square())
        mean = squares.sum(dim=(1, 2, 3)) / (~given).sum() / latents.shape[1]
        return (mean * self.objective.weights(times)).mean()

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Loss of the averaged adapter on held-out and on learnt sets, with fixed noise and times."""
        result = {}
        with self._averaged():
            for name, canvases in (("held_out", self.held), ("learnt", self.train)):
                dice = torch.Generator().manual_seed(1)
                latents, prompts = canvases.draw(self.recipe["run"]["check_sets"], 0.0, dice)
                noise = torch.randn(latents.shape, generator=dice).to(self.device)
                times = torch.linspace(0.02, 0.98, len(latents)).to(self.device)
                losses = self.objective.losses(self._denoiser(prompts), latents, noise, times)
                result[name] = float(losses.mean())
        return result

    def save(self) -> None:
        """As `Trainer.save`. Raises: RuntimeError if the base has changed."""
        if self.before and digest_of(self.model.base) != self.before:
            raise RuntimeError("the base has changed in training; nothing was saved")
        super().save()

    def write_model(self, folder: Path) -> None:
        """Write the adapter as a file that `control.load` reads, with the recipe in its metadata."""
        folder.mkdir(parents=True)
        about = {
            "recipe": self.recipe,
            "seen": self.seen,
            "seconds": round(self.spent),
            "layout": self.layout.to_dict(),
        }
        save_adapter(self.model.adapter, folder / FILE, self.model.base, about)

    def _sheet(self, scale: float = 3.0, steps: int = 12) -> Any:
        """Draw the canvases of the first held-out sets, each as its first caption asks for it."""
        held: Any = self.held
        count = min(8, len(held.pixels))
        shape = (count, *held.latents.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        asked = self.sheet.prompts(held.choices[:count, 0])
        empty = self.sheet.prompts(torch.zeros(count, dtype=torch.long))

        def guided(noisy: Tensor, times: Tensor) -> Tensor:
            base: Tensor = self._denoiser(empty)(noisy, times)
            return base + scale * (self._denoiser(asked)(noisy, times) - base)

        return train._mosaic(euler(guided, noise, steps), columns=4, enlarge=2)


@torch.no_grad()
def digest_of(module: nn.Module) -> str:
    """Return a digest of every byte of a module's weights and buffers."""
    found = hashlib.sha256()
    for name, value in module.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    """Read the command line and train."""
    recipe, given = train.asked(__doc__)
    PanelTrainer(recipe, given.out, given.minutes, given.start).run()


if __name__ == "__main__":
    main()
