"""Who may come in: tokens and their owners, a name with a password, signed sessions; wrong tries are counted by address.

Differs: gradio's own login takes any number of tries, as its guide says.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import Path

TRIES, TRIES_IN = 5, 60.0
"""Wrong tries from one address within so many seconds, after which nothing is compared until they are over."""
ADDRESSES = 10_000
"""Most addresses whose tries are remembered; the oldest go first."""
SESSION_SECONDS = 7 * 86_400.0
TOKEN_LENGTH = 16
"""Fewest characters of a token."""
FILE_LIMIT = 1_000_000

_OWNER = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_TOKEN = re.compile(r"[\x21-\x7e]{1,512}\Z")


class AddressError(ValueError):
    """An address, a password or a token file that nothing will be served with, in words."""


class Throttle:
    """Count wrong tries by address, and refuse to look at more of them for a while."""

    def __init__(
        self, tries: int = TRIES, seconds: float = TRIES_IN, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tries, self._seconds, self._clock = tries, seconds, clock
        self._wrong: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def attempt(self, address: str, right: Callable[[], bool]) -> bool | None:
        """Return whether a try is right; None, without looking at it, where too many were wrong."""
        with self._lock:
            now, place = self._clock(), _place(address)
            wrong = self._wrong.get(place, deque(maxlen=self._tries))
            if len(wrong) == self._tries and now - wrong[0] < self._seconds:
                return None
            if right():
                return True
            wrong.append(now)
            self._wrong[place] = wrong
            self._wrong.move_to_end(place)
            while len(self._wrong) > ADDRESSES:
                self._wrong.popitem(last=False)
            return False


class Login:
    """Check a name and password in constant time; after five wrong ones within a minute, refuse until the minute is over."""

    def __init__(self, pair: str, clock: Callable[[], float] = time.monotonic) -> None:
        name, colon, password = pair.partition(":")
        if not (name and colon and len(password) >= 8):
            raise AddressError(
                "LEAPFROG_AUTH must be name:password, with a password of at least 8 characters"
            )
        self.owner = name if _OWNER.match(name) else "owner"
        self._pair = (name.encode(), password.encode())
        self._throttle = Throttle(clock=clock)

    def __call__(self, name: str, password: str) -> bool:
        return bool(self._throttle.attempt("", lambda: self.right(name, password)))

    def right(self, name: str, password: str) -> bool:
        """Compare both, whatever the first comparison says; the tries are not counted here."""
        same = [hmac.compare_digest(a, b.encode()) for a, b in zip(self._pair, (name, password), strict=True)]
        return all(same)


class Keys:
    """Tokens and who holds them. Only digests are kept in memory.

    Raises:
        AddressError: no tokens, a token too short or given twice, or an owner's name with other than letters, digits, - and _.
    """

    def __init__(self, owners: Mapping[str, str]) -> None:
        if not owners:
            raise AddressError("no tokens are given; write one line `NAME TOKEN` for each person")
        for token, owner in owners.items():
            if not _OWNER.match(owner):
                raise AddressError(
                    f"{owner[:80]!r} is no name of an owner: letters, digits, - and _, at most 64"
                )
            if len(token) < TOKEN_LENGTH or not _TOKEN.match(token):
                raise AddressError(
                    f"the token of {owner} must have {TOKEN_LENGTH} to 512 visible characters; make one with:"
                    ' python -c "import secrets; print(secrets.token_urlsafe(32))"'
                )
        self._digests = [(_digest(token), owner) for token, owner in owners.items()]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file of lines `NAME TOKEN`; empty lines and those that start with # are left out. Raises: AddressError."""
        owners: dict[str, str] = {}
        try:
            with path.open("rb") as file:
                text = file.read(FILE_LIMIT).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise AddressError(f"the token file {path} cannot be read ({error})") from None
        for number, line in enumerate(text.splitlines(), 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[1] in owners:
                reason = "is not `NAME TOKEN`" if len(words) != 2 else "repeats a token"
                raise AddressError(f"line {number} of the token file {path} {reason}")
            owners[words[1]] = words[0]
        return cls(owners)

    def owner(self, token: str) -> str | None:
        """Return who holds a token; every one is compared, in constant time."""
        given, found = _digest(token), None
        for digest, owner in self._digests:
            if hmac.compare_digest(digest, given):
                found = owner
        return found


def readable_by_others(path: Path) -> bool:
    """Whether other users of this computer may read a file."""
    try:
        return bool(path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))
    except OSError:
        return False


class Sessions:
    """Signed cookies that say who somebody is; a new secret at every start, so a restart asks for the token again."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._secret, self._clock = secrets.token_bytes(32), clock

    def issue(self, owner: str) -> str:
        """Return the value of a cookie for an owner."""
        text = f"{owner}.{int(self._clock() + SESSION_SECONDS)}.{secrets.token_urlsafe(9)}"
        return f"{text}.{self._signature(text)}"

    def issue_new(self) -> tuple[str, str]:
        """Return a new random owner, and the value of its cookie."""
        owner = f"session-{secrets.token_hex(16)}"
        return owner, self.issue(owner)

    def owner(self, cookie: str) -> str | None:
        """Return whose cookie it is; None for one that is not ours, or too old."""
        text, _, signature = cookie.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(text).encode()):
            return None
        owner, expires, _ = text.split(".")
        return owner if int(expires) > self._clock() else None

    def _signature(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _place(address: str) -> str:
    """Return what tries are counted by: the address, or the network of 64 bits that one holder of IPv6 addresses has."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(known, ipaddress.IPv6Address) and known.ipv4_mapped is None:
        return str(ipaddress.ip_network((known, 64), strict=False))
    return str(known)
