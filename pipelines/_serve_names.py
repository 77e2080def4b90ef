"""Names from outside: of files, which are never paths, and of computers, which somebody may only pretend to ask for."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipelines._serve_keys import AddressError
from pipelines.request import RequestError

_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}\Z")


def loopback(host: str) -> bool:
    """Whether only this computer can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def address(
    host: str | None, auth: bool, spaces: bool = False, how: str = "set LEAPFROG_AUTH=name:password"
) -> str:
    """Return the address to bind to: this computer alone, unless there is a password or a Space around it.

    Args:
        how: what a person does to set a password or tokens, for the message.

    Raises:
        AddressError: other computers could reach what is served, and nothing is asked of them.
    """
    if spaces:
        return host or "0.0.0.0"
    host = host or "127.0.0.1"
    if not (auth or loopback(host)):
        raise AddressError(
            f"{host} can be reached by other computers, and no password is set; {how}, or leave --host out"
        )
    return host


@dataclass(frozen=True, slots=True)
class Hosts:
    """The names that something is served under. An address in digits is one too where other computers may come:
    no name of a stranger can be bound to it by a trick with DNS.
    """

    names: frozenset[str] = frozenset({"127.0.0.1", "localhost", "[::1]"})
    addresses: bool = False

    @classmethod
    def of(cls, host: str, more: Iterable[str] = ()) -> Hosts:
        """Return the names for an address to bind to, and those that a person added."""
        names = {*cls().names, host.lower(), *(one.lower() for one in more)}
        if loopback(host):
            return cls(frozenset(names))
        return cls(frozenset({*names, socket.gethostname().lower()}), addresses=True)

    def __contains__(self, name: object) -> bool:
        return name in self.names or (self.addresses and _digits(str(name)))


def inside(root: Path, name: str) -> Path:
    """Return the file of this name in a folder. A name is letters, digits, dot, - and _; it is never a path.

    Raises:
        RequestError: another name, a link, or no file of this name.
    """
    stem = name.partition(".")[0].lower()
    if not _NAME.match(name) or name.endswith(".") or ".." in name or stem in _RESERVED:
        raise RequestError("file", name, "the plain name of a file: letters, digits, dot, - and _, no path")
    return within(root, root / name)


def word(name: str) -> bool:
    """Whether a name is one plain word, and no device of Windows."""
    return _WORD.match(name) is not None and name.lower() not in _RESERVED


def within(root: Path, path: Path) -> Path:
    """Return a path after checking that it is a file, no link, and lies in a folder. Raises: RequestError."""
    try:
        whole = path.resolve(strict=True)
        if path.is_symlink() or not whole.is_file() or not whole.is_relative_to(root.resolve(strict=True)):
            raise RequestError("file", path.name, "a file in the folder that is served, and no link")
    except (OSError, ValueError, RuntimeError):
        raise RequestError("file", path.name, "a file that is there") from None
    return whole


def _digits(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
