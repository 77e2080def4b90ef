"""A result: pictures, the request behind them and the report of the run; saved whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.metadata import FRAMES_JSON, KEY, file_text
from pipelines.request import WITHHELD, Request, RequestError, model_name
from pipelines.video_files import FORMATS, FPS, LOSSY, encode

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipelines.catalog import Card

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORDS = {
    errno.EROFS: "the folder is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
    errno.ENOTDIR: "part of the path is a file",
    errno.ENOENT: "the folder does not exist",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EEXIST: "the file is there already, and nothing is overwritten unless asked for",
    errno.EISDIR: "a folder is in its place, which is not replaced",
}


class SaveError(OSError):
    """A file that could not be saved, in one sentence; nothing torn was left. `full` tells whether the disk was full."""

    def __init__(self, path: Path, cause: OSError) -> None:
        self.full = cause.errno in _FULL
        reason = (
            "the disk is full" if self.full else _WORDS.get(cause.errno or 0, cause.strerror or str(cause))
        )
        super().__init__(cause.errno, f"{path} was not saved: {reason}")

    def __str__(self) -> str:
        return str(self.strerror)


@dataclasses.dataclass(frozen=True, slots=True)
class Picture:
    """One picture, or the frames of one clip, with the request that makes it alone and its own report."""

    frames: tuple[Image, ...]
    request: Request
    report: dict[str, Any]

    @property
    def image(self) -> Image:
        """The picture; of a clip the first frame."""
        return self.frames[0]

    def png(self) -> bytes:
        """Return the file: a PNG (of a clip an animated PNG), lossless, with request and report inside."""
        from PIL.PngImagePlugin import PngInfo

        info, text = PngInfo(), file_text(self.request, self.report)
        if text is not None:
            info.add_text(KEY, text)
            info.add_itxt("parameters", self._line())
        buffer = io.BytesIO()
        more: dict[str, Any] = {}
        if len(self.frames) > 1:
            fps = float(self.report.get("effective", {}).get("fps") or FPS)
            more = {"save_all": True, "append_images": self.frames[1:], "duration": 1000 / fps, "loop": 0}
        self.image.save(buffer, format="PNG", pnginfo=info, **more)
        return buffer.getvalue()

    @property
    def preview(self) -> Image:
        """The picture; of a clip the frame in its middle."""
        return self.frames[len(self.frames) // 2]

    def file(self, ending: str) -> bytes | dict[str, bytes]:
        """Return the file in the format of an ending of `pipelines.video_files.FORMATS`; of a folder all its files by name."""
        text = file_text(self.request, self.report)
        if ending == ".frames":
            names = (f"{index:04d}.png" for index in range(len(self.frames)))
            told = {} if text is None else {FRAMES_JSON: text.encode()}
            return {name: _png(one) for name, one in zip(names, self.frames, strict=False)} | told
        if ending in LOSSY:
            fps = float(self.report.get("effective", {}).get("fps") or FPS)
            return encode(self.frames, ending, fps, text or "")
        return self.png()

    def _line(self) -> str:
        request, effective = self.request, self.report.get("effective", {})
        told = {
            "Steps": effective.get("steps"),
            "Sampler": effective.get("scheduler"),
            "CFG scale": effective.get("guidance"),
            "Seed": request.seed,
            "Size": f"{self.image.width}x{self.image.height}",
            "Model": model_name(request.model),
            "Accelerators": "; ".join(map(str, request.accelerators)) or "none (exact)",
        }
        lines = [request.words]
        lines += [f"Negative prompt: {request.negative_prompt}"] if request.negative_prompt else []
        if request.metadata != "full":
            lines = [WITHHELD]
        return "\n".join(
            [*lines, ", ".join(f"{key}: {value}" for key, value in told.items() if value is not None)]
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What `generate` returns. `report` tells of the whole run, `pictures[i].report` of one picture."""

    pictures: tuple[Picture, ...]
    request: Request
    report: dict[str, Any]

    @property
    def images(self) -> list[Image]:
        """The pictures; of a clip its first frame."""
        return [one.image for one in self.pictures]

    @property
    def clips(self) -> list[list[Image]]:
        """The frames of every clip; a picture is a clip of one frame."""
        return [list(one.frames) for one in self.pictures]

    @property
    def ok(self) -> bool:
        """Whether every picture holds something: no NaN, not one colour all over."""
        return not self.report.get("failures")

    def save(
        self, path: str | Path | None = None, *, overwrite: bool = False, draft: bool = False
    ) -> list[Path]:
        """Save every picture as PNG with a JSON file of the same name beside it, unless its request asks for no metadata.

        Args:
            path: a file, of a clip also one that ends in .mp4, .gif or .frames (a folder of PNG frames), more pictures
                get -1, -2, ...; a folder, or None for the current folder; in a folder names are made
                of the prompt and the seed, and numbered so that nothing is replaced.
            overwrite: replace files that are there; otherwise they are an error.
            draft: only the bytes need to outlive a loss of power, not the names: they will be renamed.

        Returns:
            The pictures' paths. Each file is whole when its name appears: written under another name, flushed, renamed.

        Raises:
            SaveError: the disk is full, the folder read-only, a file there already, ...
        """
        start = time.perf_counter()
        paths = self._paths(None if path is None else Path(path).expanduser())
        for target in paths if not overwrite else ():
            for one in (target, target.with_suffix(".json")):
                if one.exists():
                    raise SaveError(one, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))
        for picture, target in zip(self.pictures, paths, strict=True):
            text = file_text(picture.request, picture.report)
            made = picture.file(target.suffix.lower())
            if isinstance(made, dict):
                write_folder(target, made, overwrite=overwrite, draft=draft)
            else:
                write_file(target, made, overwrite=overwrite, draft=draft)
            if text is not None:
                write_file(target.with_suffix(".json"), text.encode(), overwrite=overwrite, draft=draft)
        self.report.setdefault("timings", {})["save"] = time.perf_counter() - start
        return paths

    def _paths(self, path: Path | None) -> list[Path]:
        if path is None or (path.is_dir() and path.suffix.lower() not in FORMATS):
            found: list[Path] = []
            for picture in self.pictures:
                found.append(_free(path or Path(), f"{_slug(picture.request)}-{picture.request.seed}", found))
            return found
        return _named(path, len(self.pictures))


