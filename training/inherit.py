"""Give a network with another mixer the weights of a trained one: `python -m training.inherit SRC DST --mixer linear:heads=2`.

Paper: LiT: Delving into a Simple Linear Diffusion Transformer for Image Generation, Wang et al. 2025, arXiv:2501.12976 (all
weights but those of the attention).
Differs: queries, keys, values and output map can be taken over too (`load="qkvo"`), meant for students that train for a short
time only: the paper found them slightly harmful after 400k steps. The convolution then starts at zero. In blocks of one stream
the output map is the attention's share of the joint map.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit.presets import BACKBONES, backbone_class

LETTERS = "qkvo"
_ATTENTION = re.compile(r"\.attn\.(?:(?:to|add|norm|norm_added)_([qkv])(?:_proj)?|(to_out\.0|to_add_out))\.")
_JOINED = re.compile(r"single_transformer_blocks\.\d+\.proj_out\.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inheritance:
    """What became of every weight, by name.

    `inherited` came from the teacher; `renewed` has a counterpart there and starts anew all the same (a name with [:, :n] means
    these columns); `new` has none; `dropped` are weights of the teacher that the student has no place for.
    """

    inherited: tuple[str, ...]
    renewed: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        counts = {name: len(names) for name, names in asdict(self).items()}
        return ", ".join(f"{count} {name}" for name, count in counts.items())


@torch.no_grad()
def inherit(teacher: Any, *, load: str = "", **changes: Any) -> tuple[Any, Inheritance]:
    """Return a network like `teacher` but for `changes` of its settings, with the teacher's weights, and what became of them.

    Args:
        teacher: a trained backbone of this project; it is not altered.
        load: which parts of the attention come along, letters of "qkvo".
        changes: settings that differ, `mixer` above all.

    Raises:
        ValueError: letters or settings there are none of, a teacher with fused maps, or a weight that changed its shape outside
            of the attention.
    """
    kind = type(teacher)
    unknown = sorted(set(load) - set(LETTERS)), sorted(set(changes) - set(kind._get_init_keys(kind)))
    if unknown[0] or unknown[1]:
        problem = (
            f"load is made of the letters {LETTERS}, got {load!r}"
            if unknown[0]
            else f"no setting {unknown[1][0]!r}"
        )
        raise ValueError(f"inherit: {problem}")
    if any(getattr(one, "fused_projections", False) for one in teacher.modules()):
        raise ValueError("inherit: the teacher's maps are fused; call its unfuse_qkv_projections() first")
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    student = kind(**(config | changes))
    if student.dtype != teacher.dtype:
        student = student.to(teacher.dtype)
    wanted = student.state_dict()
    given = _apart(teacher.state_dict(), wanted)
    inherited, renewed = [], []
    for name, own in wanted.items():
        if name not in given:
            continue
        letter, found = _letter(name), _fitted(given[name], own)
        if found is None and letter is None:
            raise ValueError(
                f"inherit: {name} is {tuple(given[name].shape)}, and {tuple(own.shape)} in the student"
            )
        if found is None or (letter is not None and letter not in load and not _JOINED.fullmatch(name)):
            renewed.append(name)
        elif letter is None or letter in load:
            own.copy_(found)
            inherited.append(name)
        else:
            width = own.shape[0]  # the columns that read the attention come first
            own[:, width:] = found[:, width:]
            renewed.append(f"{name}[:, :{width}]")
            inherited += [f"{name}[:, {width}:]"] * (own.shape[1] > width)
    new = tuple(name for name in wanted if name not in given)
    if {"v", "o"} <= set(load):
        # What is added to answers that the network knows how to read must begin at nothing.
        for name in new:
            if ".attn.conv." in name:
                wanted[name].zero_()
    report = Inheritance(
        inherited=tuple(inherited),
        renewed=tuple(renewed),
        new=new,
        dropped=tuple(name for name in given if name not in wanted),
    )
    return student.train(teacher.training), report


def _apart(given: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a teacher's weights with the joint map of one-stream blocks cut in two, where the student's experts have their own."""
    given = dict(given)
    for path in (
        name.removesuffix("proj_mlp.weight") for name in list(given) if name.endswith("proj_mlp.weight")
    ):
        if f"{path}proj_mlp.weight" in wanted or f"{path}ff.net.0.proj.weight" not in wanted:
            continue
        joint = given[f"{path}proj_out.weight"]
        width = joint.shape[0]
        for kind in ("weight", "bias"):
            given[f"{path}ff.net.0.proj.{kind}"] = given.pop(f"{path}proj_mlp.{kind}")
        given[f"{path}proj_out.weight"], given[f"{path}ff.net.2.weight"] = joint[:, :width], joint[:, width:]
        given[f"{path}ff.net.2.bias"] = torch.zeros_like(given[f"{path}proj_out.bias"])
    return given


def _letter(name: str) -> str | None:
    """Return which part of the attention a weight belongs to, None for what lies outside of it."""
    found = _ATTENTION.search(f".{name}")
    if found:
        return found[1] or "o"
    return "o" if _JOINED.fullmatch(name) else None


def _fitted(given: Tensor, own: Tensor) -> Tensor | None:
    """Return the teacher's weight in the student's shape: norms of a head go into larger heads once for each; None if it cannot."""
    if given.shape == own.shape:
        return given
    if given.dim() == own.dim() == 1 and own.shape[0] % given.shape[0] == 0:
        return given.repeat(own.shape[0] // given.shape[0])
    return None


def load_backbone(folder: Path) -> Any:
    """Read one of our networks from its folder. Raises: ValueError where the folder is none of ours."""
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is no folder of a network: {error}") from error
    modules = {owner: module for module, owner in BACKBONES.items()}
    if name not in modules:
        raise ValueError(f"{folder} holds a {name}; there are: {', '.join(modules)}")
    return backbone_class(modules[name]).from_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="folder of the trained network")
    parser.add_argument(
        "target", type=Path, metavar="DST", help="folder to write, for `training.train --start DST`"
    )
    parser.add_argument("--mixer", required=True, help='the new mixer, such as "linear:heads=2,kernel=5"')
    parser.add_argument(
        "--load", default="", metavar="LETTERS", help="parts of the attention to keep, of qkvo"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights that start anew")
    given = parser.parse_args()
    torch.manual_seed(given.seed)
    student, report = inherit(load_backbone(given.source), load=given.load, mixer=given.mixer)
    student.save_pretrained(given.target)
    (given.target / "inherited.json").write_text(
        json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8"
    )
    print(f"{given.target}: {report}")


if __name__ == "__main__":
    main()
