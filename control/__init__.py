"""Learned ways to steer; one method a file. `methods()` names them; the files register themselves when they are imported."""

from control._files import load
from control._memory import Memory
from control.base import (
    Control,
    ControlAdapter,
    ControlReport,
    ControlRun,
    Refused,
    Untouched,
    Use,
    controlled,
    frozen,
    refusal,
)

__all__ = [
    "Control",
    "ControlAdapter",
    "ControlReport",
    "ControlRun",
    "Memory",
    "Refused",
    "Untouched",
    "Use",
    "controlled",
    "frozen",
    "load",
    "methods",
    "refusal",
]


def methods() -> dict[str, type[Control]]:
    """Return every way to steer by its name; imports all files of this package."""
    from control._files import import_all
    from dit.spec import kinds

    import_all()
    return kinds(Control)
