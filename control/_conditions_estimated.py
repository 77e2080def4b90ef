"""Depth and pose, by an estimator that lies in a folder of this computer: a transformers model with its image processor.

Nothing is fetched, no code of a folder is run, and weights are safetensors alone; without a folder it is refused in words.

Paper: Vision Transformers for Dense Prediction; Ranftl, Bochkovskiy, Koltun; 2021; arXiv:2103.13413 (depth). ViTPose: Simple
    Vision Transformer Baselines for Human Pose Estimation; Xu, Zhang, Zhang, Tao; 2022; arXiv:2204.12484 (pose).
Differs: models that tell distances are turned round, so that near is white for every model; a pose is that of one person, who
    fills the picture.
"""

from __future__ import annotations

import colorsys
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np

from control._conditions import Array, Condition, image_of, resized
from control._conditions_regions import distance_to
from control.base import Refused
from dit.spec import knob, spec

_DISTANCES = ("glpn", "zoedepth", "depth_pro")  # these tell how far a place is, the others how near
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Joints of the COCO people, as pairs that a limb connects.
_LIMBS = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10), (1, 2), (0, 1),
    (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip


@spec("depth")
class Depth(Condition):
    """How near each place is, the nearest white."""

    about = "How near each place is (needs an estimator)"
    instruction = "Generate image from depth map"

    estimator: str | None = knob(default=None, label="Folder of a depth model (transformers, safetensors)")

    def made(self, picture: Array) -> Array:
        import torch

        folder = _folder(self.name, self.estimator)
        model, processor = _loaded(folder, "AutoModelForDepthEstimation", _marks(folder))
        inputs = processor(images=image_of(picture), return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).predicted_depth[0].float().numpy()
        if not np.isfinite(found).all():
            raise Refused(
                f"{self.name}: the estimator in {folder.name} gave values that are no finite numbers"
            )
        config = model.config
        metric = getattr(config, "depth_estimation_type", None) == "metric" or config.model_type in _DISTANCES
        near = -found if metric else found
        low, high = float(near.min()), float(near.max())
        near = (near - low) / (high - low) if high > low else np.zeros_like(near)
        return resized(near.astype(np.float32), picture.shape[1], picture.shape[0])


@spec("pose")
class Pose(Condition):
    """The limbs of one person as coloured lines on black."""

    about = "The limbs of a person (needs an estimator)"
    instruction = "Generate image from human pose skeleton"

    estimator: str | None = knob(default=None, label="Folder of a pose model (transformers, safetensors)")
    threshold: float = knob(default=0.3, label="Least certainty of a joint", low=0.0, high=1.0)
    line: float = knob(default=0.012, label="Width of a limb, of the longer side", low=0.001, high=0.2)

    def made(self, picture: Array) -> Array:
        import torch

        folder = _folder(self.name, self.estimator)
        model, processor = _loaded(folder, "AutoModelForPoseEstimation", _marks(folder))
        height, width = picture.shape[:2]
        boxes = [[[0.0, 0.0, float(width), float(height)]]]
        inputs = processor(images=image_of(picture), boxes=boxes, return_tensors="pt")
        if getattr(model.config.backbone_config, "num_experts", 1) > 1:
            inputs["dataset_index"] = torch.zeros(len(inputs["pixel_values"]), dtype=torch.long)  # 0: COCO
        with torch.no_grad():
            found = processor.post_process_pose_estimation(model(**inputs), boxes=boxes)[0][0]
        joints = found["keypoints"].numpy()[:, ::-1]
        return limbs(
            joints, found["scores"].numpy() >= self.threshold, height, width, self.line * max(height, width)
        )


def limbs(joints: Array, seen: Array, height: int, width: int, line: float) -> Array:
    """Draw joints [J, 2] (row, column) that are seen [J] as a skeleton: [H, W, 3], a colour for each limb."""
    drawn = np.zeros((height, width, 3), dtype=np.float32)
    rows, columns = np.mgrid[0:height, 0:width]
    for place, (one, two) in enumerate(_LIMBS):
        if max(one, two) < len(joints) and seen[one] and seen[two]:
            colour = colorsys.hsv_to_rgb(place / len(_LIMBS), 1.0, 1.0)
            drawn[distance_to(rows, columns, joints[one], joints[two]) <= max(line / 2, 0.5)] = colour
    return drawn


def _folder(name: str, estimator: str | None) -> Path:
    """Check an estimator's folder before anything in it is loaded."""
    if estimator is None:
        raise Refused(
            f"{name} is estimated by a network, and none is shipped: give {name}:estimator=FOLDER, a transformers model with its "
            f"preprocessor_config.json, or give a finished {name} picture with raw=true"
        )
    folder = Path(estimator).expanduser()
    if not folder.is_dir():
        raise Refused(f"{name}: estimator must be a folder of this computer, got {estimator}")
    if (folder / "model_index.json").is_file():
        raise Refused(
            f"{name}: {folder.name} is a whole diffusers pipeline; give the folder of a transformers model"
        )
    try:
        config = json.loads((folder / "config.json").read_bytes())
        json.loads((folder / "preprocessor_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name}: {folder.name} must hold a readable config.json and preprocessor_config.json ({error})"
        ) from None
    if not isinstance(config, dict) or "auto_map" in config:
        raise Refused(f"{name}: {folder.name} needs code of its own, which is never run")
    if not list(folder.glob("*.safetensors")):
        pickled = [file.name for file in folder.iterdir() if file.suffix in _PICKLED]
        more = f" ({pickled[0]} can run code and is not opened; convert it to safetensors)" if pickled else ""
        raise Refused(f"{name}: {folder.name} holds no .safetensors{more}")
    return folder


def _marks(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of the folder does."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=2)
def _loaded(folder: Path, kind: str, marks: Any) -> tuple[Any, Any]:
    """Load a model and its processor; kept until a file of the folder changes."""
    import transformers

    try:
        model = getattr(transformers, kind).from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
        processor = transformers.AutoImageProcessor.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        words = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise Refused(f"the estimator in {folder.name} could not be loaded ({words})") from error
    return model.eval(), processor
