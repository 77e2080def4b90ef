"""Files of adapters: a round trip, released layouts by their content, and every bad file refused before anything is attached."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import control
from control import _files
from control._files import Coverage, backbone_of, base_digest, load, read, save
from control.base import Refused, Use, controlled
from control.easycontrol import EasyControl, to_official

Easy = Callable[..., Use]


def test_round_trip(tiny: Any, easy: Easy, tmp_path: Path) -> None:
    use = easy(tiny, positions="center", rank=3)
    file = save(use.adapter, tmp_path / "edges.safetensors", tiny.model, {"steps": 700})
    assert [one.name for one in tmp_path.iterdir()] == ["edges.safetensors"]
    again = load(file, tiny.model)
    assert again.control == use.adapter.control
    assert str(again.coverage) == f"{len(again.state_dict())}/{len(again.state_dict())} keys"
    for name, x in use.adapter.state_dict().items():
        assert torch.equal(again.state_dict()[name], x)
    given = tiny.given()
    with torch.no_grad():
        with controlled(tiny.model, use):
            before = tiny.call(given)
        with controlled(tiny.model, Use(again, use.condition)):
            assert torch.equal(tiny.call(given), before)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
        assert all(key.startswith("transformer.") for key in opened.keys())  # noqa: SIM118  # no mapping
    assert json.loads(metadata["control"])["positions"] == "center"
    assert json.loads(metadata["about"]) == {"steps": 700}
    assert json.loads(metadata["backbone"]) == backbone_of(tiny.model)


def official(tiny: Any, easy: Easy) -> dict[str, Tensor]:
    return to_official(easy(tiny).adapter.state_dict(), 0)


def test_released_files_are_known_by_their_content(make: Any, easy: Easy, tmp_path: Path) -> None:
    tiny = make("flux")
    use = easy(tiny, conditioning="prompt")
    weights = to_official(use.adapter.state_dict(), 0)
    assert "transformer_blocks.1.attn.processor.proj_loras.0.down.weight" in weights
    save_file(weights, tmp_path / "canny.safetensors")
    found = load(tmp_path / "canny.safetensors", tiny.model)
    assert found.control == use.adapter.control
    assert all(torch.equal(x, found.state_dict()[name]) for name, x in use.adapter.state_dict().items())
    save_file(weights, tmp_path / "subject.safetensors")
    assert load(tmp_path / "subject.safetensors", tiny.model).control.to_dict()["positions"] == "rows"


def test_a_released_file_for_another_width_is_told_as_such(make: Any, tmp_path: Path) -> None:
    parts = {"down": torch.zeros(2, 3072), "up": torch.zeros(3072, 2)}
    path = "transformer_blocks.0.attn.processor.q_loras.0"
    save_file({f"{path}.{side}.weight": x for side, x in parts.items()}, tmp_path / "canny.safetensors")
    with pytest.raises(Refused, match=r"canny\.safetensors is for a FLUX transformer of width 3072, and this .* has 24"):
        load(tmp_path / "canny.safetensors", make("flux").model)


def test_every_projection_may_have_a_rank_of_its_own(make: Any, easy: Easy, tmp_path: Path) -> None:
    tiny = make("flux")
    weights = official(tiny, easy)
    name = "single_transformer_blocks.0.attn.processor.v_loras.0"
    weights[f"{name}.down.weight"], weights[f"{name}.up.weight"] = torch.randn(7, 24), torch.randn(24, 7)
    save_file(weights, tmp_path / "mixed.safetensors")
    found = load(tmp_path / "mixed.safetensors", tiny.model)
    assert found.state_dict()["single_transformer_blocks.0.attn.to_v.lora_A.weight"].shape == (7, 24)
    with torch.no_grad(), controlled(tiny.model, Use(found, tiny.condition())) as run:
        tiny.call(tiny.given())
    assert run.report().uses[0]["acted"] == 4


def wrong(
    change: Callable[[dict[str, Tensor]], Any], words: str
) -> tuple[Callable[[dict[str, Tensor]], Any], str]:
    return change, words


FIRST = "transformer_blocks.0.attn.processor.q_loras.0"
WRONG = {
    "a missing key": wrong(
        lambda w: w.pop(f"{FIRST}.up.weight"), r"missing transformer_blocks\.0\.attn\.to_q\.lora_B"
    ),
    "a strange key": wrong(lambda w: w.update(other=torch.zeros(1)), "has other among its keys"),
    "another shape": wrong(
        lambda w: w.update({f"{FIRST}.up.weight": torch.zeros(25, 4)}), r"is \(25, 4\), expected \(24, 4\)"
    ),
    "another block": wrong(
        lambda w: w.update({f"{FIRST.replace('.0.attn', '.9.attn')}.up.weight": torch.zeros(24, 4)}),
        "no place for",
    ),
    "two conditions": wrong(
        lambda w: w.update({f"{FIRST[:-1]}1.up.weight": torch.zeros(24, 4)}), "2 conditions in one"
    ),
    "NaN": wrong(lambda w: w[f"{FIRST}.up.weight"].fill_(float("nan")), "no finite numbers"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_does_not_fit_is_refused_whole(make: Any, easy: Easy, tmp_path: Path, case: str) -> None:
    tiny = make("flux")
    change, words = WRONG[case]
    weights = official(tiny, easy)
    change(weights)
    save_file(weights, tmp_path / "one.safetensors")
    before = dict(tiny.model.__dict__)
    with pytest.raises(Refused, match=words) as error:
        load(tmp_path / "one.safetensors", tiny.model)
    assert "one.safetensors" in str(error.value)
    assert tiny.model.__dict__ == before


def test_another_family_or_base_is_named(make: Any, easy: Easy, tmp_path: Path) -> None:
    flux, mmdit = make("flux"), make("mmdit")
    file = save(easy(mmdit).adapter, tmp_path / "a.safetensors", mmdit.model)
    with pytest.raises(
        Refused, match=r"is for MMDiT of width 24 with 2 transformer_blocks \+ 2 single.*FluxTransformer"
    ):
        load(file, flux.model)
    weight = mmdit.model.context_embedder.weight
    kept = weight.clone()
    digest = base_digest(mmdit.model)
    mmdit.model.to(torch.bfloat16)
    assert base_digest(mmdit.model) == digest, "a cast is the same base"
    mmdit.model.float()
    try:
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(Refused, match=f"digest {digest}, these have {base_digest(mmdit.model)}"):
            load(file, mmdit.model)
        assert load(file, mmdit.model, any_base=True).control == EasyControl(rank=4)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_pickles_and_broken_files_are_not_opened(make: Any, easy: Easy, tmp_path: Path) -> None:
    tiny = make("flux")
    torch.save(official(tiny, easy), tmp_path / "one.pth")
    with pytest.raises(Refused, match=r"is a pickle.*weights_only=True.*save_file"):
        load(tmp_path / "one.pth", tiny.model)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(Refused, match="no whole safetensors file"):
        load(tmp_path / "cut.safetensors", tiny.model)
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(Refused, match="holds no weights"):
        read(tmp_path / "empty.safetensors")
    save_file({"layers.0.weight": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(Refused, match=r"no adapter of a known layout.*EasyControl.*layers\.0\.weight"):
        load(tmp_path / "strange.safetensors", tiny.model)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere.safetensors", tiny.model)
    with pytest.raises(Refused, match=r"written as \.safetensors"):
        save(easy(tiny).adapter, tmp_path / "one.pth", tiny.model)


def test_files_of_a_later_format_or_with_unknown_settings(make: Any, easy: Easy, tmp_path: Path) -> None:
    tiny = make("flux")
    use = easy(tiny)
    weights = {"transformer." + name: x for name, x in use.adapter.state_dict().items()}
    about = {"control_format": "2"}
    save_file(weights, tmp_path / "later.safetensors", metadata=about)
    with pytest.raises(Refused, match="control_format is 2, this version reads 1"):
        load(tmp_path / "later.safetensors", tiny.model)
    about = {
        "control_format": "1",
        "control": json.dumps({"name": "easycontrol", "ranks": 4}),
        "backbone": "{}",
    }
    save_file(weights, tmp_path / "strange.safetensors", metadata=about)
    with pytest.raises(Refused, match=r"no setting 'ranks'.*did you mean 'rank'"):
        load(tmp_path / "strange.safetensors", tiny.model)


def test_a_failing_write_leaves_the_old_file(
    make: Any, easy: Easy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make("flux")
    file = save(easy(tiny).adapter, tmp_path / "a.safetensors", tiny.model)
    before = file.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(easy(tiny, 2).adapter, file, tiny.model)
    assert file.read_bytes() == before


def test_methods_are_named() -> None:
    found = control.methods()
    assert found["easycontrol"] is EasyControl
    assert all(issubclass(one, control.Control) and one.about for one in found.values())


def test_coverage_in_words() -> None:
    assert str(Coverage(304, 304)) == "304/304 keys"
    assert str(Coverage(1, 2, ("a.b",))) == "1/2 keys (no place for a.b)"
    assert "EasyControl" in _files._READERS
