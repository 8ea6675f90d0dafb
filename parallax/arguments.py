"""Options of a command line: a word that is none is refused by name, never taken for a path. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from parallax.errors import ConfigError

__all__ = ["close_to", "suggestion", "take_options"]


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean --json? `, or nothing if no known word comes close."""
    close = get_close_matches(word, list(known), n=1)
    return f"did you mean {close[0]}? " if close else ""


def close_to(word: str, known: Iterable[str]) -> str:
    """The same for the end of a sentence: `; did you mean --json?`."""
    found = suggestion(word, known)
    return f"; {found.rstrip()}" if found else ""


def take_options(
    argv: Sequence[str], command: str, names: Sequence[str] = (), flags: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Options and the rest. names: those with a value, as `--name value` or `--name=value`; flags: those without.

    Raises ConfigError for a word with a dash in front that is none of them, for one given twice, for a missing value.
    """
    known = (*names, *flags)
    options: dict[str, str] = {}
    rest: list[str] = []
    left = list(argv)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            rest.append(word)
            continue
        name, equals, value = word.partition("=")
        if name not in known:
            there = f"there are {', '.join(known)}" if len(known) > 1 else f"there is {known[0]}" if known else "none"
            raise ConfigError(f"{name} is no option of {command}{close_to(name, known) or f'; {there}'}")
        if name in options:
            raise ConfigError(f"{name} is given twice; keep one")
        if name in flags and equals:
            raise ConfigError(f"{name} takes no value; write {name}")
        if name in names and not equals and not left:
            raise ConfigError(f"{name} has no value; write {name} VALUE")
        options[name] = value if equals or name in flags else left.pop(0)
    return options, rest
