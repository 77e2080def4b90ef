"""EasyControl's released layout: condition LoRAs kept in the attention processors of a FLUX transformer.

Code: Xiaojiu-z/EasyControl, commit da44fa8, Apache-2.0.
Differs: its cache is filled by a pass over some noise tokens and still runs the condition through every layer; ours is the
pass over the condition alone, which gives the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from control._condition import ConditionPass
from control._memory import Memory
from control.base import Use, controlled
from control.easycontrol import EasyControl, EasyControlAdapter, from_official, official_numbers, to_official
from dit.convert.base import Case, LayoutError, System, Tensors, system
from dit.seams import around_blocks, blocks_of

_ARGS = {"transformer", "rank", "cond_size", "n_loras"}
_MAIN = {"hidden_states", "timestep", "encoder_hidden_states", "pooled_projections", "guidance"}
_WARM = {"warmup_hidden_states", "warmup_timestep"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


class ControlledFlux(nn.Module):
    """A FLUX transformer with the adapters of one fixture, and what its recording leaves to its settings."""

    def __init__(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.args, self.settings = dict(args), dict(settings)
        self.transformer = FluxTransformer2DModel(**args["transformer"])
        control = EasyControl(rank=args["rank"], conditioning="prompt")
        self.adapters = nn.ModuleList(
            EasyControlAdapter(control, self.transformer) for _ in range(args["n_loras"])
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the noise tokens."""
        return self.settings["latent_height"] // 2, self.settings["latent_width"] // 2

    @property
    def own(self) -> int:
        """Rows of a condition's tokens, and columns."""
        return int(self.args["cond_size"]) // 16

    def uses(self, tokens: Tensor, weights: Sequence[float] | None = None) -> list[Use]:
        """Return the conditions packed in [B, n N, C]: one is spatial; of several, the first is the subject."""
        count = self.own**2
        number = tokens.shape[1] // count
        if number > len(self.adapters) or tokens.shape[1] % count or not number:
            raise LayoutError(
                f"EasyControl: {tokens.shape[1]} condition tokens are not 1 to {len(self.adapters)} conditions of {count}"
            )
        if weights is None:
            name = f"lora_weights_{_WORDS[number]}" if number < len(_WORDS) else ""
            weights = self.settings.get(name, [1.0] * number)
        assert weights is not None
        found = []
        for place, part in enumerate(tokens.chunk(number, dim=1)):
            adapter: Any = self.adapters[place]
            subject = number > 1 and place == 0
            adapter.control = adapter.control.replace(
                lora_weight=float(weights[place % len(weights)]), positions="rows" if subject else "corner"
            )
            found.append(Use(adapter, self.unpacked(part)))
        return found

    def unpacked(self, tokens: Tensor) -> Tensor:
        """Packed tokens [B, N, C] of a condition -> latents [B, C / 4, H, W]."""
        batch, _, channels = tokens.shape
        x = tokens.reshape(batch, self.own, self.own, channels // 4, 2, 2)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * self.own, 2 * self.own)

    def ids(self) -> Tensor:
        """Positions (0, row, column) of the noise tokens, [N, 3]."""
        rows, columns = (torch.arange(count, dtype=torch.float32) for count in self.grid)
        return torch.cartesian_prod(torch.zeros(1), rows, columns)

    def sample(self, inputs: Mapping[str, Tensor], uses: Sequence[Use], memory: Memory) -> Tensor:
        """Return the velocity of a recorded call, after a call on the last tokens where one was recorded."""
        given = {name: inputs[name] for name in _MAIN if name in inputs}
        ids, text = self.ids(), torch.zeros(inputs["encoder_hidden_states"].shape[1], 3)
        with controlled(self.transformer, *uses, memory=memory):
            if "warmup_hidden_states" in inputs:
                warm = inputs["warmup_hidden_states"]
                first = given | {"hidden_states": warm, "timestep": inputs["warmup_timestep"]}
                self.transformer(**first, img_ids=ids[-warm.shape[1] :], txt_ids=text)
            found: Tensor = self.transformer(**given, img_ids=ids, txt_ids=text, return_dict=False)[0]
        return found


@system("EasyControl")
class EasyControlSystem(System):
    """The released condition LoRAs on a FLUX transformer; weights of both in one file."""

    tolerance = 2e-5

    def build(self, args: Mapping[str, Any], settings: Mapping[str, Any]) -> ControlledFlux:
        """Return transformer and adapters; `settings` hold latent_height and latent_width."""
        missing = sorted(_ARGS - set(args)) or [
            one for one in ("latent_height", "latent_width") if one not in settings
        ]
        if missing or set(args) - _ARGS:
            what = f"no {missing[0]}" if missing else f"a strange {min(set(args) - _ARGS)}"
            raise LayoutError(f"{self.name}: {what} in args (transformer, rank, cond_size, n_loras) and run")
        return ControlledFlux(args, settings)

    def to_ours(self, state: Mapping[str, Tensor], model: nn.Module) -> Tensors:
        """Give each condition's LoRA to its adapter and the rest to the transformer."""
        assert isinstance(model, ControlledFlux)
        numbers = official_numbers(state)
        if len(numbers) != len(model.adapters):
            raise LayoutError(
                f"{self.name}: {len(numbers)} conditions in the weights, {len(model.adapters)} in args"
            )
        ours = {f"transformer.{key}": x for key, x in state.items() if "_loras." not in key}
        for place, number in enumerate(numbers):
            ours |= {f"adapters.{place}.{key}": x for key, x in from_official(state, number).items()}
        return ours

    def to_official(self, model: nn.Module) -> Tensors:
        """Put them together again."""
        assert isinstance(model, ControlledFlux)
        found: Tensors = dict(model.transformer.state_dict())
        for number, adapter in enumerate(model.adapters):
            found |= to_official(adapter.state_dict(), number)
        return found

    def complete(self, cases: Sequence[Case]) -> list[Case]:
        """Fill in what later cases take from the first, what their names say, and what each is asked for."""
        first = next((case for case in cases if set(case.inputs) | {"guidance"} >= _MAIN), None)
        for case in cases:
            if first is None or case is first:
                continue
            if "warmup_timestep" in case.inputs:
                case.inputs["warmup_hidden_states"] = first.inputs["hidden_states"]
            if case.outputs.keys() & {"sample", "sample_cache_on", "sample_cache_off"}:
                for name in (*_MAIN, "cond_hidden_states"):
                    if name in first.inputs:
                        case.inputs.setdefault(name, first.inputs[name])
            if "weight_zero" in case.name:
                case.inputs["lora_weights"] = torch.zeros(1)  # one for all conditions
        return list(cases)

    def run(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensors:
        """Run a case: plain; with cache off and on; or, without inputs, the positions."""
        assert isinstance(model, ControlledFlux)
        if not inputs:
            return positions(model)
        known = _MAIN | _WARM | {"cond_hidden_states", "lora_weights"}
        if set(inputs) - known or not {*_MAIN - {"guidance"}, "cond_hidden_states"} <= set(inputs):
            raise LayoutError(
                f"{self.name}: a case has {', '.join(sorted(_MAIN))} and cond_hidden_states, got {', '.join(sorted(inputs))}"
            )
        weights = inputs.get("lora_weights")
        uses = model.uses(inputs["cond_hidden_states"], None if weights is None else weights.tolist())
        plain = {name: x for name, x in inputs.items() if name not in _WARM}
        if "warmup_timestep" not in inputs:
            return {"sample": model.sample(plain, uses, Memory())}
        off = model.sample(plain, uses, Memory(entries=0))
        tokens = int(model.settings.get("warmup_tokens", 32))
        warm = {**inputs, "warmup_hidden_states": inputs["warmup_hidden_states"][:, -tokens:]}
        memory = Memory()
        on = model.sample(warm, uses, memory)
        assert memory.hits == 1, "the second call used what the first had left"
        return {"sample_cache_off": off, "sample_cache_on": on, "max_abs_difference": (on - off).abs().max()}

    def run_observed(self, model: nn.Module, case: Case) -> tuple[Tensors, Tensors]:
        """Watch both passes: the main one at its blocks, the condition's step by step."""
        assert isinstance(model, ControlledFlux)
        with watched(model) as seen:
            outputs = self.run(model, case.inputs)
        if case.mids:
            seen |= of_condition(model, case.inputs)
        return outputs, {name: x for name, x in seen.items() if name in case.mids}


def positions(model: ControlledFlux) -> Tensors:
    """Return the recorded ids of noise, subject and spatial tokens."""
    adapter: Any = model.adapters[0]
    own, kept = (model.own, model.own), adapter.control
    found = {"noise": model.ids()}
    for name, mode in (("spatial", "corner"), ("subject", "rows")):
        adapter.control = kept.replace(positions=mode)
        found[name] = adapter.positions(model.grid, own, torch.device("cpu"))
    adapter.control = kept
    return found


@contextmanager
def watched(model: ControlledFlux) -> Iterator[Tensors]:
    """Collect the streams of text and picture after each block of the main pass."""
    seen: Tensors = {}

    def around(block: Any, inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        text, image = inner(*args, **kwargs)
        if block.path.startswith("single"):
            seen[f"{block.path}.text_image"] = torch.cat([text, image], dim=1)
        else:
            seen[f"{block.path}.text"], seen[f"{block.path}.image"] = text, image
        return text, image

    with around_blocks(blocks_of(model.transformer), around):
        yield seen


def of_condition(model: ControlledFlux, inputs: Mapping[str, Tensor]) -> Tensors:
    """Return what the released code shows of the condition's stream: after each block, and its cache in the dual ones.

    Conditions stand one behind the other there, [B, n N, D]; here they are one batch.
    """
    weights = inputs.get("lora_weights")
    uses = model.uses(inputs["cond_hidden_states"], None if weights is None else weights.tolist())
    pooled = inputs["pooled_projections"]
    walk = ConditionPass(
        model.transformer, [use.adapter for use in uses], [use.condition for use in uses],  # type: ignore[misc]
        grid=model.grid, pooled=pooled, guidance=inputs.get("guidance", torch.ones(len(pooled))), dtype=torch.float32,
    )  # fmt: skip
    found: Tensors = {}
    before = walk.x
    for step in walk.steps():
        assert step.hidden is not None
        path = step.place.path
        found[f"{path}.condition"] = torch.cat(step.hidden.chunk(len(uses)), dim=1)
        raw, values = walk.raw_keys(step.place, walk.facts.normed(step.place, before, walk.emb))
        heard = torch.nn.functional.scaled_dot_product_attention(
            walk.queries(step.place, before), step.k, step.v
        )
        for name, x in (
            ("key", raw.transpose(1, 2)),
            ("value", values.transpose(1, 2)),
            ("attention", heard),
        ):
            found[f"{path}.cached_{name}"] = torch.cat(x.chunk(len(uses)), dim=2)
        before = step.hidden
    return found
