"""Train a shipped model from a recipe: `python -m training.train training/recipes/emoji.toml --out runs/emoji`.

Everything that decides the checkpoint stands in the recipe. A run can be stopped at any instant and started again with the
same command; `--minutes` ends it by the clock instead of the recipe's count of samples, with the same shape of schedule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from dit.experts.dynamic import complete
from dit.presets import backbone_class
from dit.text import encode, load_minilm
from training.attention import quick_backward
from training.data import Pictures, choose, load_pictures, wording
from training.objectives import FlowMatching, euler
from training.optimizers import Master
from training.stopping import heard, leave

SHEET = (
    "dog, 3d render", "red apple, cartoon", "rocket, flat illustration", "cat, black and white icon",
    "puppy, cartoon", "blue heart, 3d render", "cactus, cartoon", "lion, flat illustration",
    "strawberry, 3d render", "fox, cartoon", "guitar, black and white icon", "pizza, flat illustration",
    "sunflower, cartoon", "whale, 3d render", "ghost, cartoon", "frog, flat illustration",
)  # fmt: skip
"""Prompts of the sample sheet."""


@dataclass(slots=True)
class Batches:
    """Latents, and the encoded wordings of each of their pictures, on one device."""

    pixels: Tensor
    latents: Tensor
    tokens: Tensor
    mask: Tensor
    pooled: Tensor
    choices: Tensor

    def draw(
        self, count: int, drop: float, dice: torch.Generator, shift: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `count` random pictures, moved by up to `shift` px, and a wording of each; wording 0 is the empty prompt."""
        pick = torch.randint(len(self.latents), (count,), generator=dice)
        which = self.choices[pick, torch.randint(self.choices.shape[1], (count,), generator=dice)]
        which = torch.where(torch.rand(count, generator=dice) < drop, 0, which)
        if not shift:
            return self.latents[pick.to(self.latents.device)], self.prompts(which)
        moves = torch.randint(2 * shift + 1, (count, 2), generator=dice).tolist()
        side = self.pixels.shape[-1]
        padded = torch.nn.functional.pad(self.pixels[pick], (shift,) * 4, value=255)
        moved = torch.stack(
            [one[:, y : y + side, x : x + side] for one, (y, x) in zip(padded, moves, strict=True)]
        )
        return latents_of(moved, side // self.latents.shape[-1]).to(self.latents.device), self.prompts(which)

    def prompts(self, which: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs for wordings by index."""
        which = which.to(self.tokens.device)
        return {
            "encoder_hidden_states": self.tokens[which].float(),
            "encoder_attention_mask": self.mask[which],
            "pooled_projections": self.pooled[which].float(),
        }


def prepare(pictures: Pictures, recipe: dict[str, Any], device: torch.device) -> Batches:
    """Average pictures down to latents and encode every wording once."""
    scale, data = recipe["codec"]["scale"], recipe["data"]
    latents = latents_of(pictures.pixels, scale)
    dice = random.Random(recipe["run"]["seed"])
    texts, choices = {"": 0}, []
    for row in pictures.rows:
        drawn = [wording(row, dice) for _ in range(data["wordings"])]
        choices.append([texts.setdefault(text, len(texts)) for text in drawn])
    tokenizer, encoder = load_minilm()
    encoder = encoder.to(device)
    parts = [
        encode(tokenizer, encoder, list(texts)[i : i + 256], length=data["text_tokens"])
        for i in range(0, len(texts), 256)
    ]
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "mask", "pooled")]
    rest = (joined[0].bfloat16(), joined[1], joined[2], torch.tensor(choices))
    return Batches(pictures.pixels, latents.to(device), *rest)


def latents_of(pixels: Tensor, scale: int) -> Tensor:
    """Pictures uint8 [n, 3, H, W] -> latents [n, 3, H / scale, W / scale] in -1..1, by area average."""
    return torch.nn.functional.avg_pool2d(pixels.float() / 127.5 - 1, scale)


class Trainer:
    """One run: the model in its compute type, its master weights, the data, and where everything is written."""

    product = "transformer"  # the folder of a run that holds what it has made

    def __init__(self, recipe: dict[str, Any], out: Path, minutes: float | None, start: Path | None) -> None:
        self.recipe, self.out, self.minutes = recipe, out, minutes
        self.accelerator = Accelerator()
        self.device = self.accelerator.device
        run = recipe["run"]
        torch.manual_seed(run["seed"])
        self.objective, self.shift = FlowMatching(**recipe["objective"]), recipe["data"].get("shift", 0)
        self.model = self.make(start).to(self.device)
        self.master = self.optimized()
        self.model = self.model.to(getattr(torch, run["precision"]))
        if run["compile"]:
            self.model.compile_repeated_blocks()
        self.dice = torch.Generator().manual_seed(run["seed"] + self.accelerator.process_index)
        self.seen, self.spent = 0, 0.0
        self.log: list[dict[str, float]] = []
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def make(self, start: Path | None) -> Any:
        """Return the network of the recipe, untrained or as it lies in the folder `start`."""
        size = {k: v for k, v in self.recipe["model"].items() if k != "backbone"}
        kind = backbone_class(self.recipe["model"]["backbone"])
        return kind(**size) if start is None else kind.from_pretrained(start)

    def optimized(self) -> Master:
        """Return master weights and optimizers of what the model has to learn."""
        settings = self.recipe["optimizer"]
        return Master(self.model, **{k: settings[k] for k in ("name", "rate", "matrix_rate", "decay", "ema")})

    def load_data(self) -> None:
        """Read the pictures of the recipe and split them."""
        data = self.recipe["data"]
        pictures = choose(
            load_pictures(Path(data["folder"]), size=data["size"]),
            **{k: data[k] for k in ("styles", "subgroups", "concepts")},
        )
        self.train = prepare(
            pictures.only([r["split"] == "train" for r in pictures.rows]), self.recipe, self.device
        )
        self.held = prepare(
            pictures.only([r["split"] == "val_pair" for r in pictures.rows]), self.recipe, self.device
        )
        tokenizer, encoder = load_minilm()
        prompts = encode(
            tokenizer, encoder.to(self.device), ["", *SHEET], length=self.recipe["data"]["text_tokens"]
        )
        first = (self.train.pixels[:1], self.train.latents[:1])
        self.sheet = Batches(*first, prompts.tokens, prompts.mask, prompts.pooled, torch.zeros(1, 1))
        print(
            f"{len(self.train.latents)} pictures to learn, {len(self.held.latents)} held out", file=sys.stderr
        )

    def progress(self) -> float:
        """Share of the run that is done, by the clock or by samples."""
        if self.minutes is not None:
            return self.spent / 60 / self.minutes
        return float(self.seen / self.recipe["run"]["samples"])

    def steps(self) -> int:
        """Count of the run's steps so far."""
        return self.master.steps

    def phase(self) -> float:
        """Share of the learning-rate schedule that is done."""
        return self.progress()

    def factor(self) -> float:
        """Learning-rate factor: warm-up, constant, then one minus a square root down to zero."""
        settings = self.recipe["optimizer"]
        tail = (self.phase() - 1 + settings["cooldown"]) / settings["cooldown"]
        cooling = 1 - math.sqrt(min(max(tail, 0.0), 1.0))
        return float(min(1.0, (self.master.steps + 1) / settings["warmup"]) * max(cooling, 0.02))

    def step(self) -> float:
        """One batch, one move of the weights; return the loss."""
        run = self.recipe["run"]
        latents, prompts = self.train.draw(run["batch"], self.recipe["data"]["drop"], self.dice, self.shift)
        noise = torch.randn(latents.shape, generator=self.dice).to(self.device)
        times = self.objective.times(len(latents), self.dice).to(self.device)
        self.model.training_step = self.master.steps  # for losses whose target moves
        loss = self.complete_loss(latents, prompts, noise, times) + self.loss(latents, prompts, noise, times)
        self.accelerator.backward(loss + sum(self.model.auxiliary_losses().values()))
        self.master.step(self.factor(), self.recipe["optimizer"]["clip"])
        self.seen += len(latents) * self.accelerator.num_processes
        return float(loss.detach())

    def complete_loss(
        self, latents: Tensor, prompts: dict[str, Tensor], noise: Tensor, times: Tensor
    ) -> Tensor | float:
        """Return the loss of the complete network, in the first part of the run (`complete`) of one with dynamic experts."""
        if self.phase() >= self.recipe["run"].get("complete", 0.0):
            return 0.0
        with complete(self.model):
            return self.objective.losses(self._denoiser(prompts), latents, noise, times).mean()

    def loss(self, latents: Tensor, prompts: dict[str, Tensor], noise: Tensor, times: Tensor) -> Tensor:
        """Return the loss of a batch, without what the model's own parts add to it."""
        return self.objective.losses(self._denoiser(prompts), latents, noise, times).mean()

    def run(self) -> None:
        """Train to the end of the schedule, saving on the way. Raises: SystemExit after SIGTERM or SIGINT, when it is saved."""
        self.load_data()
        with heard() as signals, quick_backward(self.device, getattr(torch, self.recipe["run"]["precision"])):
            self._train(signals)
            self.save()
        if signals:
            leave(signals[0], self.seen)

    def _train(self, signals: list[int]) -> None:
        """Take steps until the schedule is over or a signal came."""
        run, began, saved, smooth = self.recipe["run"], time.monotonic(), time.monotonic(), None
        before = self.spent
        bar = tqdm(total=100.0, unit="%", initial=round(100 * self.progress(), 2), mininterval=5)
        while self.progress() < 1 and not signals:
            loss = self.step()
            self.spent = before + time.monotonic() - began
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            bar.update(min(100.0, 100 * self.progress()) - bar.n)
            bar.set_postfix(
                loss=f"{smooth:.4f}", seen=self.seen, rate=f"{self.seen / max(self.spent, 1):.0f}/s"
            )
            if self.steps() % run["check_every"] == 0:
                row = {"step": self.steps(), "seen": self.seen, "seconds": self.spent, "loss": smooth}
                self.log.append(row | self.check())
                print(json.dumps(self.log[-1]), file=sys.stderr, flush=True)
            if time.monotonic() - saved > 60 * run["save_every"]:
                self.save()
                saved = time.monotonic()

    @torch.no_grad()
    def check(self) -> dict[str, float]:
        """Loss of the averaged weights on held-out and on learnt pictures, with fixed noise and times."""
        result = {}
        with self._averaged():
            for name, batches in (("held_out", self.held), ("learnt", self.train)):
                dice = torch.Generator().manual_seed(1)
                latents, prompts = batches.draw(128, 0.0, dice)
                noise = torch.randn(latents.shape, generator=dice).to(self.device)
                times = torch.linspace(0.02, 0.98, len(latents)).to(self.device)
                result[name] = float(
                    self.objective.losses(self._denoiser(prompts), latents, noise, times).mean()
                )
        return result

    def save(self) -> None:
        """Write resume state, averaged model, loss curve and sample sheet, each under its final name only when whole."""
        if not self.accelerator.is_main_process:
            return
        progress = json.dumps(self.counts())
        # Weights and counts in one file: a kill between two files would leave counts that are not those of the weights.
        _atomic(
            self.out / "state.safetensors", lambda path: save_file(self.state(), path, {"progress": progress})
        )
        _atomic(self.out / "progress.json", lambda path: path.write_text(progress))
        with self._averaged():
            self._sheet().save(self.out / "sheet.png")
            sheets = self.out / "sheets"
            sheets.mkdir(exist_ok=True)
            self._sheet().save(sheets / f"{self.seen:08d}.png")
            _atomic(self.out / self.product, self.write_model)

    def state(self) -> dict[str, Tensor]:
        """Return everything that a run needs to go on, as named tensors."""
        return self.master.state() | {"dice": self.dice.get_state()}

    def counts(self) -> dict[str, Any]:
        """Return how far the run is: samples seen, seconds spent, and its log."""
        return {"seen": self.seen, "seconds": self.spent, "log": self.log}

    def restore(self, tensors: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Take up what `state` and `counts` returned."""
        self.dice.set_state(tensors.pop("dice"))
        self.master.load(tensors)
        self.seen, self.spent, self.log = counts["seen"], counts["seconds"], counts["log"]

    def write_model(self, folder: Path) -> None:
        """Write the model as a diffusers folder."""
        self.model.save_pretrained(folder, max_shard_size="15MB")

    def _resume(self) -> None:
        file = self.out / "state.safetensors"
        if not file.is_file():
            return
        with safe_open(file, "pt") as opened:
            kept = (opened.metadata() or {}).get("progress")
        # Runs of earlier versions kept the counts in the file beside.
        counts = json.loads(kept if kept is not None else (self.out / "progress.json").read_text())
        self.restore(load_file(file), counts)
        print(f"resumed after {self.seen} samples", file=sys.stderr)

    def _denoiser(self, prompts: dict[str, Tensor], model: Any = None) -> Any:
        model = self.model if model is None else model
        if not model.config.get("pooled_dim"):  # a network without a pooled path, such as PT-DiT
            prompts = {name: value for name, value in prompts.items() if name != "pooled_projections"}

        def denoise(noisy: Tensor, times: Tensor) -> Tensor:
            return model(noisy, times * 1000, **prompts, return_dict=False)[0]

        return denoise

    def _averaged(self) -> _Swapped:
        return _Swapped(self.master)

    def _sheet(self, scale: float = 3.0, steps: int = 25) -> Image.Image:
        noise = torch.randn(
            len(SHEET), *self.sheet.latents.shape[1:], generator=torch.Generator().manual_seed(0)
        ).to(self.device)
        asked = self.sheet.prompts(torch.arange(1, len(SHEET) + 1))
        empty = self.sheet.prompts(torch.zeros(len(SHEET), dtype=torch.long))

        def guided(noisy: Tensor, times: Tensor) -> Tensor:
            base: Tensor = self._denoiser(empty)(noisy, times)
            return base + scale * (self._denoiser(asked)(noisy, times) - base)

        return _mosaic(euler(guided, noise, steps), columns=4)


class _Swapped:
    """The live model with the averaged weights, uncompiled, for as long as the `with` lasts."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.stance = torch.compiler.set_stance("force_eager")

    def __enter__(self) -> None:
        self.stance.__enter__()
        with torch.no_grad():
            torch._foreach_copy_(list(self.master.live), self.master.average)

    def __exit__(self, *_: object) -> None:
        self.stance.__exit__(None, None, None)
        with torch.no_grad():
            torch._foreach_copy_(list(self.master.live), self.master.weights)


def _mosaic(pictures: Tensor, columns: int, enlarge: int = 4) -> Image.Image:
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1)
    count, height, width, _ = pixels.shape
    rows = -(-count // columns)
    board = Image.new("RGB", (columns * width * enlarge, rows * height * enlarge), "white")
    for i, picture in enumerate(pixels):
        tile = Image.fromarray(picture.numpy()).resize(
            (width * enlarge, height * enlarge), Image.Resampling.NEAREST
        )
        board.paste(tile, (i % columns * width * enlarge, i // columns * height * enlarge))
    return board


def _atomic(path: Path, write: Any) -> None:
    """Let `write` make a file or folder beside its place, then put it there."""
    draft, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    for rest in (draft, old):
        shutil.rmtree(rest, ignore_errors=True)
    write(draft)
    if (
        path.is_dir()
    ):  # a folder cannot be replaced in one move; what a kill in between leaves is whole, only named .old
        os.replace(path, old)
    os.replace(draft, path)
    shutil.rmtree(old, ignore_errors=True)


def asked(about: str | None) -> tuple[dict[str, Any], argparse.Namespace]:
    """Read the command line of a trainer: the recipe with its changes, and the rest."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an earlier run in it goes on"
    )
    parser.add_argument(
        "--minutes", type=float, help="end by the clock, with the whole schedule in that time"
    )
    parser.add_argument(
        "--start", type=Path, help="transformer folder to start from, instead of random weights"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=JSON",
        help="change one setting of the recipe",
    )
    given = parser.parse_args()
    recipe = tomllib.loads(given.recipe.read_text())
    for change in given.set:
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        recipe[section][name] = json.loads(value)
    return recipe, given


def main() -> None:
    """Read the command line and train."""
    recipe, given = asked(__doc__)
    Trainer(recipe, given.out, given.minutes, given.start).run()


if __name__ == "__main__":
    main()