def _named(path: Path, pictures: int) -> list[Path]:
    """Return the files of so many pictures under one name."""
    path = path if path.suffix.lower() in FORMATS else path.with_name(path.name + ".png")
    if pictures == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{i + 1}{path.suffix}") for i in range(pictures)]


def write_file(path: Path, data: bytes, *, overwrite: bool = False, draft: bool = False) -> None:
    """Write a file so that it is whole or not there: other name, flush, fsync, rename, fsync of the folder.

    Args:
        draft: leave out the last one; the caller renames the file, and synchronises the folder of its final name.

    Raises:
        SaveError: with the reason; what was written so far is removed.
    """
    other = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        try:
            handle = os.open(other, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(
                    file.fileno()
                )  # the bytes: a name that outlives a loss of power must not be that of a torn file
            _publish(other, path, overwrite)
        finally:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                other.unlink()
        if not draft:
            sync_folder(path.parent)  # the name
    except OSError as error:
        raise SaveError(path, error) from error


def write_folder(
    path: Path, files: dict[str, bytes], *, overwrite: bool = False, draft: bool = False
) -> None:
    """Write a folder of files so that it is whole or not there; one to be replaced must hold nothing else than such files.

    Args:
        draft: as `write_file`.

    Raises:
        SaveError: with the reason; what was written so far is removed.
    """
    other = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        try:
            other.mkdir()
            for name, data in files.items():
                write_file(other / name, data, draft=True)
            sync_folder(other)  # the names in it, once for all of them
            if path.exists():
                if not overwrite or not _own_folder(path):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
                old = other.with_suffix(".old")
                path.rename(old)
                other.rename(path)
                shutil.rmtree(old)
            else:
                other.rename(path)
        finally:
            shutil.rmtree(other, ignore_errors=True)
        if not draft:
            sync_folder(path.parent)
    except OSError as error:
        raise error if isinstance(error, SaveError) else SaveError(path, error) from error


def _own_folder(path: Path) -> bool:
    return path.is_dir() and all(re.fullmatch(r"\d+\.png|request\.json", one.name) for one in path.iterdir())


def _png(frame: Image) -> bytes:
    buffer = io.BytesIO()
    frame.save(buffer, format="PNG")
    return buffer.getvalue()


def pixel_hash(frames: tuple[Image, ...] | list[Image]) -> str:
    """Return a digest of pixels and sizes alone; equal pictures have equal digests, whatever the file says around them."""
    found = hashlib.sha256()
    for frame in frames:
        rgb = frame.convert("RGB")
        found.update(f"{rgb.width}x{rgb.height}\0".encode())
        found.update(rgb.tobytes())
    return f"sha256:{found.hexdigest()}"


def _publish(other: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(other, path)
        return
    try:
        os.link(other, path)  # unlike a rename it fails where the name is taken
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.rename(other, path)  # file systems without hard links


def sync_folder(folder: Path) -> None:
    """Put a folder's names safely on the disk, where the system can. Raises: OSError."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _slug(request: Request) -> str:
    if request.metadata != "full":  # a name is told as well
        return "picture"
    return re.sub(r"[^a-z0-9]+", "-", request.words.lower()).strip("-")[:40].strip("-") or "picture"


def _free(folder: Path, stem: str, taken: list[Path]) -> Path:
    for number in range(1, 100_000):
        path = folder / (f"{stem}.png" if number == 1 else f"{stem}-{number}.png")
        if path not in taken and not path.exists() and not path.with_suffix(".json").exists():
            return path
    raise SaveError(folder / f"{stem}.png", FileExistsError(errno.EEXIST, "all numbers are taken"))


def check_ending(path: Path | None, card: Card) -> None:
    """Check before the work that a model makes what a file's ending says. Raises: RequestError."""
    ending = "" if path is None else path.suffix.lower()
    if ending in FORMATS and ending != ".png" and card.task != "text-to-video":
        raise RequestError(
            "output",
            str(path),
            f"a file that ends in .png: {card.name} makes still pictures, and this is for clips",
        )


def check_target(path: Path | None, *, overwrite: bool = False, pictures: int = 1) -> None:
    """Check before the work that so many pictures can be saved at `path` (a file, a folder, None for the current one).

    Raises:
        SaveError: the file is there already, or nothing can be written in its folder.
    """
    path = Path() if path is None else path
    inside = path.is_dir() and path.suffix.lower() not in FORMATS
    folder = path if inside else path.parent
    for target in () if inside else _named(path, pictures):
        for one in (target, target.with_suffix(".json")):
            if one.exists() and not overwrite:
                raise SaveError(one, FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)))
            if one.is_dir() and not (one.suffix.lower() == ".frames" and _own_folder(one)):
                raise SaveError(one, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    trial = folder / f".leapfrog-{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        with trial.open("xb"):
            pass
        trial.unlink()
    except OSError as error:
        raise SaveError(path, error) from error
