"""The models on this computer: shipped, opened by a person, or downloaded; described, checked, fetched and put away.

What was opened and downloaded is remembered in the folder of the job ledger; downloads lie there too, and are all that is ever
removed, into a trash folder beside them.

Differs: a hub is asked only by `offer` and `Download`, which a person starts; nothing is fetched before licence and size were told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from pipelines import catalog
from pipelines.catalog import Card, Unavailable
from pipelines.request import RequestError
from pipelines.safe import ModelError, check_folder, check_weights, components, read_index, weight_files

RESERVE = 500_000_000
"""Bytes that stay free on the disk after a download."""
_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}\Z")
_LEFT_OUT = ("*.fp16.*", "*.bf16.*", "*.non_ema.*", "*.py", "*.bin", "*.msgpack")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a model: state is present, missing or elsewhere (of a package of its own); bytes of its weights."""

    name: str
    kind: str
    state: str
    bytes: int = 0
    dtypes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What is known of a model without loading it; `refused` says why it would not be loaded."""

    name: str
    title: str
    source: str
    pipeline: str
    license: str
    parts: tuple[Part, ...]
    bytes: int
    parameters: int
    digest: str
    refused: str = ""
    folder: Path | None = None

    @property
    def dtypes(self) -> str:
        """Number formats of the weights."""
        return ", ".join(dict.fromkeys(one for part in self.parts for one in part.dtypes)) or "unknown"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What a hub has under a name: the commit, the licence, and the files that would be fetched, with their bytes."""

    model: str
    commit: str
    license: str
    files: tuple[tuple[str, int], ...]
    free: int

    @property
    def bytes(self) -> int:
        """Size of the download."""
        return sum(count for _, count in self.files)

    @property
    def fits(self) -> bool:
        """Whether there is room on the disk, and some to spare."""
        return self.bytes + RESERVE <= self.free


class Hub(Protocol):
    """What is asked of a hub."""

    def about(self, model: str) -> tuple[str, str, dict[str, int]]:
        """Return commit, licence, and the sizes of all files. Raises: ModelError, Unavailable."""

    def get(self, model: str, commit: str, file: str, folder: Path) -> None:
        """Fetch a file to its place inside a folder. Raises: ModelError, Unavailable."""


class HuggingFace:
    """The hub that the library huggingface_hub asks."""

    def about(self, model: str) -> tuple[str, str, dict[str, int]]:
        """Return commit, licence, and the sizes of all files."""
        import huggingface_hub as hub

        with _told(model):
            found = hub.HfApi().model_info(model, files_metadata=True)
        card: Any = found.card_data or {}
        words = card.get("license_name") or card.get("license") or ""
        told = next((tag.partition(":")[2] for tag in found.tags or () if tag.startswith("license:")), "")
        sizes = {one.rfilename: int(one.size or 0) for one in found.siblings or ()}
        return str(found.sha), str(words or told), sizes

    def get(self, model: str, commit: str, file: str, folder: Path) -> None:
        """Fetch a file to its place inside a folder."""
        import huggingface_hub as hub

        with _told(model):
            hub.hf_hub_download(model, file, revision=commit, local_dir=folder)


