"""Models by name, folder or hub id; loaded once; what is refused is refused before it is opened."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from pipelines import catalog
from pipelines.catalog import Unavailable, card_of, digest_of, dtype_for, find, load, shipped
from pipelines.generate import generate
from pipelines.request import Request, RequestError
from pipelines.safe import ModelError

Folder = Callable[[str], Path]
Copy = Callable[..., Path]


def test_names_folders_and_hub_ids(tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for file in Path(tiny).iterdir():
        (tmp_path / "mine" / file.name).symlink_to(file)
    (tmp_path / "mine" / "card.json").write_text('{"title": "Mine", "steps": 7, "unheard of": 1}')
    monkeypatch.setattr(catalog, "CHECKPOINTS", tmp_path)
    assert find("mine").kind == "shipped"
    assert shipped()["mine"].steps == 7
    assert shipped()["mine"].more == {"unheard of": 1}
    assert find(tiny).kind == "folder"
    assert find("black-forest-labs/FLUX.1-dev").kind == "hub"
    strange = {
        "mien": "did you mean 'mine'",
        "no such thing": "no folder",
        "a/b/c": "no folder",
        "../x": "no folder",
    }
    for name, words in (strange | {"x" * 5000: "no|usable"}).items():
        with pytest.raises(ModelError, match=words):
            find(name)


def test_every_shipped_model_is_complete() -> None:
    for name, card in shipped().items():
        folder, _ = catalog.prepare(find(name))
        assert card.width, name
        assert card.license, name
        assert card.width % card.multiple == 0
        assert card.low <= card.width <= card.high
        assert digest_of(folder).startswith("sha256:")
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] in catalog.OWN


def test_a_model_is_loaded_once_and_has_one_lock(
    tiny: str, forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    inner = catalog._load
    monkeypatch.setattr(catalog, "_load", lambda *given: loads.append(given[2]) or inner(*given))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(load(tiny))) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(loads) == 1
    assert len({id(one) for one in found}) == 1
    assert found[0].lock is load(tiny).lock
    assert load(tiny, "bfloat16") is not found[0]
    load(tiny, "float16")
    assert load(tiny) is not found[0], "the model unused longest was let go"


def test_two_requests_at_once_wait_for_each_other(tiny: str) -> None:
    request = Request(prompt="a red cat", model=tiny, steps=3)
    alone = generate(request).report["pixels"]
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(generate(request).report["pixels"])) for _ in range(3)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == [alone] * 3


def test_a_digest_knows_one_changed_number(copy_of: Copy) -> None:
    folder = copy_of("ours")
    before = digest_of(folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest_of(folder) != before
    (folder / "card.json").write_text("{}")
    after = digest_of(folder)
    data[-1] ^= 1
    file.write_bytes(data)
    assert digest_of(folder) == before != after


def test_large_files_are_sampled_and_the_digest_says_so(
    copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "_FULL_DIGEST", 10)
    assert digest_of(copy_of("ours")).startswith("sampled:")


def test_sizes_are_known_before_weights_load(folder_of: Folder) -> None:
    multiples = {"ours": 8, "flux": 2, "sd3": 1, "pixart": 2, "sana": 2, "wan": 16, "lumina2": 16, "dit": 4}
    assert {name: card_of(folder_of(name), name).multiple for name in multiples} == multiples
    assert card_of(folder_of("ours"), "ours").width == 32
    assert card_of(folder_of("dit"), "dit").takes_class
    assert card_of(folder_of("wan"), "wan").task == "text-to-video"


def test_auto_dtype_and_device() -> None:
    card = catalog.Card(name="x", dtype="float32", more={"dtypes": {"cuda": "bfloat16"}})
    assert [dtype_for("auto", card, one) for one in ("cpu", "cuda", "cuda:1")] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]
    assert dtype_for("float16", card, "cpu") == "float16"
    with pytest.raises(Unavailable, match="not available"):
        catalog.device_for("cuda:99")


def test_broken_models_are_refused_in_one_sentence(copy_of: Copy, forgotten: None) -> None:
    folder = copy_of("ours")
    (folder / "transformer" / "config.json").write_text('{"_class_name": "MMDiT", "width": 33}')
    with pytest.raises(ModelError, match="could not be loaded") as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)
    single = folder / "codec" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ModelError, match="tensors and no pipeline"):
        load(str(single))
    single.write_bytes(b"\x80\x04\x95nonsense")
    with pytest.raises(ModelError, match="pickle"):
        generate(Request(prompt="a", model=str(folder)))
    assert not catalog._loaded


def test_a_pickle_is_never_opened(copy_of: Copy, tmp_path: Path, forgotten: None) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    folder = copy_of("flux")
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"):
        (folder / "transformer" / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(RequestError):
        generate(Request(prompt="a", model=str(folder)))
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(RequestError):
        generate(Request(prompt="a", model=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_are_left_alone(copy_of: Copy, forgotten: None) -> None:
    folder = copy_of("flux")
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04\x95nonsense")
    assert load(str(folder)).pipeline is not None


def hub(
    monkeypatch: pytest.MonkeyPatch, folder: Path | None, error: Exception | None = None
) -> list[dict[str, Any]]:
    asked: list[dict[str, Any]] = []

    def download(model: str, name: str, **_: Any) -> str:
        if error is not None:
            raise error
        return str(folder / name)  # type: ignore[operator]

    def snapshot(model: str, **given: Any) -> str:
        asked.append(given)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return asked


def test_from_a_hub_only_settings_and_safetensors_are_asked_for(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fnmatch import fnmatch

    asked = hub(monkeypatch, Path(tiny))
    result = generate(Request(prompt="a cat", model="someone/model", steps=2))
    assert result.ok
    assert result.request.model == "someone/model"

    def fetched(name: str) -> bool:
        wanted = any(fnmatch(name, pattern) for pattern in asked[0]["allow_patterns"])
        return wanted and not any(fnmatch(name, pattern) for pattern in asked[0]["ignore_patterns"])

    assert fetched("model_index.json")
    assert fetched("transformer/diffusion_pytorch_model-00001-of-00002.safetensors")
    assert fetched("transformer/diffusion_pytorch_model.safetensors.index.json")
    assert fetched("tokenizer/vocab.txt")
    for name in ("flux1-dev.safetensors", "transformer/pytorch_model.bin", "pipeline.py", "transformer/model.py", "x.ckpt",
                 "codec/model.pt", "text_encoder/model.fp16.safetensors", "other/model.safetensors"):  # fmt: skip
        assert not fetched(name), name


class Answer:
    """What the hub's library expects of a web answer."""

    headers: dict[str, str] = {}
    request = None
    status_code = 404


