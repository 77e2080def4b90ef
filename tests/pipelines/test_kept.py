"""Latents kept until their picture is safe: a failed decode costs no denoising and no pixel, in every family."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipelines import catalog
from pipelines._jobs_saving import PREFIX, prune
from pipelines._kept import Latents
from pipelines.generate import generate
from pipelines.jobs import Item, Ledger
from pipelines.request import Request
from pipelines.result import pixel_hash
from pipelines.workers import Worker

Folder = Callable[[str], Path]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "jobs.sqlite")


class Counted:
    """Count the transformer's calls, and let the decoder fail when asked to."""

    def __init__(self, model: str) -> None:
        self.pipeline = catalog.load(model).pipeline
        self.calls, self.failing = 0, 0
        self.hook = self.pipeline.transformer.register_forward_pre_hook(self._called)
        self.decoder = (
            self.pipeline.codec if getattr(self.pipeline, "codec", None) is not None else self.pipeline.vae
        )
        self.inner = self.decoder.decode
        self.decoder.__dict__["decode"] = self._decode

    def _called(self, *_: Any) -> None:
        self.calls += 1

    def _decode(self, *args: Any, **kwargs: Any) -> Any:
        if self.failing:
            self.failing -= 1
            raise OSError("the decoder broke")
        return self.inner(*args, **kwargs)

    def close(self) -> None:
        self.hook.remove()
        del self.decoder.__dict__["decode"]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("name", ["ours", "flux", "sd3", "pixart", "sana", "wan", "lumina2", "dit"])
def test_a_failed_decode_costs_no_denoising_and_no_pixel(
    name: str, folder_of: Folder, tmp_path: Path
) -> None:
    model = str(folder_of(name))
    task = {"class_label": 3} if name == "dit" else {"prompt": "a red cat", "width": 32, "height": 32}
    task |= {"frames": 5} if name == "wan" else {}
    request = Request(**({"model": model, "steps": 3, "seed": 3} | task))
    plain = generate(request)
    counted = Counted(model)
    try:
        keep, counted.failing = Latents(tmp_path / "kept"), 1
        with pytest.raises(OSError, match="decoder broke"):
            generate(request, keep=keep)
        assert counted.calls == plain.report["run"]["calls"]
        assert len(list((tmp_path / "kept").iterdir())) == 1
        again = generate(
            request, keep=Latents(tmp_path / "kept")
        )  # as a new process would: from the disk alone
        assert counted.calls == plain.report["run"]["calls"], "nothing was denoised again"
    finally:
        counted.close()
    assert again.report["pixels"] == plain.report["pixels"]
    assert again.report["resumed"] == "from kept latents"
    assert again.report["run"]["calls"] == plain.report["run"]["calls"]
    assert set(again.report["timings"]) == set(plain.report["timings"])
    other = generate(request.replace(seed=4), keep=Latents(tmp_path / "kept"))
    assert "resumed" not in other.report, "another picture's latents are not taken"
    keep.forget()
    assert not (tmp_path / "kept").exists()


@pytest.mark.usefixtures("forgotten")
def test_damaged_latents_are_made_again(tiny: str, tmp_path: Path) -> None:
    request = Request(prompt="a red cat", model=tiny, steps=3, width=32, height=32)
    plain = generate(request, keep=Latents(tmp_path / "kept"))
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    again = generate(request, keep=Latents(tmp_path / "kept"))
    assert "resumed" not in again.report
    assert again.report["pixels"] == plain.report["pixels"]