class Library:
    """The models that a person has here.

    Args:
        place: where the list, downloads and the trash lie; by default beside the job ledger.
        hub: who is asked for models; by default the one of huggingface_hub.
    """

    def __init__(self, place: Path | None = None, hub: Hub | None = None) -> None:
        if place is None:
            from pipelines.jobs import default_ledger

            place = default_ledger().parent
        self.place, self.hub = place, hub or HuggingFace()
        self.models, self.trash = place / "models", place / "trash"
        self._lock = threading.RLock()

    def cards(self) -> dict[str, Card]:
        """Return the cards of what was opened or downloaded and can be used, by the name to ask for it."""
        found = {}
        for folder, told in self._folders().items():
            try:
                card = catalog.prepare(catalog.find(folder))[1]
            except (RequestError, OSError):
                continue  # it is told among the models, not on the way to a picture
            found[folder] = dataclasses.replace(card, title=card.title or told.get("model") or Path(folder).name)
        return found

    def names(self) -> list[str]:
        """Return the names of all models here, also of those that are refused: shipped ones first."""
        return [*catalog.shipped(), *self._folders()]

    def open(self, path: str) -> tuple[str, Card]:
        """Check a model folder and remember it; return its name and card. Raises: ModelError."""
        source = catalog.find(path.strip())
        if source.kind == "hub" or source.folder is None:
            raise ModelError(path, "is no folder on this computer; give the whole path of a model's folder")
        card = catalog.prepare(source)[1]
        if source.kind == "folder":
            told = self._told()
            if str(source.folder) not in self._folders():
                self._write(told | {"opened": [*told["opened"], str(source.folder)]})
            return str(source.folder), dataclasses.replace(card, name=str(source.folder), title=card.title or source.folder.name)
        return source.model, card

    def forget(self, name: str) -> None:
        """Take an opened folder from the list; its files stay. Raises: ModelError."""
        told = self._told()
        if name not in told["opened"]:
            raise ModelError(name, "was not opened here")
        self._write(told | {"opened": [one for one in told["opened"] if one != name]})

    def remove(self, name: str) -> Path:
        """Move a download into the trash folder and return where it lies. Raises: ModelError for all else."""
        told, folder = self._told(), Path(name)
        if folder.name not in told["downloaded"] or folder != self.models / folder.name:
            raise ModelError(name, "was not downloaded here, so it is not removed; delete it by hand")
        self.trash.mkdir(parents=True, exist_ok=True)
        target = self.trash / f"{folder.name}-{time.time_ns()}"
        if folder.exists():
            folder.rename(target)
        left = {one: about for one, about in told["downloaded"].items() if one != folder.name}
        self._write(told | {"downloaded": left})
        return target

    def removable(self, name: str) -> bool:
        """Whether a model was downloaded here."""
        return Path(name).parent == self.models and Path(name).name in self._told()["downloaded"]

    def describe(self, name: str) -> Described:
        """Return what is known of a model, from its settings and the headers of its weights. Raises: ModelError: not here."""
        source = catalog.find(name)
        if source.folder is None:
            raise ModelError(name, "is not on this computer")
        folder, refused, index = source.folder, "", dict[str, Any]()
        try:
            index = check_folder(folder, catalog.OWN)
        except ModelError as error:
            refused = str(error)
            try:
                index = read_index(folder)
            except ModelError:
                pass
        card = catalog.card_of(folder, name) if index else Card(name=name)
        parts = tuple(_part(folder, part, *kind) for part, kind in components(index).items())
        origin = {"shipped": "shipped"}.get(source.kind, "downloaded" if self.removable(name) else "opened")
        told = self._folders().get(name, {})
        headers = [_header(file) for file in weight_files(folder)]
        return Described(
            name=name, title=card.title or told.get("model") or folder.name, source=origin, refused=refused,
            pipeline=str(index.get("_class_name", "unknown")), license=card.license or told.get("license", ""), parts=parts,
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            parameters=sum(count for _, count, _ in headers), digest="" if refused else _digest(name), folder=folder,
        )  # fmt: skip

    def offer(self, model: str) -> Offer:
        """Ask the hub what it has under a name. Raises: ModelError: none, or one that is refused. Unavailable: no network."""
        model = model.strip()
        if not _ID.match(model) or ".." in model:
            raise ModelError(model, "is no hub id; one looks like organisation/name")
        commit, licence, sizes = self.hub.about(model)
        if "model_index.json" not in sizes:
            raise ModelError(model, "is no diffusers pipeline (no model_index.json on the hub); choose one that is")
        place = self.models / f".{_plain(model)}.index"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            self.hub.get(model, commit, "model_index.json", place)
            parts = [name for name, (library, _) in components(read_index(place)).items() if library is not None]
        finally:
            shutil.rmtree(place, ignore_errors=True)
        files = tuple((name, count) for name, count in sorted(sizes.items()) if _wanted(name, parts))
        if not any(name.endswith(".safetensors") for name, _ in files):
            raise ModelError(model, "holds no safetensors; other weights are not opened, choose a model that has some")
        free = shutil.disk_usage(self.models).free
        return Offer(model=model, commit=commit, license=licence, files=files, free=free)

    def keep(self, offer: Offer, part: Path) -> str:
        """Check a fetched folder and put it among the models; return its name. Raises: ModelError; then nothing stays."""
        target = self.models / _plain(offer.model)
        try:
            shutil.rmtree(part / ".cache", ignore_errors=True)
            check_folder(part, catalog.OWN)
            with self._lock:
                if target.exists():
                    self.trash.mkdir(parents=True, exist_ok=True)
                    target.rename(self.trash / f"{target.name}-{time.time_ns()}")
                part.rename(target)
                told = self._told()
                about = {"model": offer.model, "commit": offer.commit, "license": offer.license}
                self._write(told | {"downloaded": told["downloaded"] | {target.name: about}})
        except ModelError as error:
            raise ModelError(offer.model, error.allowed) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return str(target)

    def _folders(self) -> dict[str, dict[str, str]]:
        """Return the folders that were opened or downloaded, and what is noted of them."""
        told = self._told()
        found = {one: dict[str, str]() for one in told["opened"] if Path(one).is_dir()}
        return found | {str(self.models / one): about for one, about in told["downloaded"].items()}

    def _told(self) -> dict[str, Any]:
        try:
            found = json.loads((self.place / "models.json").read_bytes())
            opened, downloaded = found["opened"], found["downloaded"]
            if all(isinstance(one, str) for one in opened) and isinstance(downloaded, dict):
                return {"opened": list(opened), "downloaded": downloaded}
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return {"opened": [], "downloaded": {}}

    def _write(self, told: Mapping[str, Any]) -> None:
        from pipelines.result import write_file

        self.place.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(self.place / "models.json", json.dumps(told).encode(), overwrite=True)


