"""Convolutions fitted in closed form: they are the best ones, they help at once, and a run that goes on does not fit again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit.backbones.dit import DiT
from dit.backbones.mmdit import MMDiT
from training.fitting import fit_convolutions
from training.inherit import inherit

SIZE: dict[str, Any] = {
    "in_channels": 3, "patch_size": 2, "sample_size": 12, "width": 32, "heads": 4, "dual_depth": 2, "single_depth": 2,
    "mlp_ratio": 2.0, "context_dim": 12, "pooled_dim": None, "qk_norm": True, "position": "both",
}  # fmt: skip


def teacher() -> MMDiT:
    torch.manual_seed(0)
    model = MMDiT(**SIZE)
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.2)
    return model.eval()


def given(seed: int, batch: int = 4) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 3, 12, 12, generator=draw),
        "timestep": 1000 * torch.rand(batch, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 5, 12, generator=draw),
    }


def passes(model: nn.Module, count: int) -> list[Callable[[], object]]:
    return [lambda seed=seed: model(**given(seed)) for seed in range(count)]


def missed(student: Any, model: Any, count: int) -> dict[str, float]:
    """Return how far each one-stream mixer's answer for the picture is from its teacher's, which hears the same."""
    found = dict.fromkeys((f"single_transformer_blocks.{i}.attn" for i in range(2)), 0.0)

    def watch(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
            ours = student.get_submodule(path)(*args, **kwargs)
            found[path] += float((out - ours)[:, -36:].square().sum())

        return model.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    handles = [watch(path) for path in found]
    with torch.no_grad():
        for one in passes(model, count):
            one()
    for handle in handles:
        handle.remove()
    return found


def test_a_fitted_mixer_answers_more_like_its_teacher_by_what_is_told() -> None:
    model = teacher()
    student, _ = inherit(model, mixer="linear:heads=4,kernel=3", load="qkvo")
    before = {name: one.clone() for name, one in student.state_dict().items()}
    assert not any(one.any() for name, one in before.items() if ".conv." in name)
    far = missed(student, model, 6)
    explained = fit_convolutions(student, model, passes(model, 6))
    assert len(explained) == 4
    assert all(0 < one < 1 for one in explained.values())
    for path, left in missed(student, model, 6).items():
        assert left / far[path] == pytest.approx(1 - explained[path], abs=1e-3)
    changed = {name for name, one in student.state_dict().items() if not torch.equal(one, before[name])}
    assert changed == {name for name in before if ".conv." in name}
    assert [one for one in model.modules() if one._forward_hooks or "project_out" in one.__dict__] == []


def test_the_fit_is_the_least_squares_one() -> None:
    """A mixer that differs from its teacher by a convolution gets that convolution back."""
    model = teacher()
    wanted, _ = inherit(model, mixer="linear:heads=4,kernel=3", load="qkvo")
    student, _ = inherit(model, mixer="linear:heads=4,kernel=3", load="qkvo")
    for one in mixers(wanted):
        nn.init.normal_(one.conv.weight, std=0.3)
        nn.init.normal_(one.conv.bias, std=0.3)
    # The teacher's attention is replaced by linear attention with known convolutions.
    for ours, theirs in zip(mixers(wanted), mixers(model), strict=True):
        inner = ours.eval()

        def forward(*args: Any, inner: nn.Module = inner, theirs: Any = theirs, **kwargs: Any) -> Any:
            first: list[Tensor] = []
            out = inner.project_out
            inner.project_out = lambda x: (first.append(x), out(x))[1]  # type: ignore[assignment]
            made = inner(*args, **kwargs)
            del inner.project_out
            theirs.project_out(first[0])
            return made

        theirs.forward = forward
    explained = fit_convolutions(student, model, passes(model, 12))
    for path, share in explained.items():
        assert share > 0.98, path
    first, known = mixers(student)[0].conv.weight, mixers(wanted)[0].conv.weight
    torch.testing.assert_close(first, known, atol=0.1, rtol=0.1)


def mixers(model: Any) -> list[Any]:
    return [
        *(one.attn for one in model.transformer_blocks),
        *(one.attn for one in model.single_transformer_blocks),
    ]


def test_one_stream_is_fitted_too() -> None:
    torch.manual_seed(0)
    model = DiT(sample_size=8, width=32, depth=2, heads=4, num_classes=5, convention="flow").eval()
    for one in model.parameters():
        if not one.any():
            nn.init.normal_(one, std=0.2)
    student, _ = inherit(model, mixer="linear:heads=4,kernel=3", load="qkvo")
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(4, 4, 8, 8, generator=draw)
    explained = fit_convolutions(
        student, model, [lambda: model(x, torch.tensor([10.0, 300, 600, 990]), torch.arange(4))]
    )
    assert sorted(explained) == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
    assert min(explained.values()) > 0


def test_what_cannot_be_fitted_is_refused() -> None:
    model = teacher()
    bare, _ = inherit(model, mixer="linear:heads=4,kernel=0", load="qkvo")
    with pytest.raises(ValueError, match="no linear mixer with a convolution"):
        fit_convolutions(bare, model, [])
    student, _ = inherit(model, mixer="linear:heads=4,kernel=3", load="qkvo")
    with pytest.raises(ValueError, match=r"no softmax attention at transformer_blocks\.0\.attn"):
        fit_convolutions(student, student, [])
