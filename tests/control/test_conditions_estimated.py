"""Depth and poses by tiny local models; folders that hold none are refused in words."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from control.base import Refused
from control.conditions import (
    Depth,
    Pose,
    condition_of,
    read_picture,
)

_place = importlib.util.spec_from_file_location("pictures", Path(__file__).with_name("pictures.py"))
assert _place is not None
assert _place.loader is not None
pictures = importlib.util.module_from_spec(_place)
_place.loader.exec_module(pictures)
scene = pictures.scene

def depth_folder(folder: Path) -> Path:
    """A tiny random depth model as transformers saves one."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False, use_auxiliary_head=False,
    )  # fmt: skip
    DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessor(size={"height": 32, "width": 32}, do_pad=False).save_pretrained(folder)
    return folder


def test_depth_by_a_local_model(tmp_path: Path) -> None:
    folder = depth_folder(tmp_path / "depth")
    picture = read_picture(scene())
    found = condition_of(Depth(estimator=str(folder)), picture)
    assert found.shape == picture.shape
    assert found.max() - found.min() > 0.5
    assert np.array_equal(found, condition_of(Depth(estimator=str(folder)), picture))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Refused, match=r"pytorch_model\.bin can run code"):
        Depth(estimator=str(folder)).made(picture)


def test_pose_by_a_local_model(tmp_path: Path) -> None:
    from transformers import (
        VitPoseBackboneConfig,
        VitPoseConfig,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    torch.manual_seed(0)
    backbone = VitPoseBackboneConfig(
        image_size=[32, 24], patch_size=[8, 8], hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        out_indices=[2],
    )  # fmt: skip
    VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17)).eval().save_pretrained(
        tmp_path
    )
    VitPoseImageProcessor(size={"height": 32, "width": 24}).save_pretrained(tmp_path)
    picture = read_picture(scene())
    found = condition_of(Pose(estimator=str(tmp_path), threshold=0.0, line=0.05), picture)
    assert found.shape == picture.shape
    assert len(np.unique(found.reshape(-1, 3), axis=0)) > 3, "limbs have colours"
    with pytest.raises(Refused, match="found nothing"):
        condition_of(Pose(estimator=str(tmp_path), threshold=1.0), picture)


def test_estimators_that_are_none_are_refused_in_words(tmp_path: Path) -> None:
    picture = read_picture(scene())
    with pytest.raises(Refused, match=r"depth:estimator=FOLDER.*raw=true"):
        condition_of(Depth(), picture)
    with pytest.raises(Refused, match="must be a folder"):
        condition_of(Pose(estimator=str(tmp_path / "none")), picture)
    with pytest.raises(Refused, match=r"config\.json"):
        condition_of(Depth(estimator=str(tmp_path)), picture)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(Refused, match="code of its own"):
        condition_of(Depth(estimator=str(tmp_path)), picture)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(Refused, match="could not be loaded"):
        condition_of(Depth(estimator=str(tmp_path)), picture)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(Refused, match="whole diffusers pipeline"):
        condition_of(Depth(estimator=str(tmp_path)), picture)