class Download:
    """A download in a thread of its own: `state` is running, done, stopped or failed; `name` is the model's in the end."""

    def __init__(self, library: Library, offer: Offer) -> None:
        self.library, self.offer = library, offer
        self.state, self.error, self.name = "running", "", ""
        self._stopped = threading.Event()
        self._part = library.models / f".{_plain(offer.model)}.part"
        self._thread = threading.Thread(target=self._run, name="leapfrog-download", daemon=True)

    def start(self) -> Download:
        """Begin. Raises: RequestError where there is too little room."""
        if not self.offer.fits:
            raise RequestError("disk", f"{self.offer.free / 1e9:.1f} GB free", f"{(self.offer.bytes + RESERVE) / 1e9:.1f} GB free")
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask it to end after the file that is being fetched; nothing of it stays."""
        self._stopped.set()

    def join(self, seconds: float) -> None:
        """Wait for its end."""
        self._thread.join(seconds)

    @property
    def fetched(self) -> int:
        """Bytes that are here so far."""
        try:
            return sum(file.stat().st_size for file in self._part.rglob("*") if file.is_file())
        except OSError:  # it is being moved just now
            return 0

    def _run(self) -> None:
        offer, part = self.offer, self._part
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for file, _ in offer.files:
                if self._stopped.is_set():
                    self.state = "stopped"
                    return
                self.library.hub.get(offer.model, offer.commit, file, part)
            self.name = self.library.keep(offer, part)
            self.state = "done"
        except (RequestError, Unavailable, OSError) as error:
            self.error, self.state = str(error), "failed"
        except Exception as error:  # noqa: BLE001 - a thread has nobody to raise to
            self.error, self.state = f"the download failed ({type(error).__name__})", "failed"
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _part(folder: Path, name: str, library: str | None, kind: str | None) -> Part:
    if library is None:
        return Part(name=name, kind="of a package of its own, or not needed", state="elsewhere")
    place = folder / name
    headers = [_header(file) for file in sorted(place.glob("*.safetensors"))] if place.is_dir() else []
    dtypes = Counter[str]()
    for _, _, kinds in headers:
        dtypes.update(kinds)
    whole = place.is_dir() and any(file.is_file() for file in place.iterdir())
    return Part(
        name=name, kind=f"{library}.{kind}", state="present" if whole else "missing",
        bytes=sum(count for count, _, _ in headers), dtypes=tuple(one for one, _ in dtypes.most_common()),
    )  # fmt: skip


def _header(file: Path) -> tuple[int, int, Counter[str]]:
    """Return bytes, count of numbers and dtypes of a weight file; of one that is refused, its bytes alone."""
    try:
        found = check_weights(file)
    except ModelError:
        return file.stat().st_size, 0, Counter()
    return found.size, found.parameters, Counter(dtype for dtype, _, _, _ in found.tensors.values())


def _digest(name: str) -> str:
    from pipelines.jobs import digests_of

    return digests_of({"model": name}).get(name, "")


def _wanted(file: str, parts: list[str]) -> bool:
    """Whether a file of a hub belongs to a model: settings and safetensors of its parts, never code."""
    path = PurePosixPath(file)
    if file == "model_index.json":
        return True
    if len(path.parts) != 2 or path.parts[0] not in parts or any(fnmatch.fnmatch(file, one) for one in _LEFT_OUT):
        return False
    return any(fnmatch.fnmatch(path.name, one) for one in catalog._HUB_FILES)


def _plain(model: str) -> str:
    return model.replace("/", "--")


@contextlib.contextmanager
def _told(model: str) -> Iterator[None]:
    """Turn the hub's errors into ours."""
    import httpx
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(model, "asks for its terms to be accepted on the hub; do that, then run hf auth login") from None
    except errors.RepositoryNotFoundError:
        raise ModelError(model, "is not on the hub, or asks for a login; check the name, or run hf auth login") from None
    except errors.OfflineModeIsEnabled:
        raise Unavailable("the hub is not asked while HF_HUB_OFFLINE is set; start without it to download") from None
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise Unavailable(f"the hub cannot be reached for {model}; connect, and try again") from error
