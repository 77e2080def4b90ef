"""Sets of panels: ours and diffusers' pipelines, the three ways to hold given panels, sets as files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.cli import main
from pipelines.generate import generate
from pipelines.layout import Layout
from pipelines.panel_sets import read_set, read_sets
from pipelines.panels import PanelsPipeline, panels_of
from pipelines.repro import repro
from pipelines.request import KNOWN, Request, RequestError
from pipelines.result import pixel_hash
from pipelines.text_to_image import TextToImagePipeline

SET = ["a red cat", "a blue dog", "the green fish", "a tree"]


def lengthened(pipe: Any) -> Any:
    """Let the tiny tokenizers read joint captions to their end."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if getattr(pipe, name, None) is not None and not (
            name != "tokenizer_3" and hasattr(pipe, "tokenizer_3")
        ):
            getattr(pipe, name).model_max_length = 64
    if isinstance(pipe, TextToImagePipeline):
        pipe.register_to_config(text_length=64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def folder(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our tiny model with room for joint captions."""
    place = tmp_path_factory.mktemp("panels") / "model"
    lengthened(TextToImagePipeline.from_pretrained(folder_of("ours"))).save_pretrained(place)
    return place


@pytest.fixture
def pipe(folder: Path) -> Any:
    made = panels_of(TextToImagePipeline.from_pretrained(folder))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(params=["flux", "sd3"])
def guest(request: pytest.FixtureRequest, folder_of: Callable[[str], Path]) -> Any:
    loaded = diffusers.DiffusionPipeline.from_pretrained(folder_of(request.param))
    loaded.set_progress_bar_config(disable=True)
    for name in ("tokenizer_2", "tokenizer_3"):  # the T5's is the one that reads on
        if getattr(loaded, name, None) is not None and (name == "tokenizer_3" or request.param == "flux"):
            getattr(loaded, name).model_max_length = 64
    return panels_of(loaded)


def drawn(seed: int = 0, side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def make(pipe: Any, prompt: Any = SET, **more: Any) -> Any:
    return pipe(prompt, **({"seeds": [3], "num_inference_steps": 3, "output_type": "np"} | more)).images


def test_one_canvas_one_caption_and_panels_of_it(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    panels = make(pipe)
    assert panels.shape == (4, 32, 32, 3)
    assert seen[0]["hidden_states"].shape == (
        2,
        3,
        32,
        32,
    )  # two guidance branches of 2 x 2 panels of 16 latent pixels
    assert np.array_equal(panels, make(pipe))
    assert np.array_equal(panels, make(pipe, " | ".join(SET), panels=4))
    out = pipe(SET, seeds=[3], num_inference_steps=1, about="stickers", marks="place")
    assert out.record["joint"] == (
        "[SET-OF-4] stickers [TOP-LEFT] a red cat [TOP-RIGHT] a blue dog [BOTTOM-LEFT] the green fish [BOTTOM-RIGHT] a tree"
    )
    assert [one.size for one in out.images] == [(32, 32)] * 4
    # every panel hears the whole caption, and is no picture made alone
    other = make(pipe, [*SET[:3], "a photo"])
    assert not np.allclose(other[0], panels[0], atol=1e-4)
    row = make(pipe, layout="row", gutter=8, height=16, width=24)
    assert row.shape == (4, 16, 24, 3)
    assert seen[-1]["hidden_states"].shape == (2, 3, 8, 60)
    latents = make(pipe, output_type="latent")
    assert latents.shape == (4, 3, 16, 16)
    assert np.array_equal(pipe._decoded(latents, "np"), panels)


@pytest.mark.parametrize("way", KNOWN)
@pytest.mark.parametrize(
    "kind", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "DDIMScheduler"]
)
def test_given_panels_come_out_bit_identical(pipe: Any, way: str, kind: str) -> None:
    pipe.register_modules(scheduler=getattr(diffusers, kind)())
    known = {1: drawn(1), 2: np.asarray(drawn(2), np.float32) / 255}
    panels = pipe(SET, known=known, way=way, seeds=[3], num_inference_steps=4).images
    for place in (1, 2):
        assert np.array_equal(np.asarray(panels[place]), np.asarray(drawn(place)))
    options = {"way": way, "strength": 0.5, "num_inference_steps": 4}
    free, others = make(pipe, **options), make(pipe, known={1: drawn(5), 2: drawn(6)}, **options)
    held = make(pipe, known=known, **options)
    assert np.abs(held[0] - free[0]).max() > 1e-3, "the other panels hear the given ones"
    assert np.abs(held[0] - others[0]).max() > 1e-4
    last = make(pipe, known=known, output_type="latent", **options)
    again = pipe._encoded(drawn(1), (3, 16, 16), 1)[0]
    assert last[1].equal(again)


def test_what_the_network_sees_of_given_panels(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    clean = pipe._encoded(drawn(1), (3, 16, 16), 1)[0]
    options = {"known": {1: drawn(1)}, "guidance_scale": 1.0, "num_inference_steps": 4}
    make(pipe, **options, way="clean-tokens")
    for one in seen:
        assert one["hidden_states"][0, :, :16, 16:].equal(clean)
        times = one["timestep"].reshape(8, 8)
        assert bool((times[:4, 4:] == 0).all())
        assert float(times[:4, :4].min()) > 0
    seen.clear()
    make(pipe, **options, way="re-inject")
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))[0, :, :16, 16:]
    assert all(one["timestep"].shape == (1,) for one in seen)
    for one, sigma in zip(seen, pipe.scheduler.sigmas.tolist(), strict=False):
        torch.testing.assert_close(one["hidden_states"][0, :, :16, 16:], clean * (1 - sigma) + noise * sigma)
    seen.clear()
    make(pipe, **options, way="sdedit", strength=0.5)
    assert len(seen) == 2
    sigma = float(pipe.scheduler.sigmas[2])
    torch.testing.assert_close(seen[0]["hidden_states"][0, :, :16, 16:], clean * (1 - sigma) + noise * sigma)


@pytest.mark.parametrize("way", ["re-inject", "sdedit"])
def test_pipelines_of_diffusers_make_sets_too(guest: Any, way: str) -> None:
    def made(**more: Any) -> Any:
        options = {
            "height": 16,
            "width": 16,
            "num_inference_steps": 4,
            "strength": 0.5,
            "output_type": "np",
        } | more
        return guest(SET[:2], generator=torch.Generator().manual_seed(1), **options)

    out = made(known={1: drawn(1, 16)}, way=way)
    assert out.images.shape == (2, 16, 16, 3)
    assert np.array_equal(np.rint(out.images[1] * 255), np.asarray(drawn(1, 16)))
    assert out.record["known"] == [1]
    assert np.abs(made().images[0] - out.images[0]).max() > 1e-3
    assert np.abs(made(known={1: drawn(2, 16)}, way=way).images[0] - out.images[0]).max() > 1e-5
    again = made(known={1: drawn(1, 16)}, way=way)
    assert np.array_equal(again.images, out.images)
    told: list[int] = []
    made(callback_on_step_end=lambda pipe, index, time, tensors: told.append(index) or {})
    assert told == [0, 1, 2, 3]
    with pytest.raises(RequestError, match="takes one time for all its tokens"):
        made(known={1: drawn(1, 16)}, way="clean-tokens")
    with pytest.raises(RequestError, match="multiple of 2 px" if guest.packed else "at most 96 px a side"):
        made(**({"height": 17} if guest.packed else {"width": 64}))


def test_other_pipelines_are_refused_in_words(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(RequestError, match="PixArtAlphaPipeline lie is not known"):
        panels_of(diffusers.DiffusionPipeline.from_pretrained(folder_of("pixart")))


@pytest.mark.parametrize(
    ("field", "words", "given"),
    [
        ("prompt", "3 panels need 3 captions, got 4", {"panels": 3}),
        ("prompt", "panel 2 of 2 has no caption", {"prompt": "a | "}),
        ("prompt", "at most 64 tokens", {"prompt": ["a red cat on the house " * 4] * 4}),
        ("panels", "from 1 to 16", {"prompt": ["a"] * 17}),
        ("layout", "one of grid", {"layout": "spiral"}),
        ("layout", "made for 4 panels", {"layout": Layout.of(2, 32, 32)}),
        ("layout gutter", "multiple of 8 px", {"gutter": 4}),
        ("height", "multiple of 8", {"height": 36}),
        ("panels", "at most 16384 tokens", {"height": 1024, "width": 1024}),
        ("known", "from 0 to 3", {"known": {4: drawn()}}),
        ("panel 1", "32x32 px as every panel", {"image": drawn(side=24)}),
        ("panel 3", "a picture", {"known": {2: "cat.png"}}),
        ("panel 3", "from 0 to 1", {"known": {2: torch.full((3, 32, 32), 2.0)}}),
        ("panel 3", "from 0 to 1", {"known": {2: torch.full((3, 32, 32), float("nan"))}}),
        ("image", "left out where known panels", {"known": {0: drawn()}, "image": drawn()}),
        ("way", "one of re-inject", {"way": "hope"}),
        ("about", "left out", {"prompt": "stickers [IMAGE1] a cat [IMAGE2] a dog", "about": "photos"}),
    ],
)
def test_bad_input_is_refused_before_the_network_is_called(
    pipe: Any, field: str, words: str, given: dict[str, Any]
) -> None:
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(RequestError, match=words) as caught:
        make(pipe, **({"prompt": SET} | given))
    assert caught.value.field == field


def test_a_request_makes_a_set_and_its_files_read_back(folder: Path, tmp_path: Path, forgotten: None) -> None:
    given = tmp_path / "cat.png"
    drawn(1).save(given)
    request = Request(
        prompt=" | ".join(SET),
        panels=4,
        layout="row",
        model=str(folder),
        steps=2,
        seed=5,
        image=str(given),
        images=2,
    )
    result = generate(request)
    assert len(result.pictures) == 8
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(drawn(1)))
    place = tmp_path / "out"
    place.mkdir()
    paths = result.save(place)
    assert len({*paths}) == 8
    first = read_set(paths[3::-1])
    assert first.captions.panels == tuple(SET)
    assert first.layout == Layout.of(4, 32, 32, arrangement="row")
    assert first.known == (0,)
    assert first.request == request.one(0).replace(
        image="cat.png", model=folder.name
    )  # a file tells no folders
    assert [pixel_hash((one,)) for one in first.images] == [pixel_hash((one,)) for one in result.images[:4]]
    assert first.canvas().size == (128, 32)
    assert [one.request.seed for one in read_sets(place)] == [5, 6]
    # any panel remakes the set and is compared with itself
    verdict = repro(paths[2], model=str(folder), image=str(given))
    assert verdict.verdict == "identical", str(verdict)
    # a set goes on from some of its panels
    pipe = panels_of(TextToImagePipeline.from_pretrained(folder))
    pipe.set_progress_bar_config(disable=True)
    more = pipe(
        first.captions.panels,
        layout=first.layout,
        known={2: first.images[2]},
        seeds=[9],
        num_inference_steps=1,
    )
    assert more.images[2].tobytes() == first.images[2].tobytes()

    with pytest.raises(RequestError, match="panels 1 to 4"):
        read_set(paths[:3])
    with pytest.raises(RequestError, match="the panels of one set"):
        read_set(paths)
    Image.new("RGB", (32, 32)).save(alone := tmp_path / "alone.png")
    with pytest.raises(RequestError, match="holds no request"):
        read_set([alone])
    picture = Image.open(paths[0])
    info = picture.text
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_text("leapfrog", info["leapfrog"])
    Image.new("RGB", (32, 32)).save(paths[0], pnginfo=chunks)
    with pytest.raises(RequestError, match="the pixels it was saved with"):
        read_set(paths[:4])


def test_the_command_line_makes_a_set(folder: Path, tmp_path: Path, capsys: Any, forgotten: None) -> None:
    words = [
        "generate",
        "--model",
        str(folder),
        "--panels",
        "2",
        "--layout",
        "column",
        "--steps",
        "1",
        "--json",
    ]
    assert main([*words, "a red cat | a blue dog", "--output", str(tmp_path)]) == 0
    files = json.loads(capsys.readouterr().out)["files"]
    assert read_set(files).layout.rows == 2
    assert main([*words, "a red cat", "--output", str(tmp_path)]) == 1
    assert "2 panels need 2 captions, got 1" in capsys.readouterr().out
    assert main(["generate", "a cat", "--model", str(folder), "--layout", "row", "--json"]) == 1
    assert "left out where no panels" in capsys.readouterr().out
    assert main([*words, "a cat | a dog", "--known", "sdedit"]) == 1
    assert "left out where no starting picture" in capsys.readouterr().out


def test_a_panels_pipeline_is_a_pipeline_like_others(folder: Path, tmp_path: Path) -> None:
    pipe = panels_of(TextToImagePipeline.from_pretrained(folder))
    pipe.save_pretrained(tmp_path / "saved")
    again = PanelsPipeline.from_pretrained(tmp_path / "saved")
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
    assert np.array_equal(make(pipe, num_inference_steps=1), make(again, num_inference_steps=1))
    assert panels_of(pipe) is pipe
