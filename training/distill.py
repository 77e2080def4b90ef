"""Distil a trained network into a cheaper one: `python -m training.distill training/recipes/moe.toml --out runs/moe --minutes 60`.

The student is made from the teacher, by inheritance (LiT) or by cutting its perceptrons into experts (Dense2MoE), and learns in
stages, each with its share of the run, its trained weights and its losses. Data, optimizers, schedule, stops and resuming are
those of `training.train`.

Paper: Dense2MoE, Zheng et al. 2025, arXiv:2510.09094 (three stages; feature losses normalised by layer); LiT, Wang et al. 2025,
arXiv:2501.12976 (hybrid distillation of noise and variance).
Differs: the normalised feature losses share one budget, the size of the output loss, in proportion to the teacher's norms.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit.block_mixture import BlockMixture, group_blocks, groups_of
from dit.dense2moe import (
    Scores,
    convert,
    magnitude_scores,
    network_class,
    random_scores,
    save_converted,
    taylor_scores,
)
from dit.experts.mixture import set_active
from dit.seams import Block, around_blocks, blocks_of
from training.fitting import fit_convolutions
from training.inherit import inherit
from training.objectives import hybrid
from training.optimizers import Master
from training.train import Trainer, asked

WAYS = ("inherit", "mixture")
IMPORTANCE = ("taylor", "magnitude", "random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each loss counts; all of them 0 or more.

    Attributes:
        task: loss on the data. output: the teacher's noise or velocity. variance: its learned variance, where it has one.
        features: output of each block of the student (of each group, where blocks are grouped) against the teacher's there.
    """

    task: float = 1.0
    output: float = 0.5
    variance: float = 0.05
    features: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 0:
                raise ValueError(f"loss: {name} must be 0 or more, got {value!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One part of a run.

    Attributes:
        share: its part of the whole run, 0-1. name: for the log.
        train: patterns of the names of weights that learn, with `!` before them of those that do not; the rest is frozen.
        active: routed experts a token uses from here on; None leaves that as it is.
        blocks: stack -> settings of the groups that its blocks form from here on.
        rate: factor on the learning rates. loss: weights of the losses that differ from the recipe's.
    """

    share: float
    name: str = ""
    train: tuple[str, ...] = ("*",)
    active: int | None = None
    blocks: dict[str, dict[str, Any]] = field(default_factory=dict)
    rate: float = 1.0
    loss: dict[str, float] = field(default_factory=dict)


def stages_of(recipe: dict[str, Any]) -> tuple[Stage, ...]:
    """Return the stages of a recipe, one for all of it where it names none. Raises: ValueError for shares that are no whole."""
    given = recipe.get("stage") or [{"share": 1.0}]
    stages = tuple(Stage(**one | {"train": tuple(one.get("train", ["*"]))}) for one in given)
    total = sum(one.share for one in stages)
    if min(one.share for one in stages) <= 0 or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(
            f"stage: shares must be above 0 and add up to 1, got {[one.share for one in stages]}"
        )
    return stages


def feature_loss(student: list[Tensor], teacher: list[Tensor], budget: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared errors of features, scaled so that their sum is `budget` whatever their sizes; and the errors, [layers].

    Each layer's weight is |budget| / |its error|, times its share of the teacher's norms: no layer dominates.
    """
    errors = torch.stack(
        [(a.float() - b.float()).square().mean() for a, b in zip(student, teacher, strict=True)]
    )
    norms = torch.stack([one.float().norm() / one.numel() ** 0.5 for one in teacher])
    weights = budget.detach().abs() / errors.detach().clamp_min(1e-12) * norms / norms.sum()
    return (weights * errors).sum(), errors.detach()


@contextmanager
def features(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what every block returns inside, its streams joined [B, tokens, D], in the order of the calls."""
    found: list[Tensor] = []

    def around(block: Block, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = inner(*args, **kwargs)
        found.append(
            output
            if isinstance(output, Tensor)
            else torch.cat([one for one in output if one is not None], dim=1)
        )
        return output

    with around_blocks(blocks_of(model), around):
        yield found


def counterparts(student: nn.Module, teacher: nn.Module) -> list[int]:
    """Return which block of the teacher ends where each block or group of the student does.

    Raises: ValueError where the two have not as many blocks.
    """
    ends: list[int] = []
    groups = groups_of(student)
    for block in blocks_of(student):
        size = len(groups[block.path].blocks) if block.path in groups else 1
        ends.append((ends[-1] if ends else -1) + size)
    if len(blocks_of(teacher)) != ends[-1] + 1:
        raise ValueError(f"the teacher has {len(blocks_of(teacher))} blocks and the student {ends[-1] + 1}")
    return ends


class Distiller(Trainer):
    """A run with a teacher: `[teacher]` and `[student]` of the recipe in the place of `[model]`, and its stages."""

    def __init__(self, recipe: dict[str, Any], out: Path, minutes: float | None) -> None:
        self.stages, self.stage = stages_of(recipe), 0
        self.weights = [Weights(**recipe.get("loss", {}) | one.loss) for one in self.stages]
        if recipe["student"].get("make") not in WAYS:
            raise ValueError(
                f"student: make is one of {', '.join(WAYS)}, got {recipe['student'].get('make')!r}"
            )
        self.parts: dict[str, float] = {}
        self.reference: float | None = None
        self.earlier = 0  # steps of the stages that are done
        super().__init__(recipe, out, minutes, None)

    def make(self, start: Path | None) -> Any:
        """Return the student, made from the teacher and ready for the first stage."""
        self.teacher = (
            load_network(Path(self.recipe["teacher"]["folder"])).to(self.device).requires_grad_(False)
        )
        settings = {k: v for k, v in self.recipe["student"].items() if k not in ("make", "fit")}
        report: Any
        if self.recipe["student"]["make"] == "inherit":
            student, report = inherit(self.teacher, **settings)
            if self.recipe["student"].get("fit") and not self._goes_on():
                self.fit(student, self.recipe["student"]["fit"])
        else:
            student = copy.deepcopy(self.teacher).requires_grad_(True)
            report = convert(student, settings["experts"], self._scores(student, settings))
        print(report, file=sys.stderr)
        self._prepare(student.train(), 0)
        if self.recipe["run"]["compile"]:
            self.teacher.compile_repeated_blocks()
        self.teacher.to(getattr(torch, self.recipe["run"]["precision"]))
        return student

    def load_data(self) -> None:
        """Read the pictures of the recipe, once."""
        if not hasattr(self, "train"):
            super().load_data()

    def steps(self) -> int:
        """Count of the run's steps so far, in all stages."""
        return self.earlier + self.master.steps

    def phase(self) -> float:
        """Share of the stage at hand that is done: every stage has its own warm-up and its own end."""
        before = sum(one.share for one in self.stages[: self.stage])
        return (self.progress() - before) / self.stages[self.stage].share

    def factor(self) -> float:
        """Learning-rate factor, times the stage's own."""
        return super().factor() * self.stages[self.stage].rate

    def optimized(self) -> Master:
        """Return masters of the weights that this stage trains."""
        chosen = self.stages[self.stage].train
        for name, one in self.model.named_parameters():
            kept_out = any(fnmatch(name, pattern[1:]) for pattern in chosen if pattern.startswith("!"))
            one.requires_grad_(not kept_out and any(fnmatch(name, pattern) for pattern in chosen))
        if not any(one.requires_grad for one in self.model.parameters()):
            raise ValueError(f"stage {self.stage}: no weight has a name like {', '.join(chosen)}")
        return super().optimized()

    def step(self) -> float:
        """One batch, in the next stage where its time has come."""
        while self.stage + 1 < len(self.stages) and self.phase() >= 1:
            self.advance()
        return super().step()

    def advance(self) -> None:
        """Go on to the next stage with the averaged weights of this one."""
        earlier = {
            id(one): average for one, average in zip(self.master.live, self.master.average, strict=True)
        }
        with torch.no_grad():
            torch._foreach_copy_(list(self.master.live), self.master.average)
        self.earlier += self.master.steps
        self.stage += 1
        self._prepare(self.model, self.stage)
        self.master = self.optimized()
        with torch.no_grad():  # the average in full precision, which the live weights may have rounded
            for live, weight, average in zip(
                self.master.live, self.master.weights, self.master.average, strict=True
            ):
                known = earlier.get(id(live))
                if known is not None:
                    weight.copy_(known)
                    average.copy_(known)
        print(f"stage {self.stage} {self.stages[self.stage].name}", file=sys.stderr)

    def loss(self, latents: Tensor, prompts: dict[str, Tensor], noise: Tensor, times: Tensor) -> Tensor:
        """Return the weighted sum of the losses of this stage; `parts` has them one by one."""
        weights, channels = self.weights[self.stage], latents.shape[1]
        seen: dict[str, Tensor] = {}

        def student(noisy: Tensor, level: Tensor) -> Tensor:
            seen["noisy"], seen["out"] = noisy, self._denoiser(prompts)(noisy, level)
            return seen["out"][:, :channels]

        with features(self.model) as ours:
            task = self.objective.losses(student, latents, noise, times).mean()
        with torch.no_grad(), features(self.teacher) as theirs:
            wanted = self._denoiser(prompts, self.teacher)(seen["noisy"], times)
        output = self._against(seen["out"], wanted, channels, times, noise=1.0, variance=0.0)
        total = weights.task * task
        total = total + self._against(
            seen["out"], wanted, channels, times, noise=weights.output, variance=weights.variance
        )
        self.parts = {"task": float(task.detach()), "output": float(output.detach())}
        if weights.features:
            ends = counterparts(self.model, self.teacher)
            layers, errors = feature_loss(ours, [theirs[i] for i in ends], output)
            total = total + weights.features * layers
            self.parts["features"] = float(errors.mean())
        return total

    def check(self) -> dict[str, float]:
        """Losses of student and teacher on the same held-out pictures, and where the run is."""
        if self.reference is None:
            student, self.model = self.model, self.teacher
            try:
                self.reference = super().check()["held_out"]
            finally:
                self.model = student
        return super().check() | {"teacher_held_out": self.reference, "stage": self.stage} | self.parts

    def state(self) -> dict[str, Tensor]:
        """Return what a run needs to go on, the frozen weights among it: an earlier stage may have trained them."""
        learning = set(self.master.names)
        frozen = {
            f"frozen.{n}": one.detach() for n, one in self.model.named_parameters() if n not in learning
        }
        return super().state() | {name: one.contiguous() for name, one in frozen.items()}

    def counts(self) -> dict[str, Any]:
        """Return how far the run is, its stage included."""
        return super().counts() | {"stage": self.stage, "earlier": self.earlier}

    def restore(self, tensors: dict[str, Tensor], counts: dict[str, Any]) -> None:
        """Walk through the stages that are done, then take up the state."""
        while self.stage < counts["stage"]:
            self.advance()
        with torch.no_grad():
            for name, one in self.model.named_parameters():
                if f"frozen.{name}" in tensors:
                    one.copy_(tensors.pop(f"frozen.{name}"))
        super().restore(tensors, counts)
        self.earlier = counts["earlier"]

    def write_model(self, folder: Path) -> None:
        """Write the student; groups of blocks in a network of diffusers need `load_converted` to be read again."""
        if groups_of(self.model):
            save_converted(self.model, folder, max_shard_size="15MB")
        else:
            super().write_model(folder)

    def _prepare(self, student: Any, stage: int) -> None:
        """Give the student the form that a stage asks for."""
        asked_for = self.stages[stage]
        if asked_for.blocks:
            group_blocks(student, {name: BlockMixture(**one) for name, one in asked_for.blocks.items()})
        if asked_for.active is not None:
            set_active(student, asked_for.active)

    def _against(
        self, ours: Tensor, wanted: Tensor, channels: int, times: Tensor, *, noise: float, variance: float
    ) -> Tensor:
        """The distance to the teacher's output, weighted by the time as the loss on the data is."""
        each = hybrid(ours, wanted, channels, noise=noise, variance=variance)
        return (each * self.objective.weights(times)).mean()

    def _scores(self, dense: Any, settings: dict[str, Any]) -> Scores:
        kind, seed = settings.get("importance", "taylor"), self.recipe["run"]["seed"]
        if kind not in IMPORTANCE:
            raise ValueError(f"student: importance is one of {', '.join(IMPORTANCE)}, got {kind!r}")
        if self._goes_on() or kind == "random":
            return random_scores(dense, seed)
        return magnitude_scores(dense) if kind == "magnitude" else self.importance(dense, settings)

    def importance(self, dense: Any, settings: dict[str, Any]) -> Scores:
        """Return Taylor's importance of the hidden channels of a dense network, from a few batches of the data."""
        return taylor_scores(dense, [self._first_batches(dense)] * settings.get("batches", 8))

    def fit(self, student: Any, batches: int) -> None:
        """Fit the convolutions of a linear student to the teacher's softmax, on a few batches of the data."""
        one = self._first_batches(self.teacher)
        explained = fit_convolutions(student, self.teacher, [one] * batches)
        mean = sum(explained.values()) / len(explained)
        print(f"convolutions fitted: {mean:.0%} of what linear attention lacks", file=sys.stderr)

    def _goes_on(self) -> bool:
        """Whether an earlier run lies in the folder: only the form of the student matters then, its weights are read back."""
        return (self.out / "state.safetensors").is_file()

    def _first_batches(self, network: Any) -> Callable[[], Tensor]:
        """Return a function that runs a network on the next of a fixed row of batches, and returns its loss on the data."""
        self.load_data()
        dice = torch.Generator().manual_seed(self.recipe["run"]["seed"])

        def batch() -> Tensor:
            latents, prompts = self.train.draw(
                self.recipe["run"]["batch"], self.recipe["data"]["drop"], dice, self.shift
            )
            noise = torch.randn(latents.shape, generator=dice).to(self.device)
            times = self.objective.times(len(latents), dice).to(self.device)

            def denoise(noisy: Tensor, level: Tensor) -> Tensor:
                out: Tensor = self._denoiser(prompts, network)(noisy, level)
                return out[:, : latents.shape[1]]

            return self.objective.losses(denoise, latents, noise, times).mean()

        return batch


def load_network(folder: Path) -> Any:
    """Return the transformer of a folder, or of a pipeline's folder, ours or diffusers', in float32."""
    inner = folder / "transformer"
    folder = inner if inner.is_dir() else folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"teacher: {folder} is no folder of a transformer or pipeline")
    return network_class(folder).from_pretrained(folder, torch_dtype=torch.float32).eval()


def main() -> None:
    """Read the command line and distil."""
    recipe, given = asked(__doc__)
    if given.start is not None:
        raise SystemExit("distill: the student starts from its teacher; --start has no meaning here")
    trainer = Distiller(recipe, given.out, given.minutes)
    trainer.run()
    print(json.dumps(trainer.log[-1] if trainer.log else trainer.parts))


if __name__ == "__main__":
    main()