@pytest.mark.parametrize("kind", [LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError])
def test_without_a_network_one_sentence_says_so(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, None, kind("no route"))
    with pytest.raises(Unavailable, match="hub cannot be reached; connect, or give a folder"):
        generate(Request(prompt="a cat", model="someone/model"))


def test_what_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, words in (
        (RepositoryNotFoundError, "not on the hub"),
        (EntryNotFoundError, "no diffusers pipeline"),
    ):
        try:
            error = kind("missing", response=Answer())  # type: ignore[call-arg,arg-type]
        except TypeError:
            error = kind("missing")
        hub(monkeypatch, None, error)
        with pytest.raises(ModelError, match=words):
            load("someone/model")


def test_code_on_a_hub_is_refused_before_weights_are_fetched(
    copy_of: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of("dit")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    asked = hub(monkeypatch, folder)
    with pytest.raises(ModelError, match="custom pipeline code"):
        load("someone/model")
    assert not asked


def test_no_user_file_goes_through_torch_load() -> None:
    import ast

    root = Path(__file__).resolve().parents[2]
    for package in ("dit", "acceleration", "control", "pipelines"):
        for file in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called not in ("torch.load", "pickle.load", "pickle.loads", "eval", "exec"), (
                        f"{file}: {called}"
                    )
                    flags = [ast.unparse(one) for one in node.keywords if one.arg == "trust_remote_code"]
                    assert flags in ([], ["trust_remote_code=False"]), f"{file}: {flags}"
