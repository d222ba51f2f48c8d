"""Errors for people: what was wrong, where, what is allowed, the nearest right name."""

import difflib
from collections.abc import Iterable


class OneLine(BaseException):
    """What a notebook shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"{type(self).__name__}: {self}"]


class HealingError(OneLine, ValueError):
    """Input that cannot be used. The message is one line, meant to be shown without a traceback."""


class Unwritable(HealingError):
    """A result that cannot be kept, for a full disk say: there is no use in computing the next."""


class Stopped(OneLine, KeyboardInterrupt):
    """An interrupt while cells are computed."""


def first_line(error: BaseException) -> str:
    """What an error says in one line, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    by_lower = {str(a).lower(): str(a) for a in allowed}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.5)
    return by_lower[found[0]] if found else None


def choose(name: str, allowed: Iterable[str], what: str) -> str:
    """Return `name` if it is allowed, else raise a HealingError that names the nearest one; `what`
    says what is being chosen, for example ``"kind of corruption"``."""
    allowed = list(allowed)
    if name in allowed:
        return name
    guess = nearest(name, allowed)
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise HealingError(f"unknown {what} {name!r}; allowed: {', '.join(map(str, allowed))}.{hint}")
