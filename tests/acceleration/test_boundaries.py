"""Where what is stored must end: another adapter, another transformer of the same pipeline, other prompts; and what it weighs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanPipeline, WanTransformer3DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from torch import Tensor

from acceleration import AdaSpa, DeltaCache, GuidanceSkip, TaylorCache, accelerated
from dit.seams import announce

pytestmark = [  # two adapters are meant, and so is the end of one
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter a was active which is now deleted:UserWarning"),
]
STEPS = 8
WAN: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
    "attention_head_dim": 12, "num_attention_heads": 2,
}  # fmt: skip
METHODS = [DeltaCache(interval=3, warmup=1, mode="whole"), TaylorCache(interval=3, warmup=1, order=1, fresh=0),
           TaylorCache(interval=3, warmup=1, level="modules")]  # fmt: skip


def put_in(model: Any, name: str) -> None:
    torch.manual_seed(ord(name))
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model.add_adapter(config, adapter_name=name)


class Adapted:
    """A tiny Wan with some LoRAs, and a run on it that may change them on the way."""

    def __init__(self, *names: str) -> None:
        torch.manual_seed(0)
        self.model = WanTransformer3DModel(**WAN).eval()
        self.x, self.text = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 16)
        for name in names:
            put_in(self.model, name)
        if names:
            self.model.set_adapters(names[0])

    @torch.no_grad()
    def run(self, changes: dict[int, Any] | None = None, first: int = 0) -> list[Tensor]:
        outputs = []
        for step in range(first, STEPS):
            if changes and step in changes:
                changes[step](self.model)
            given = {"hidden_states": self.x * (1 - step / 20), "encoder_hidden_states": self.text}
            outputs.append(self.model(**given, timestep=torch.tensor([1000.0 - step]), return_dict=False)[0])
        return outputs


CHANGES: dict[str, Any] = {
    "another": lambda model: model.set_adapters("b"),
    "strength": lambda model: model.set_adapters(["a"], [0.3]),
    "off": lambda model: model.disable_lora(),
    "deleted": lambda model: model.delete_adapters("a"),
    "first": lambda model: put_in(model, "a"),
    "unloaded": lambda model: model.unload_lora(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_another_adapter_during_a_run_starts_anew(method: Any, change: str) -> None:
    names = () if change == "first" else ("a", "b")
    exact = Adapted(*names).run({5: CHANGES[change]})
    adapted = Adapted(*names)
    with accelerated(adapted.model, method, steps=STEPS) as run:
        found = adapted.run({5: CHANGES[change]})  # a step that would have been shortened
    states = [cell["states"] for cell in run.report().cells]
    assert set(states[5]) == {"C"}
    assert any(set(one) != {"C"} for one in states[:5])
    assert torch.equal(found[5], exact[5])
    assert any("adapters changed" in note for note in run.report().notes)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_another_adapter_between_two_runs(method: Any) -> None:
    adapted = Adapted("a", "b")
    adapted.model.set_adapters("b")
    with accelerated(adapted.model, method, steps=STEPS):
        expected = adapted.run()
    adapted.model.set_adapters("a")
    with accelerated(adapted.model, method, steps=STEPS) as run:
        adapted.run()
        adapted.model.set_adapters("b")
        found = adapted.run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any("adapters changed" in note for note in run.report().notes)


class Pair:
    """A Wan 2.2 pipeline: one transformer for the noisy steps, another for the rest, guidance in turns."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.networks = [WanTransformer3DModel(**WAN).eval() for _ in range(2)]
        self.pipe = WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=UniPCMultistepScheduler(flow_shift=3.0),
            transformer=self.networks[0], transformer_2=self.networks[1], boundary_ratio=0.7,
        )  # fmt: skip
        self.pipe.set_progress_bar_config(disable=True)
        self.text, self.free = torch.randn(1, 5, 16), torch.randn(1, 5, 16)

    def __call__(self, stop: int | None = None, **more: Any) -> Tensor:
        def halt(pipe: Any, index: int, _time: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = stop is not None and index + 1 >= stop
            return inputs

        given: dict[str, Any] = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 12}
        given |= {"prompt_embeds": self.text, "negative_prompt_embeds": self.free, "output_type": "latent"}
        seed = torch.Generator().manual_seed(0)
        return self.pipe(**(given | more), generator=seed, callback_on_step_end=halt).frames


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def test_two_transformers_in_one_pipeline(pair: Pair) -> None:
    plain = pair()
    method = DeltaCache(interval=2, warmup=1, mode="whole", final_full=0)
    with accelerated(pair.networks[0], method) as noisy, accelerated(pair.networks[1], method) as clear:
        first, cut, again = pair(), pair(stop=3), pair()
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert torch.equal(plain, pair())
    reports = [run.report() for run in (noisy, clear)]
    assert cut.shape == plain.shape
    assert all(report.reused > 0 for report in reports)
    assert {cell["branch"] for report in reports for cell in report.cells} == {"cond", "uncond"}
    for report in reports:  # the first step of each is computed, whatever the other has stored
        for number in {cell["run"] for cell in report.cells}:
            opening = [cell for cell in report.cells if cell["run"] == number][:2]
            assert {cell["states"] for cell in opening} == {"CC"}
    assert sum(report.calls for report in reports) == 2 * (12 + 3 + 12)


