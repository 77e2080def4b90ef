"""Context parallelism through the door: torchrun's ranks make one clip together, rank 0 saves it, the pixels are one process's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from acceleration import DeltaCache, TaylorCache, XAttention
from dit.backbones.mask2dit import Mask2DiT
from pipelines import catalog, cli, ranks
from pipelines.generate import generate
from pipelines.request import Request, RequestError
from pipelines.story_to_video import StoryToVideoPipeline
from pipelines.text_to_image import TextToImagePipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def story(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a saved story pipeline with three heads, which two ranks cannot halve."""
    parts = TextToImagePipeline.from_pretrained(folder_of("ours")).components
    torch.manual_seed(0)
    network = Mask2DiT(
        in_channels=3, sample_height=8, sample_width=12, frames=3, scenes=2, width=48, depth=2, heads=3, time_dim=12,
        context_dim=16, caption_length=16,
    )  # fmt: skip
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    place = tmp_path_factory.mktemp("story") / "model"
    StoryToVideoPipeline(**(parts | {"transformer": network.eval()}), text_length=16).save_pretrained(place)
    return str(place)


def requests(story: str, wan: str) -> dict[str, tuple[str, Request]]:
    """Every request of the test, and how ranks share it."""
    two = Request(model=story, prompts="a red cat | a blue dog", steps=3, seed=4)
    cached = two.replace(
        steps=4, accelerators=(DeltaCache(interval=2, warmup=1, final_full=0, first_block=0, last_block=0),)
    )
    clip = Request(model=wan, prompt="a red cat", steps=2, frames=5, width=32, height=32)
    return {
        "story by ulysses": ("ulysses", two),
        "story by ring": ("ring", two),
        "story with a cache": ("ulysses", cached),
        "wan by ulysses": ("ulysses", clip),
        "wan with a cache": (
            "ulysses",
            clip.replace(steps=4, accelerators=cached.accelerators),
        ),
        "wan by ring": ("ring", clip),
        "wan, odd": ("ulysses", clip.replace(width=48, height=48, frames=1)),
    }


def frames(result: Any) -> Any:
    return np.stack([np.asarray(frame) for frame in result.pictures[0].frames])


def work(rank: int, port: int, folder: str, story: str, wan: str) -> None:
    """What each of the two ranks does with every request."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, (how, request) in requests(story, wan).items():
        try:
            with ranks.together(how):
                result = generate(request)
            found[name] = torch.from_numpy(frames(result))
            found[f"{name}, report"] = result.report["context_parallel"]
            found[f"{name}, reused"] = result.report["run"]["reused"]
        except RequestError as error:
            found[name] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(
    story: str, folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """Start two ranks once, and return what each has made."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, (port, str(folder), story, str(folder_of("wan"))), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(
    "name", ["story by ulysses", "story by ring", "story with a cache", "wan by ulysses", "wan with a cache"]
)
def test_two_ranks_make_the_pixels_of_one(
    name: str, story: str, folder_of: Callable[[str], Path], found: list[dict[str, Any]]
) -> None:
    how, request = requests(story, str(folder_of("wan")))[name]
    alone = generate(request)
    assert "context_parallel" not in alone.report
    for rank in found:
        assert not isinstance(rank[name], str), rank[name]
        # pixels are whole numbers of 255: a difference of 1e-5 may turn one of them by one
        assert int((rank[name].int() - torch.from_numpy(frames(alone)).int()).abs().max()) <= 1
        assert rank[f"{name}, report"] == {"how": how, "ranks": 2}
        assert rank[f"{name}, reused"] == alone.report["run"]["reused"]
    if request.accelerators:
        assert found[0][f"{name}, reused"] > 0
    catalog.unload()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wan by ring", "ring needs an attention backend that says its log-sum-exp"),
        ("wan, odd", "a count of tokens that divides by 2 ranks"),
    ],
)
def test_what_diffusers_cannot_do_here_is_told(name: str, told: str, found: list[dict[str, Any]]) -> None:
    assert all(told in rank[name] for rank in found), found[0][name]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"accelerators": (XAttention(),)}, "with a schedule"),
        ({"accelerators": (TaylorCache(gate="confidence"),)}, "with a schedule"),
        ({"panels": 2}, "left out under context parallelism"),
    ],
)
def test_what_ranks_may_disagree_about_is_refused(
    changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(prompt="a cat").replace(**changes)
    ranks.check(request)
    token = ranks._NOW.set(ranks.Together("ring", 0, 2, None))
    try:
        with pytest.raises(RequestError, match=told):
            ranks.check(request)
    finally:
        ranks._NOW.reset(token)


def test_a_single_process_is_told_of_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (
        cli.main(["generate", "a cat", "--context-parallel", "ring", "--output", str(tmp_path / "a.png")])
        == 1
    )
    assert "torchrun --nproc-per-node 2 -m pipelines.cli generate" in capsys.readouterr().err
    assert cli.main(["generate", "-", "--context-parallel", "ring"]) == 1
    assert "given otherwise under --context-parallel" in capsys.readouterr().err
    with pytest.raises(RequestError, match="ulysses or ring"), ranks.together("spiral"):
        pass


@pytest.mark.slow
def test_torchrun_saves_one_file(story: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m",
        "pipelines.cli", "generate", "a red cat", "--model", story, "--steps", "2", "--output", str(tmp_path / "a.gif"),
        "--context-parallel", "ulysses", "--json",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count('"files"') == 1
    assert {one.name for one in tmp_path.iterdir()} == {"a.gif", "a.json"}
