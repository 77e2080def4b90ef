"""Context parallelism: two gloo ranks answer as one process does, with few tokens each; what cannot be shared is refused."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from diffusers import ContextParallelConfig
from torch import Tensor, nn

from acceleration import DeltaCache, accelerated
from dit._exchange import attend_with_sums, heard_spans, merged
from dit.attention import attend
from dit.backbones.dit import DiT
from dit.backbones.emmdit import EMMDiT
from dit.backbones.mask2dit import Mask2DiT
from dit.backbones.mmdit import MMDiT
from dit.backbones.vdt import VDT
from dit.context_parallel import Ranks, Share, refusal, shared
from dit.grid import Grid
from dit.mixers.scenes import attend_scenes
from dit.segments import Segments

SCENES = Segments((4, 0, 3), (24, 12, 18))
Case = tuple[nn.Module, dict[str, Any]]


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(network: Any) -> Any:
    """Fill a network with weights without zeros, which would hide its attention."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return network.eval()


def words(batch: int, length: int) -> dict[str, Tensor]:
    """Text of which the last sample's end is padding."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, length - 2 :] = False
    return {"encoder_hidden_states": drawn(batch, length, 8, seed=6), "encoder_attention_mask": mask}


def dit() -> Case:
    network = filled(DiT(width=48, depth=2, heads=3, sample_size=6, num_classes=4))
    given = {"timestep": torch.tensor([3.0, 700.0]), "class_labels": torch.tensor([0, 2])}
    return network, {"hidden_states": drawn(2, 4, 6, 10)} | given


def mmdit(**more: Any) -> Case:
    sizes = {"width": 48, "heads": 3, "dual_depth": 2, "single_depth": 1, "context_dim": 8, "patch_size": 2}
    network = filled(MMDiT(**(sizes | {"pooled_dim": None} | more)))  # type: ignore[arg-type]
    return network, {"hidden_states": drawn(2, 3, 3, 6, 10), "timestep": torch.tensor([3.0, 700.0])} | words(
        2, 5
    )


def vdt(position: Any = "sincos") -> Case:
    network = filled(
        VDT(width=48, depth=2, heads=3, sample_size=6, context_dim=8, clean_time=True, position=position)
    )
    given = {
        "mask": torch.tensor([0.0, 1, 1, 0, 1])[:, None, None].expand(5, 6, 4),
        "clean": drawn(2, 4, 5, 6, 4),
    }
    text = words(2, 5)
    heard = text["encoder_attention_mask"][:, None].repeat(1, 5, 1)
    heard[0, 3, :2] = False
    clip = {"hidden_states": drawn(2, 4, 5, 6, 4, seed=7), "timestep": torch.tensor([3.0, 700.0])}
    return network, clip | given | text | {"encoder_attention_mask": heard}


def vdt_full(position: Any = "sincos") -> Case:
    size = {"width": 48, "depth": 2, "heads": 3, "sample_size": 6}
    network = filled(VDT(**size, mixer="full", conditioning="concatenate", position=position))
    beside = {
        "condition_frames": drawn(2, 4, 2, 6, 4),
        "condition_mask": torch.tensor([[True, True], [True, False]]),
    }
    return network, {
        "hidden_states": drawn(2, 4, 5, 6, 4, seed=7),
        "timestep": torch.tensor([3.0, 700.0]),
    } | beside


def mask2dit(position: str = "rope") -> Case:
    network = Mask2DiT(
        in_channels=3, width=48, depth=2, heads=3, time_dim=16, context_dim=8, caption_length=4, sample_height=6,
        sample_width=4, frames=2, scenes=3, position=position,  # type: ignore[arg-type]
    )  # fmt: skip
    scenes = {
        "scene_texts": [4, 4, 3],
        "scene_frames": [2, 1, 2],
        "timestep": torch.tensor([[3.0, 0, 5], [700, 700, 0]]),
    }
    return filled(network), {"hidden_states": drawn(2, 3, 5, 6, 4)} | words(2, 11) | scenes


CASES: dict[str, Callable[[], Case]] = {
    "dit": dit,
    "mmdit": mmdit,
    "mmdit, pre-only text": lambda: mmdit(single_depth=0, mixer="scenes:caption=0"),
    "vdt": vdt,
    "vdt, full": vdt_full,
    "vdt, rotary": lambda: vdt("rope"),
    "vdt, full, rotary": lambda: vdt_full("both"),
    "mask2dit": mask2dit,
    "mask2dit, stored": lambda: mask2dit("stored"),
}


def answers(how: str) -> dict[str, Any]:
    """What this rank answers in every case, and how many tokens its first block saw."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        network, given = case()
        seen: list[int] = []
        block: Any = network.transformer_blocks[0]  # type: ignore[index]
        watch = block.register_forward_pre_hook(
            lambda _m, _a, kwargs, seen=seen: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        with torch.no_grad(), shared(network, how):
            found[name] = network(**given, return_dict=False)[0]
        with torch.no_grad():
            found[f"{name}, after"] = network(**given, return_dict=False)[0]
        watch.remove()
        found[f"{name}, tokens"] = seen
    return found


def accelerated_answers() -> Tensor:
    """A schedule of steps with reused blocks, shared by the ranks in an `accelerated` of its own on each."""
    network, given = mask2dit()
    with (
        torch.no_grad(),
        accelerated(
            network, DeltaCache(interval=2, warmup=1, final_full=0, first_block=0, last_block=0), steps=4
        ) as run,
    ):
        if dist.is_initialized():
            with shared(network, "ulysses"):
                outputs = _steps(network, given)
        else:
            outputs = _steps(network, given)
    assert run.report().reused > 0
    return outputs


def _steps(network: Any, given: dict[str, Any]) -> Tensor:
    later = [given | {"timestep": given["timestep"] * (1 - step / 10)} for step in range(4)]
    return torch.stack([network(**one, return_dict=False)[0] for one in later])


def attention(how: str) -> dict[str, Tensor]:
    """Attention of this rank's tokens within scenes and of its gradients, with masked keys."""
    ranks = Ranks(how, dist.get_rank(), dist.get_world_size())
    share = Share.of(ranks, Grid(9, 2, 3), SCENES.length)
    inputs, mask = scene_inputs()
    whole = [one.requires_grad_() for one in inputs]
    parts = [torch.cat([share.cut_text(one[:, :7]), share.cut(one[:, 7:])], dim=1) for one in whole]

    def inner(*given: Any, processor: Any = None) -> Tensor:
        return attend_scenes(*given, segments=SCENES, processor=processor)

    out = share.attention(inner, SCENES)(*parts, mask)
    text = share.text[ranks.rank]
    wanted = drawn(2, 61, 3, 8, seed=9)
    (out * torch.cat([share.cut_text(wanted[:, :7]), share.cut(wanted[:, 7:])], dim=1)).sum().backward()
    found = {"text": out[:, :text], "picture": out[:, text:]}
    return {name: one.detach() for name, one in found.items()} | {
        f"grad {name}": one.grad for name, one in zip("qkv", whole, strict=True) if one.grad is not None
    }


def scene_inputs() -> tuple[list[Tensor], Tensor]:
    mask = torch.ones(2, 1, 1, 61, dtype=torch.bool)
    mask[0, ..., 1:3], mask[1, ..., 5] = False, False
    return [drawn(2, 61, 3, 8, seed=seed) for seed in (1, 2, 3)], mask


def refusals() -> dict[str, str]:
    """What two ranks are told about networks and sequences that they cannot share."""
    tried: dict[str, Callable[[], Any]] = {
        "one frame": lambda: _called(vdt(), "ulysses", hidden_states=drawn(2, 4, 1, 6, 4), mask=None, clean=None,
                                     encoder_attention_mask=None),
        "one head": lambda: _called(mmdit(heads=1, width=16), "ulysses"),
        "a time a token": lambda: _called(mmdit(), "ring", timestep=torch.full((2, 45), 5.0)),
        "both": lambda: _both(),
        "spiral": lambda: _called(dit(), "spiral"),
    }  # fmt: skip
    told = {}
    for name, attempt in tried.items():
        try:
            attempt()
            told[name] = "not refused"
        except ValueError as error:
            told[name] = str(error)
    return told


def _called(case: Case, how: str, **changes: Any) -> None:
    network, given = case
    with torch.no_grad(), shared(network, how):
        network(**(given | changes))


def _both() -> None:
    config = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2, ulysses_degree=2))
    Ranks.of(config)