def test_one_of_two_transformers_spares_guidance(pair: Pair) -> None:
    with accelerated(pair.networks[1], GuidanceSkip(warmup=1, final_full=0)) as run:
        first, again = pair(), pair()
    assert torch.equal(first, again)
    report = run.report()
    assert report.reused > 0
    assert {cell["states"] for cell in report.cells if cell["branch"] == "cond"} == {"CC"}


def test_other_prompts_and_guidance_off_in_the_next_run(pair: Pair) -> None:
    method = DeltaCache(interval=2, warmup=1, mode="whole")
    two = {
        "prompt_embeds": pair.text.expand(2, -1, -1),
        "negative_prompt_embeds": pair.free.expand(2, -1, -1),
    }
    with accelerated(pair.networks[1], method) as run:
        one, both, alone, last = pair(), pair(**two), pair(guidance_scale=1.0), pair()
    assert torch.equal(one, last)
    assert both.shape[0] == 2
    assert not torch.equal(alone, one)
    runs = sorted({cell["run"] for cell in run.report().cells})
    branches = [{cell["branch"] for cell in run.report().cells if cell["run"] == number} for number in runs]
    assert branches == [{"cond", "uncond"}, {"cond", "uncond"}, {"cond"}, {"cond", "uncond"}]


def test_what_methods_store_is_added_up(pair: Pair) -> None:
    sparse = AdaSpa(
        density=0.4, rows=4, block=4, guard=0.0, min_tokens=16, dense_layers=0, measure=False, warmup=0.0
    )
    cache, found = DeltaCache(interval=3, warmup=1, mode="whole"), []
    for methods in ((cache,), (sparse,), (cache, sparse)):
        with accelerated(pair.networks[1], *methods) as run:
            pair(height=64, width=64)
        found.append(run.report().bytes)
    assert 0 < max(found[:2]) < found[2] <= sum(found[:2])


def test_what_is_stored_is_told_before_it_is_there(toy: Any) -> None:
    for order, gate in ((0, {}), (2, {}), (1, {"gate": "confidence", "threshold": 0.0001})):
        with accelerated(toy.model, TaylorCache(order=order, interval=2, **gate), steps=12) as run:  # type: ignore[arg-type]
            toy.run(12)
        report = run.report()
        assert report.predicted_bytes == report.bytes > 0, order
        assert not report.notes