@pytest.mark.usefixtures("forgotten")
def test_a_worker_decodes_what_an_earlier_one_denoised_and_cleans_up(
    ledger: Ledger, tiny: str, tmp_path: Path
) -> None:
    request = Request(prompt="a red cat", model=tiny, steps=3, width=32, height=32)
    plain = generate(request)
    (job,) = ledger.add([Item(request=request.to_dict(), folder=str(tmp_path / "out"))])
    counted = Counted(tiny)
    try:
        counted.failing = 1
        assert Worker(ledger).run(until_empty=True) == 1
        assert counted.calls == plain.report["run"]["calls"]
    finally:
        counted.close()
    done = ledger.get(job.name)
    assert done is not None
    assert (done.state, done.tries, done.report["resumed"]) == ("done", 2, "from kept latents")
    assert done.report["pixels"] == plain.report["pixels"]
    with Image.open(done.files[0]) as opened:
        assert pixel_hash([opened]) == plain.report["pixels"]
    assert not (ledger.path.parent / "latents" / job.name).exists()
    assert not list(Path(done.item.folder).glob(f"{PREFIX}*"))


@pytest.mark.usefixtures("forgotten")
def test_latents_go_when_nobody_will_decode_them(ledger: Ledger, tiny: str, tmp_path: Path) -> None:
    folder = ledger.path.parent / "latents"
    request = Request(prompt="a red cat", model=tiny, steps=2, width=32, height=32)
    (job,) = ledger.add([Item(request=request.to_dict(), folder=str(tmp_path / "out"))])
    counted = Counted(tiny)
    try:
        counted.failing = 3
        assert Worker(ledger).run(until_empty=True) == 0
    finally:
        counted.close()
    assert ledger.counts()["poisoned"] == 1
    assert not (folder / job.name).exists(), "the last try failed"
    items = [Item(request=request.replace(seed=seed).to_dict(), id=str(seed)) for seed in range(4)]
    cancelled, failed, older, waiting = ledger.add(items)
    for _ in range(2):
        held = ledger.lease("w")
        assert held is not None
        if held.name == cancelled.name:
            ledger.cancel(name=held.name)
        else:
            ledger.failed(held, "no", again=False)
    held = ledger.lease("w")
    assert held is not None
    ledger.failed(held, "no", again=False)
    for name in ("strange", *(one.name for one in (cancelled, failed, older, waiting))):
        (folder / name).mkdir(parents=True)
    for name in ("strange", older.name, waiting.name):
        os.utime(folder / name, (1, 1))
    prune(ledger, folder)
    assert {one.name for one in folder.iterdir()} == {failed.name, waiting.name}


@pytest.mark.usefixtures("forgotten")
def test_a_comparison_is_a_job_with_two_pictures(ledger: Ledger, tiny: str, tmp_path: Path) -> None:
    request = Request(prompt="a cat", model=tiny, steps=4, width=32, height=32, accelerators=("delta-cache",))
    item = Item(request=request.to_dict(), kind="compare", folder=str(tmp_path / "out"), output="x.png")
    ledger.add([item])
    assert Worker(ledger).run(until_empty=True) == 1
    (job,) = ledger.jobs()
    assert [Path(one).name for one in job.files] == ["x.png", "x-exact.png"]
    assert {one.name for one in (tmp_path / "out").iterdir()} == {
        "x.png",
        "x.json",
        "x-exact.png",
        "x-exact.json",
    }
    exact = generate(request.replace(accelerators=()))
    with Image.open(job.files[1]) as opened:
        assert pixel_hash([opened]) == exact.report["pixels"]
    assert "psnr_db" in job.report["measured"]


def test_keeping_latents_changes_no_pixel_of_an_accelerated_run(tiny: str, tmp_path: Path) -> None:
    request = Request(prompt="a cat", model=tiny, steps=5, width=32, height=32, accelerators=("delta-cache",))
    plain, kept = generate(request), generate(request, keep=Latents(tmp_path / "kept"))
    assert plain.report["pixels"] == kept.report["pixels"]
    again = generate(request, keep=Latents(tmp_path / "kept"))
    assert again.report["resumed"]
    assert again.report["pixels"] == plain.report["pixels"]
    assert again.report["run"] == json.loads(json.dumps(kept.report["run"])), "its report is that of the run"
    assert torch.is_grad_enabled()
