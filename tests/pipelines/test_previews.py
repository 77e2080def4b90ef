"""Pictures of a running estimate: they are there, grow towards the result, and change no pixel of it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import previews
from pipelines.generate import generate
from pipelines.jobs import Item, Ledger
from pipelines.request import Request
from pipelines.schedulers import scheduler_for
from pipelines.workers import Worker

SETTINGS: list[dict[str, Any]] = [
    {"scheduler": "euler"},
    {"scheduler": "heun"},
    {"scheduler": "dpm++2m"},
    {"scheduler": "unipc", "guidance_mode": "sequential"},
    {"accelerators": ("delta-cache:interval=2",)},
    {"accelerators": ("taylor-cache",), "tiling": True},
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a preview be due at every step."""
    monkeypatch.setattr(previews, "PAUSE", 0.0)
    monkeypatch.setattr(previews, "SHARE", 0.0)


@pytest.fixture(autouse=True)
def unloaded() -> Iterator[None]:
    from pipelines import catalog

    yield
    catalog.unload()


@pytest.mark.parametrize("more", SETTINGS, ids=str)
def test_pixels_and_counts_are_the_same_with_and_without(
    tiny: str, always: None, more: dict[str, Any]
) -> None:
    request = Request(prompt="a red dog", model=tiny, steps=5, seed=3, images=2, **more)
    seen: list[Image.Image] = []
    without, with_them = generate(request), generate(request, on_preview=seen.append)
    assert [one.report["pixels"] for one in with_them.pictures] == [
        one.report["pixels"] for one in without.pictures
    ]
    assert with_them.report["run"]["computed"] == without.report["run"]["computed"]
    assert len(seen) >= 2 * request.steps  # type: ignore[operator]
    assert {max(one.size) for one in seen} <= set(range(1, previews.WIDEST + 1))


def test_the_last_estimate_is_the_picture_and_the_first_is_not(tiny: str, always: None) -> None:
    seen: list[Image.Image] = []
    made = generate(Request(prompt="a red dog", model=tiny, steps=6, seed=3), on_preview=seen.append).images[
        0
    ]
    whole = np.asarray(made.convert("RGB"), dtype=float)
    far = [
        np.abs(np.asarray(one.convert("RGB").resize(made.size), dtype=float) - whole).mean() for one in seen
    ]
    assert far[-1] < 1.0 < far[0], far


def test_a_clip_shows_its_middle_frame_and_keeps_its_pixels(folder_of: Any, always: None) -> None:
    request = Request(
        prompt="a dog",
        model=str(folder_of("wan")),
        width=32,
        height=32,
        frames=5,
        steps=3,
        seed=1,
        device="cpu",
    )
    seen: list[Image.Image] = []
    without, with_them = generate(request), generate(request, on_preview=seen.append)
    assert without.report["pixels"] == with_them.report["pixels"]
    assert len(seen) == 3


@pytest.mark.parametrize(("frames", "middle"), [(1, 0), (2, 1), (5, 2), (16, 8)])
def test_of_a_clip_the_middle_frame_is_taken(frames: int, middle: int) -> None:
    clip = torch.arange(2.0 * frames).reshape(2, 1, frames, 1, 1).expand(2, 3, frames, 4, 6)
    assert torch.equal(previews.small(clip), clip[:1, :, middle])


@pytest.mark.parametrize("per_token", [False, True])
def test_a_step_that_goes_up_its_output_is_seen_the_right_way_round(
    per_token: bool, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    clean = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    now = scheduler.timesteps[1]
    level = float(now) / 1000
    seen: list[Image.Image] = []
    monkeypatch.setattr(previews, "_decoder", lambda *_: previews.small)
    monkeypatch.setattr(scheduler, "step", lambda *_, **__: None)
    with previews.previewing(SimpleNamespace(scheduler=scheduler), {}, seen.append):
        given = (noise - clean, now, (1 - level) * clean + level * noise)
        more = {"per_token_timesteps": now.expand(1, 64)} if per_token else {}
        scheduler.step(-given[0] if per_token else given[0], *given[1:], **more)
    (picture,) = seen
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1).float() / 127.5 - 1
    assert torch.allclose(pixels, clean[0], atol=0.02)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m"])
def test_the_clean_latents_are_found_behind_known_noise(kind: str, name: str) -> None:
    import diffusers

    scheduler = scheduler_for(name, diffusers.DDIMScheduler(prediction_type=kind))
    scheduler.set_timesteps(10)
    noise_free, noise = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    now = scheduler.timesteps[4]
    alpha = float(scheduler.alphas_cumprod[round(float(now))])
    noisy = alpha**0.5 * noise_free + (1 - alpha) ** 0.5 * noise
    output = {
        "epsilon": noise, "v_prediction": alpha**0.5 * noise - (1 - alpha) ** 0.5 * noise_free, "sample": noise_free,
    }[kind]  # fmt: skip
    kept = noisy / alpha**0.5 if float(scheduler.init_noise_sigma) > 1.001 else noisy
    found = previews.estimated(scheduler, output, now, kept)
    assert found is not None
    assert torch.allclose(found, noise_free, atol=2e-3)


def test_a_preview_that_fails_ends_the_previews_and_not_the_run(
    tiny: str, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(previews, "estimated", broken)
    request = Request(prompt="a dog", model=tiny, steps=4, seed=1)
    shown: list[Image.Image] = []
    assert generate(request, on_preview=shown.append).ok
    assert (len(calls), shown) == (1, [])


def test_previews_keep_to_their_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(previews.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(previews, "estimated", lambda *_: torch.zeros(1, 3, 4, 4))

    def decode(latents: torch.Tensor) -> torch.Tensor:
        clock[0] += 0.1  # a decode takes 0.1 s here
        return latents

    seen: list[Image.Image] = []
    painter = previews._Painter(decode, seen.append)
    begin = clock[0]
    for _ in range(2000):
        clock[0] += 0.05
        painter.see(None, None, None, None)
    assert 2 < len(seen) <= (clock[0] - begin) / (0.1 * previews.SHARE) + 1


@pytest.mark.parametrize("wanted", [True, False])
def test_a_worker_beats_with_a_picture_only_where_it_was_asked_for(
    tiny: str, tmp_path: Path, always: None, wanted: bool
) -> None:
    ledger = Ledger(tmp_path / "jobs.sqlite")
    request = Request(prompt="a dog", model=tiny, steps=4, seed=1)
    (row,) = ledger.add([Item(request=request.to_dict(), folder=str(tmp_path), tags={"preview": wanted})])
    beats: list[dict[str, Any]] = []
    beat = ledger.beat

    def heard(job: Any, progress: dict[str, Any] | None = None, **more: Any) -> bool:
        beats.append(progress or {})
        return beat(job, progress, **more)

    ledger.beat = heard  # type: ignore[method-assign]
    assert Worker(ledger).run(until_empty=True) == 1
    pictures = [one["preview"] for one in beats if "preview" in one]
    assert bool(pictures) == wanted
    for text in pictures:
        head, _, data = text.partition(",")
        assert head == "data:image/jpeg;base64"
        assert max(Image.open(io.BytesIO(base64.b64decode(data))).size) <= previews.WIDEST
    done = ledger.get(row.name)
    assert done is not None and done.state == "done"  # noqa: PT018
    assert "preview" not in done.progress, "it does not stay in the ledger"
    ledger.close()