def test_last_block_taylor_on_a_flux_of_full_size_stores_little() -> None:
    """FLUX.1 at 1024 px: 4096 + 512 tokens of width 3072 in bfloat16; no weight is made."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)
    method = TaylorCache(order=1)
    stored = method.predicted_bytes(model, 4096, text_tokens=512)
    assert stored == 2 * (4096 + 512) * 3072 * 2
    assert stored <= 0.2 * 2**30
    gated = method.replace(gate="confidence").predicted_bytes(model, 4096, text_tokens=512)
    assert stored < gated <= 0.2 * 2**30
    assert method.replace(level="modules").predicted_bytes(model, 4096, text_tokens=512) > 20 * stored
    assert method.predicted_speedup(28, 57) is not None
    assert method.replace(level="modules").predicted_speedup(28, 57) is None  # honest: it is not known


@pytest.mark.parametrize("level", ["last-block", "modules"])
def test_a_run_of_full_width_stores_what_was_told_before(
    level: str, caplog: pytest.LogCaptureFixture
) -> None:
    """FLUX.1's own width and tokens, in a run on the meta device; the default stores as much whatever the depth."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True, num_layers=2, num_single_layers=2).to(
            torch.bfloat16
        )
        given: dict[str, Any] = {
            "hidden_states": torch.empty(1, 4096, 64), "encoder_hidden_states": torch.empty(1, 512, 4096),
            "pooled_projections": torch.empty(1, 768),
        }  # fmt: skip
        given = {name: x.bfloat16() for name, x in given.items()}
        given |= {"img_ids": torch.empty(4096, 3), "txt_ids": torch.empty(512, 3), "guidance": torch.empty(1)}
        given["timestep"] = torch.empty(1)
    method = TaylorCache(order=1, level=level, gate="mask", mask="1110")
    told: list[tuple[int, list[str]]] = []
    model.transformer_blocks[1].register_forward_pre_hook(
        lambda *_: told.append((run.most_bytes, list(run.notes)))
    )
    with torch.no_grad(), accelerated(model, method, steps=5) as run:
        for step in range(4):
            announce(model, step=step, branch="cond")
            model(**given, return_dict=False)
    report = run.report()
    assert report.forecast > 0
    assert report.bytes == report.predicted_bytes == method.predicted_bytes(model, 4096, text_tokens=512)
    words = f"taylor-cache will store {report.bytes / 2**20:.1f} MiB for each guidance branch of this size (an estimate)"
    assert told[0] == (0, [words])  # nothing is stored yet
    assert [one.getMessage() for one in caplog.records if one.name.startswith("acceleration")] == [words]
    if level == "last-block":
        assert report.bytes == 2 * (4096 + 512) * 3072 * 2 <= 0.2 * 2**30


class Shared(Pair):
    """A second pipeline on the transformers of a first, with a scheduler of its own."""

    def __init__(self, first: Pair) -> None:
        self.networks = first.networks
        self.pipe = WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
            transformer=first.networks[0],
        )  # fmt: skip
        self.pipe.set_progress_bar_config(disable=True)
        self.text, self.free = first.text.flip(1).clone(), first.free.flip(1).clone()


@pytest.mark.parametrize(
    "method", [*METHODS, DeltaCache(gate="first-block", threshold=9.0, warmup=1)], ids=str
)
def test_two_pipelines_that_share_a_transformer(pair: Pair, method: Any) -> None:
    """One after the other in one with-block, the first one also cut short: each as if it were alone."""
    other, network = Shared(pair), pair.networks[0]

    def alone(pipeline: Pair, **more: Any) -> Tensor:
        with accelerated(network, method) as run:
            found = pipeline(**more)
        assert run.report().reused + run.report().forecast > 0
        return found

    expected = alone(pair), alone(other), alone(other, height=32)
    with accelerated(network, method):
        first, second = pair(), other()
        pair(stop=4)
        again, tall, last = other(), other(height=32), pair()
    for found, wanted in zip((first, second, tall), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(again, second)
    assert torch.equal(last, first)
