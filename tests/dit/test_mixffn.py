"""Mix-FFN is SANA's, token by token, and serves prompts; the gated perceptron has the sizes of LLaMA's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers.sana_transformer import GLUMBConv

from dit.experts.dense import Experts
from dit.experts.mixffn import MixPerceptron
from dit.experts.swiglu import GatedPerceptron
from dit.grid import Grid
from dit.ledger import macs_of
from dit.model import Context
from dit.spec import parse

GRID = Grid(1, 4, 6)


def context(grid: Grid | None = GRID, **about: Any) -> Context:
    return Context(grid, torch.zeros(1, 16), **about)


def perceptron(settings: str = "mix-ffn", hidden: int = 64) -> MixPerceptron:
    torch.manual_seed(0)
    made = parse(Experts, settings).build(16, hidden)
    assert isinstance(made, MixPerceptron)
    return made


def test_it_is_the_layer_of_sana() -> None:
    ours = perceptron()
    theirs = GLUMBConv(16, 16, expand_ratio=2.5, residual_connection=False)
    names = {"proj_in": "conv_inverted", "conv": "conv_depth", "proj_out": "conv_point"}
    state = {}
    for name, tensor in ours.state_dict().items():
        part, leaf = name.split(".")
        wanted = theirs.state_dict()[f"{names[part]}.{leaf}"]
        state[f"{names[part]}.{leaf}"] = tensor.reshape(wanted.shape)
    theirs.load_state_dict(state)
    x = torch.randn(2, GRID.tokens, 16)
    picture = x.reshape(2, GRID.height, GRID.width, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours(x, context()), theirs(picture).permute(0, 2, 3, 1).reshape(2, -1, 16))


def test_text_tokens_are_pictures_of_one_token() -> None:
    ours, x = perceptron(), torch.randn(2, 7 + GRID.tokens, 16)
    together = ours(x, context(length=7))
    torch.testing.assert_close(together[:, :7], ours(x[:, :7], context(None)))
    torch.testing.assert_close(together[:, :7], ours(x[:, :7]))
    torch.testing.assert_close(together[:, 7:], ours(x[:, 7:], context()))
    for i in range(7):
        torch.testing.assert_close(ours(x[:, i : i + 1]), ours(x[:, i : i + 1], context(Grid(1, 1, 1))))


def test_it_needs_every_token_of_the_grid() -> None:
    with pytest.raises(ValueError, match="needs all 24, got 20"):
        perceptron()(torch.randn(1, 20, 16), context())


def test_an_even_convolution_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel must be odd, got 2"):
        parse(Experts, "mix-ffn:kernel=2")


def test_it_costs_about_what_the_plain_perceptron_costs() -> None:
    dense = parse(Experts, "dense").build(16, 64)
    for settings in ("mix-ffn", "swiglu:multiple=1"):
        share = macs_of(parse(Experts, settings).build(16, 64), 10) / macs_of(dense, 10)
        assert (
            0.9 < share < 1.7
        )  # at this width the nine weights of the convolution count; at SANA's they do not
    wide = [macs_of(parse(Experts, name).build(1152, 4608), 1) for name in ("mix-ffn", "dense")]
    assert wide[0] / wide[1] == pytest.approx(0.9375, abs=0.01)


@pytest.mark.parametrize(
    ("width", "inner"), [(32, 256), (384, 1024), (768, 2048), (1024, 2816), (1152, 3072)]
)
def test_the_gated_perceptron_rounds_up(width: int, inner: int) -> None:
    with torch.device("meta"):
        made = parse(Experts, "swiglu").build(width, 4 * width)
    assert isinstance(made, GatedPerceptron)
    assert made.proj_out.weight.shape == (width, inner)


def test_the_gated_perceptron_multiplies_by_its_gate() -> None:
    torch.manual_seed(0)
    made = parse(Experts, "swiglu:multiple=1").build(8, 12)
    x = torch.randn(2, 3, 8)
    gate, value = (x @ made.proj_in.weight.T).chunk(2, dim=-1)
    torch.testing.assert_close(made(x), (value * gate * gate.sigmoid()) @ made.proj_out.weight.T)
