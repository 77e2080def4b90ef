"""The memory ladder: errors of memory, put in by hand, cost time and never a pixel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit.codec import ResampleCodec
from dit.seams import patched
from pipelines import catalog, ladder
from pipelines.generate import Progress, generate
from pipelines.jobs import Item, Ledger
from pipelines.ladder import OutOfMemory, in_strips, is_out_of_memory, place, reach_of
from pipelines.request import Request
from pipelines.workers import Worker

Folder = Callable[[str], Path]


@pytest.fixture(autouse=True)
def fresh(forgotten: None) -> None:
    """A ladder stays climbed as long as its model is loaded: every test loads its own."""


class Failing:
    """A method that runs out of memory the first times it is called."""

    def __init__(self, owner: Any, name: str, times: int, error: BaseException | None = None) -> None:
        self.inner, self.left, self.calls = getattr(owner, name), times, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        owner.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return self.inner(*args, **kwargs)


def request_for(model: str, **more: Any) -> Request:
    return Request(
        **({"prompt": "a red cat", "model": model, "steps": 3, "width": 64, "height": 64, "seed": 5} | more)
    )


@pytest.mark.parametrize("times", [1, 2])
def test_a_decode_without_memory_gives_the_same_pixels_and_no_step_is_made_again(
    times: int, tiny: str
) -> None:
    request = request_for(tiny)
    plain = generate(request)
    pipeline = catalog.load(tiny).pipeline
    calls = []
    pipeline.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    Failing(pipeline.codec, "decode", times)
    told: list[Progress] = []
    result = generate(request, on_step=told.append)
    assert result.report["pixels"] == plain.report["pixels"]
    assert len(calls) == plain.report["run"]["calls"], "the latents were kept"
    taken = [one["name"] for one in result.report["ladder"]["now"] if one["taken"]]
    assert taken == ["free caches", "decode in pieces"][:times]
    assert all(one["phase"] == "decode" for one in result.report["ladder"]["now"])
    assert "memory ran out in the phase decode" in result.report["warnings"][-1]
    shown = [one.note for one in told if one.phase == "memory"]
    assert len(shown) == times
    assert shown[0].startswith("free caches: ")
    assert result.report["effective"] == plain.report["effective"], (
        "size, steps, dtype are as they were asked for"
    )


def test_a_step_without_memory_begins_again_with_the_same_noise(tiny: str) -> None:
    request = request_for(tiny, accelerators=("delta-cache",))
    plain = generate(request)
    transformer = catalog.load(tiny).pipeline.transformer
    failing = Failing(transformer, "forward", 0)
    inner = failing.inner
    seen: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*args, **kwargs)

    transformer.__dict__["forward"] = forward
    result = generate(request)
    assert result.report["pixels"] == plain.report["pixels"]
    assert result.report["ladder"]["now"][0]["phase"] in ("encode", "denoise")
    assert result.report["run"]["computed"] == plain.report["run"]["computed"], (
        "the counts are those of one run"
    )


def test_rungs_that_a_device_cannot_do_are_passed_over_and_the_end_has_numbers(tiny: str) -> None:
    pipeline = catalog.load(tiny).pipeline
    Failing(pipeline.codec, "decode", 100)
    told: list[Progress] = []
    with pytest.raises(OutOfMemory) as caught:
        generate(request_for(tiny), on_step=told.append)
    words = str(caught.value)
    notes = [one.note for one in told if one.phase == "memory"]
    assert [one.partition(":")[0] for one in notes] == list(ladder.NAMES)
    assert "there is no other memory to move parts to" in words
    assert "text encoder is in the computer's own memory already" in words
    assert "Tried to allocate 2.00 GiB" in words
    assert "GB" in words
    assert "Choose a smaller size" in words


def test_what_was_climbed_stays_climbed_and_is_told(tiny: str) -> None:
    request = request_for(tiny)
    plain = generate(request)
    failing = Failing(catalog.load(tiny).pipeline.codec, "decode", 2)
    generate(request)
    later = generate(request)
    assert failing.left == 0
    assert later.report["pixels"] == plain.report["pixels"]
    assert [one["name"] for one in later.report["ladder"]["before"]] == ["free caches", "decode in pieces"]
    assert later.report["ladder"]["now"] == []
    assert not later.report["warnings"]


@pytest.mark.parametrize("name", ["flux", "wan", "dit"])
def test_foreign_decoders_are_never_cut_into_tiles_that_change_the_picture(
    name: str, folder_of: Folder
) -> None:
    model = str(folder_of(name))
    task: dict[str, Any] = (
        {"class_label": 3} if name == "dit" else {"prompt": "a cat", "width": 32, "height": 32}
    )
    task |= {"frames": 5} if name == "wan" else {}
    request = Request(**({"model": model, "steps": 2, "seed": 1} | task))
    plain = generate(request)
    pipeline = catalog.load(model).pipeline
    Failing(pipeline.vae, "decode", 2)
    result = generate(request)
    assert result.report["pixels"] == plain.report["pixels"]
    assert [one["name"] for one in result.report["ladder"]["now"] if one["taken"]] == [
        "free caches",
        "decode in pieces",
    ]
    assert not getattr(pipeline.vae, "use_tiling", False)


def test_other_errors_are_not_taken_for_memory(tiny: str) -> None:
    Failing(catalog.load(tiny).pipeline.codec, "decode", 1, OSError("the disk broke"))
    with pytest.raises(OSError, match="the disk broke"):
        generate(request_for(tiny))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("rows", [5, 16, 17, 40, 64])
def test_strips_are_the_whole_to_the_last_bit(rows: int) -> None:
    torch.manual_seed(0)
    codec = ResampleCodec(width=8, depth=2).eval()
    for one in codec.parameters():
        torch.nn.init.normal_(one, std=0.2)
    latents = torch.randn(2, 3, rows, 24)
    with torch.no_grad():
        whole = codec.decode(latents)
        made = in_strips(codec.decode, latents, reach_of(codec), codec.scale_factor)
        assert torch.equal(whole, made)
        short = in_strips(codec.decode, latents, 0, codec.scale_factor)
    if rows > ladder.STRIP:
        assert not torch.equal(whole, short), "the reach is needed"


def test_a_model_that_does_not_fit_whole_is_placed_part_by_part(
    folder_of: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = catalog.load(str(folder_of("flux"))).pipeline
    moves: list[str] = []

    def to(device: str) -> None:
        moves.append(device)
        if device == "cuda:0":
            raise torch.OutOfMemoryError("CUDA out of memory")

    offloaded: list[Any] = []
    monkeypatch.setattr("pipelines.ladder._frees", lambda device: True)
    with (
        patched(pipeline, "to", to),
        patched(pipeline, "enable_model_cpu_offload", lambda device: offloaded.append(device)),
    ):
        place(pipeline, "cuda:0")
    assert offloaded == ["cuda:0"]
    assert moves[0] == "cuda:0"
    assert [one.name for one in ladder._ladders[pipeline].rungs] == ["model offload"]
    with pytest.raises(torch.OutOfMemoryError):
        place(_Tiny(), "cpu")


class _Tiny:
    def to(self, device: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_text_encoder_visits_its_device_only_to_read(folder_of: Folder) -> None:
    """On the processor's own name for another device the rung is climbed for real, and gives the same pixels."""
    model = str(folder_of("sd3"))
    request = Request(prompt="a red cat", model=model, steps=2, width=32, height=32, seed=1)
    plain = generate(request)
    pipeline = catalog.load(model).pipeline
    taken, words = ladder._encoders_off(pipeline, "cpu:0")
    assert taken
    assert "only while they read" in words
    assert str(pipeline._execution_device) == "cpu:0"
    assert type(pipeline).__name__ == "StableDiffusion3Pipeline"
    assert generate(request).report["pixels"] == plain.report["pixels"]


@pytest.mark.gpu
@pytest.mark.parametrize("rung", ["text encoder off", "model offload", "group offload"])
def test_every_rung_of_a_device_gives_the_same_pixels(rung: str, folder_of: Folder) -> None:
    request = request_for(str(folder_of("flux")), width=32, height=32, device="cuda")
    plain = generate(request)
    loaded = catalog.load(request.model, "auto", "cuda")
    assert dict(ladder._RUNGS)[rung](loaded.pipeline, "cuda")[0]
    for _ in range(2):
        assert generate(request).report["pixels"] == plain.report["pixels"]


def test_a_job_that_never_fits_fails_once_with_the_numbers(tiny: str, tmp_path: Path) -> None:
    Failing(catalog.load(tiny).pipeline.codec, "decode", 100)
    queue = Ledger(tmp_path / "jobs.sqlite")
    queue.add([Item(request=request_for(tiny).to_dict(), folder=str(tmp_path / "out"))])
    assert Worker(queue).run(until_empty=True) == 0
    (job,) = queue.jobs()
    assert (job.state, job.tries) == ("failed", 1)
    assert "There was not enough memory in the phase decode" in job.error
