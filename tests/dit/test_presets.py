"""Names for sizes: the published counts, the shipped recipe, and helpful refusals."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dit.ledger import parameters_of
from dit.presets import PRESETS, backbone_class, build, settings


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize(("size", "millions"), [("s", 32.96), ("b", 130.3), ("l", 457.8), ("xl", 674.8)])
def test_dit_sizes_are_the_published_ones(size: str, millions: float, patch: int) -> None:
    with torch.device("meta"):
        model = build(f"dit-{size}/{patch}")
    count = parameters_of(model)
    assert model.config.patch_size == patch
    if patch == 2:  # the figure for S includes the frozen position table, the others do not
        table = 256 * 384 if size == "s" else 0
        assert (count + table) / 1e6 == pytest.approx(millions, abs=0.05)
    assert all(one.device.type == "meta" for one in model.parameters())


def test_sit_is_the_same_network_read_otherwise() -> None:
    with torch.device("meta"):
        sit, dit = build("sit-b/4"), build("dit-b/4")
    assert sit.config.convention == "sit"
    assert dit.config.convention == "ddpm"
    assert {k: v.shape for k, v in sit.state_dict().items()} == {
        k: v.shape for k, v in dit.state_dict().items()
    }


def test_flux_size_has_exactly_the_parameters_of_flux() -> None:
    with torch.device("meta"):
        ours = build("mmdit-flux")
        theirs = FluxTransformer2DModel(guidance_embeds=True)
    assert parameters_of(ours) == parameters_of(theirs) == pytest.approx(11_901.4e6, abs=0.1e6)


@pytest.mark.parametrize(("name", "millions"), [("mmdit-sd3", 2026.0), ("mmdit-sd3.5-l", 8050.7)])
def test_sd3_sizes(name: str, millions: float) -> None:
    """SD3-M has 2028.3 and SD3.5-L 8056.6 M: 2.4 and 5.9 M more, for the text queries of the last block that nobody reads."""
    with torch.device("meta"):
        model = build(name)
    assert parameters_of(model) / 1e6 == pytest.approx(millions, abs=0.05)
    unread = model.config.width * (model.config.width + 1) / 1e6
    assert parameters_of(model) / 1e6 + unread == pytest.approx(
        {"mmdit-sd3": 2028.3, "mmdit-sd3.5-l": 8056.6}[name], abs=0.1
    )


@pytest.mark.parametrize(("name", "file"), [("emoji", "emoji"), ("emmdit-emoji", "emmdit")])
def test_a_preset_is_its_recipe(name: str, file: str) -> None:
    recipe = Path(__file__).resolve().parents[2] / "training" / "recipes" / f"{file}.toml"
    if not recipe.is_file():
        pytest.skip("training/ is not beside this package")
    assert settings(name) == tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]


def test_the_control_of_a_recipe_is_as_large_and_differs_in_nothing_but_the_network() -> None:
    folder = Path(__file__).resolve().parents[2] / "training" / "recipes"
    if not folder.is_dir():
        pytest.skip("training/ is not beside this package")
    ours, control = (
        tomllib.loads((folder / f"{file}.toml").read_text(encoding="utf-8"))
        for file in ("emmdit", "emmdit-control")
    )
    sizes = []
    for recipe in (ours, control):
        size = recipe.pop("model")
        with torch.device("meta"):
            sizes.append(parameters_of(backbone_class(size.pop("backbone"))(**size)))
    assert ours == control
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)
    assert 2e6 < sizes[0] < 5e6


def test_changes_win() -> None:
    model = build("dit-s/8", depth=1, width=16, heads=2, num_classes=3)
    assert (model.config.depth, model.config.width, model.config.num_classes) == (1, 16, 3)
    assert settings("dit-s/8")["depth"] == 12


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("dit-xl2", "dit-xl/2"), ("DiT-S/3", "dit-s/"), ("emojis", "emoji"), ("flux", "mmdit-flux")],
)
def test_unknown_names_are_answered_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}"):
        settings(wrong)


def test_unknown_changes_are_refused() -> None:
    with pytest.raises(ValueError, match="DiT has no setting 'widht'"):
        build("dit-s/2", widht=3)


def test_every_preset_can_be_built() -> None:
    assert {"dit-xl/2", "sit-s/8", "mmdit-sd3", "mmdit-sd3.5-l", "mmdit-flux", "emoji"} <= set(PRESETS)
    for name in PRESETS:
        short: dict[str, dict[str, Any]] = {"mmdit": {"dual_depth": 1}, "emmdit": {"groups": [1]}}
        depth = short.get(PRESETS[name]["backbone"], {"depth": 1})
        with torch.device("meta"):
            assert build(name, **depth).config.width == PRESETS[name]["width"]
