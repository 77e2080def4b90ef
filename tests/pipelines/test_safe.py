"""What is loaded is decided by content: lying headers, pickles in disguise and code are refused before anything opens them."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipelines.catalog import OWN
from pipelines.request import RequestError
from pipelines.safe import TENSOR_LIMIT, ModelError, check_folder, check_weights

Copy = Callable[..., Path]
ONE = {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def written(path: Path, header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def test_real_weights_pass(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt"})
    header = check_weights(tmp_path / "w.safetensors")
    assert header.parameters == 3 * 5 + 7 + 1
    assert header.tensors["b"][:2] == ("BF16", (7,))


def test_a_header_length_that_looks_like_a_pickle_passes(tmp_path: Path) -> None:
    raw = json.dumps(ONE).encode()
    raw += b" " * (0x0280 - len(raw))  # the file starts with 80 02, as a pickle does
    assert check_weights(written(tmp_path / "w.safetensors", raw)).parameters == 4


LIES: dict[str, tuple[Any, bytes, int | None]] = {
    "empty header": (b"", b"", None),
    "length beyond the file": (ONE, b"\0" * 16, 10_000),
    "length beyond the limit": (ONE, b"\0" * 16, 2**40),
    "length of all ones": (ONE, b"\0" * 16, 2**64 - 1),
    "not JSON": (b"{ not json", b"", None),
    "a list": (b"[1, 2, 3]", b"", None),
    "deeply nested": (b'{"a":' * 100_000, b"", None),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", None),
    "a name twice": (b'{"w":' + json.dumps(ONE["w"]).encode() + b',"w":' + json.dumps(ONE["w"]).encode() + b"}", b"\0" * 16, None),
    "data cut off": (ONE, b"\0" * 15, None),
    "data too long": (ONE, b"\0" * 17, None),
    "range larger than the shape": ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 16]}}, b"\0" * 16, None),
    "shape larger than the range": ({"w": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 16]}}, b"\0" * 16, None),
    "overlap": (
        {n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in "ab"}, b"\0" * 16, None
    ),
    "gap": (ONE | {"v": {"dtype": "F32", "shape": [2], "data_offsets": [20, 28]}}, b"\0" * 28, None),
    "range backwards": ({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}}, b"\0" * 16, None),
    "negative shape": ({"w": {"dtype": "F32", "shape": [-2, -2], "data_offsets": [0, 16]}}, b"\0" * 16, None),
    "shape of text": ({"w": {"dtype": "F32", "shape": "22", "data_offsets": [0, 16]}}, b"\0" * 16, None),
    "unknown type": ({"w": {"dtype": "PICKLE", "shape": [2, 2], "data_offsets": [0, 16]}}, b"\0" * 16, None),
    "an extra key": ({"w": ONE["w"] | {"code": "x"}}, b"\0" * 16, None),
    "too many tensors": (
        {str(i): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(TENSOR_LIMIT + 1)}, b"", None
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused(lie: str, tmp_path: Path) -> None:
    header, data, length = LIES[lie]
    with pytest.raises(ModelError, match="no valid safetensors") as caught:
        check_weights(written(tmp_path / "w.safetensors", header, data, length))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["model.safetensors", "Model.SafeTensors", "weights.bin"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_refused_whatever_its_name(name: str, protocol: int, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"weight": list(range(1000))}, protocol=protocol))
    with pytest.raises(ModelError, match=r"pickle.*safetensors"):
        check_weights(tmp_path / name)


def test_a_torch_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert zipfile.is_zipfile(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="pickle checkpoint"):
        check_weights(tmp_path / "model.safetensors")


def test_saved_folders_pass(folder_of: Copy) -> None:
    for name in ("ours", "flux", "wan", "dit"):
        assert check_folder(folder_of(name), OWN)["_class_name"]


def refused(folder: Path, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        check_folder(folder, OWN)
    assert isinstance(caught.value, RequestError)
    assert caught.value.field == "model"


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path, "is no model")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(tmp_path, "pickled weights")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "one part of a model only")
    (tmp_path / "model_index.json").write_text("not json")
    refused(tmp_path, "not readable JSON")
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "names no pipeline class")


def test_pickled_weights_alone_are_refused(copy_of: Copy) -> None:
    folder = copy_of("flux")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(folder, "transformer.*pickled weights")


def test_a_pickle_renamed_inside_a_folder_is_refused(copy_of: Copy) -> None:
    folder = copy_of("ours")
    (folder / "codec" / "diffusion_pytorch_model.safetensors").write_bytes(pickle.dumps([1, 2, 3]))
    refused(folder, "pickle checkpoint")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_code_is_refused(copy_of: Copy) -> None:
    folder = copy_of("dit")
    change(folder / "model_index.json", _class_name=["my_pipeline", "MyPipeline"])
    refused(folder, "custom pipeline code")
    change(folder / "model_index.json", _class_name="DiTPipeline", transformer=["my_model", "MyModel"])
    refused(folder, r"transformer needs the code my_model\.MyModel")
    change(folder / "model_index.json", transformer=["os", "system"])
    refused(folder, r"code os\.system")
    change(folder / "model_index.json", transformer=["dit.text", "MMDiT"])
    refused(folder, r"code dit\.text")
    change(folder / "model_index.json", transformer=["diffusers", "DiTTransformer2DModel"])
    (folder / "transformer" / "diffusers.py").write_text("raise SystemExit")
    refused(folder, "never run")


def test_kernels_from_a_hub_are_refused(copy_of: Copy) -> None:
    folder = copy_of("flux")
    change(folder / "text_encoder" / "config.json", attn_implementation="someone/kernel")
    refused(folder, "code from a hub")


@pytest.mark.parametrize(
    "shard", ["../../other.safetensors", "weights.bin", "/etc/passwd", "..\\x.safetensors", 5]
)
def test_a_list_of_weight_files_stays_inside(shard: Any, copy_of: Copy) -> None:
    folder = copy_of("ours")
    listed = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    listed.write_text(json.dumps({"weight_map": {"w": shard}}))
    refused(folder, "lists the weight file")


def test_a_missing_part_and_an_outside_part(copy_of: Copy) -> None:
    folder = copy_of("dit")
    change(
        folder / "model_index.json",
        vae=["diffusers", "AutoencoderKL"],
        **{"../x": ["diffusers", "AutoencoderKL"]},
    )
    refused(folder, "plain words")
    folder = copy_of("ours")
    (folder / "codec").rename(folder / "moved")
    refused(folder, "codec is missing")