def _by_diffusers_door() -> Tensor:
    """The way of a user of diffusers: a config, and no way back."""
    network, given = mask2dit()
    network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # type: ignore[operator]
    with torch.no_grad():
        found: Tensor = network(**given, return_dict=False)[0]
    return found


def work(rank: int, port: int, folder: str) -> None:
    """What each of the two ranks does: everything once, and what it found into a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {how: answers(how) for how in ("ulysses", "ring")}
    found |= {f"attention {how}": attention(how) for how in ("ulysses", "ring")}
    found |= {"accelerated": accelerated_answers(), "refused": refusals(), "config": _by_diffusers_door()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start two ranks once, and return what each has found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["ulysses", "ring"])
def test_two_ranks_answer_as_one_process(how: str, name: str, found: list[dict[str, Any]]) -> None:
    network, given = CASES[name]()
    with torch.no_grad():
        alone = network(**given, return_dict=False)[0]
    for rank in found:
        torch.testing.assert_close(rank[how][name], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(rank[how][f"{name}, after"], alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_each_rank_has_its_part_of_the_tokens(name: str, found: list[dict[str, Any]]) -> None:
    for how in ("ulysses", "ring"):
        seen = [rank[how][f"{name}, tokens"] for rank in found]
        whole = seen[0][1]
        assert seen[0][1] == seen[1][1] == seen[0][0] + seen[1][0]
        assert 0 < seen[1][0] <= seen[0][0] < whole


@pytest.mark.parametrize("how", ["ulysses", "ring"])
def test_attention_within_scenes_and_its_gradients(how: str, found: list[dict[str, Any]]) -> None:
    (q, k, v), mask = scene_inputs()
    whole = [one.requires_grad_() for one in (q, k, v)]
    out = attend_scenes(*whole, mask, segments=SCENES)
    (out * drawn(2, 61, 3, 8, seed=9)).sum().backward()
    ranks = [rank[f"attention {how}"] for rank in found]
    joined = torch.cat([rank[part] for part in ("text", "picture") for rank in ranks], dim=1)
    torch.testing.assert_close(joined, out.detach(), atol=1e-5, rtol=0)
    for name, one in zip("qkv", whole, strict=True):
        torch.testing.assert_close(sum(rank[f"grad {name}"] for rank in ranks), one.grad, atol=1e-5, rtol=0)


def test_an_accelerator_with_a_schedule_works_on_each_rank(found: list[dict[str, Any]]) -> None:
    for rank in found:
        torch.testing.assert_close(rank["accelerated"], accelerated_answers(), atol=1e-5, rtol=0)


def test_diffusers_own_door(found: list[dict[str, Any]]) -> None:
    network, given = mask2dit()
    with torch.no_grad():
        alone = network(**given, return_dict=False)[0]
    for rank in found:
        torch.testing.assert_close(rank["config"], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("one frame", "at least one of the frames for each of 2 ranks, got 1"),
        ("one head", 'at least one of the heads (take "ring" for fewer) for each of 2 ranks, got 1'),
        ("a time a token", "one time a sample beside a text stream, got one a token"),
        ("both", "one of ulysses_degree and ring_degree is 1"),
        ("spiral", "ulysses or ring, got 'spiral'"),
    ],
)
def test_what_ranks_cannot_share_is_refused(name: str, told: str, found: list[dict[str, Any]]) -> None:
    assert all(told in rank["refused"][name] for rank in found), found[0]["refused"][name]


@pytest.mark.parametrize(
    "mixer", ["mamba", "mamba:shared=true", "window", "lingen", "lingen:shared=true", "linear", "gated"]
)
def test_mixers_across_the_cut_are_refused(mixer: str) -> None:
    network = DiT(width=32, depth=1, heads=2, sample_size=4, num_classes=2, mixer=mixer)
    assert f"its mixer {mixer.partition(':')[0]} reads tokens across every cut" in str(refusal(network))
    with pytest.raises(ValueError, match="ranks cannot share it; full, scenes and spacetime can be shared"):
        network.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    assert network._parallel_config is None


def test_experts_and_networks_without_a_plan_are_refused() -> None:
    routed = DiT(width=32, depth=1, heads=2, sample_size=4, num_classes=2, experts="mix-ffn")
    assert "its experts mix-ffn decide by all tokens" in str(refusal(routed))
    assert "EMMDiT has no plan" in str(refusal(EMMDiT.__new__(EMMDiT)))
    with pytest.raises(RuntimeError, match="init_process_group comes first"):
        dit()[0].enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # type: ignore[operator]


@pytest.mark.parametrize("rows", [4, 1024])
def test_merged_parts_are_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit._exchange.ROWS", rows)
    q, k, v = drawn(2, 9, 3, 8), drawn(2, 14, 3, 8, seed=1), drawn(2, 14, 3, 8, seed=2)
    mask = drawn(2, 1, 1, 14, seed=3) > 0
    mask[0, ..., :6], mask[1, ..., 2] = False, True  # one sample hears nothing in the first part
    for hard in (False, True):  # the kernel of the CPU, and scores written out
        asking = q.clone().requires_grad_(hard)
        parts = [
            attend_with_sums(asking, k[:, a:b], v[:, a:b], mask[..., a:b])
            for a, b in ((0, 6), (6, 9), (9, 14))
        ]
        out, _ = merged(merged(parts[0], parts[1]), parts[2])
        torch.testing.assert_close(out, attend(q, k, v, mask), atol=1e-5, rtol=0)


def test_who_hears_whom_is_the_mask_of_the_scenes() -> None:
    heard = torch.zeros(61, 61, dtype=torch.bool)
    for (a, b), spans in heard_spans(SCENES, 61):
        for start, end in spans:
            heard[a:b, start:end] = True
    assert torch.equal(heard, SCENES.mask())


def test_shares_of_three_ranks_fit_together() -> None:
    shares = [Share.of(Ranks("ring", rank, 3), Grid(5, 2, 2), 7) for rank in range(3)]
    assert shares[0].text == (3, 2, 2)
    assert shares[0].picture == (7, 7, 6)
    places = [span for share in shares for span, _ in share.places(share.ranks.rank)]
    assert sorted(places) == [(0, 3), (3, 5), (5, 7), (7, 14), (14, 21), (21, 27)]
    assert [share.counts((8, 4, 8)) for share in shares] == [(7, 0, 0), (1, 4, 2), (0, 0, 6)]
    whole = Share.of(Ranks("ring", 1, 3), Grid(5, 2, 2), frames=True)
    assert whole.picture == (8, 8, 4)
    assert whole.grid == Grid(2, 2, 2)
    assert whole.along_time.picture == (2, 2, 1)
