"""A choice from a compiled list, as people write it: ``js``, ``alpha(0.5)``.

`divergences` and `baselines` are such lists: names, ranges and meanings are stated once, in C++,
and read here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Choice", "describe", "nearest", "parse", "read", "write"]

_TEXT = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(\s*([^()]*?)\s*\))?\s*")


@dataclass(frozen=True)
class Choice:
    """One row of a compiled list.

    Attributes:
        id: its place in the list, which is what kernels know it by.
        name: how people write it.
        default: of its parameter; None if it takes none.
        low, high: the parameter must lie strictly between them.
        meaning: one line.
    """

    id: int
    name: str
    default: float | None
    low: float
    high: float
    meaning: str


def read(rows: Sequence[Mapping[str, Any]]) -> dict[str, Choice]:
    """The choices by name, from the rows of ``_C.divergences()`` or ``_C.baselines()``."""
    return {
        row["name"]: Choice(
            id=id,
            name=row["name"],
            default=row["default"] if row["takes_param"] else None,
            low=row["low"],
            high=row["high"],
            meaning=row["meaning"],
        )
        for id, row in enumerate(rows)
    }


def parse(
    text: str, choices: Mapping[str, Choice], *, kind: str, plural: str
) -> tuple[Choice, float | None]:
    """The choice that ``text`` names, and its parameter (None if it takes none).

    Raises:
        ValueError: the text is not ``name`` or ``name(number)``, the name is not in the list (the
            message has the nearest one), or the parameter is not in its range.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ValueError(f"{kind}: expected a name or name(number), got {text!r}")
    name, argument = match.groups()
    if name not in choices:
        near = nearest(name, choices)
        hint = f" Did you mean {near!r}?" if near else ""
        raise ValueError(f"{kind}: unknown {name!r}.{hint} Known {plural}: {', '.join(choices)}")
    choice = choices[name]
    if argument is None:
        return choice, choice.default
    if choice.default is None:
        raise ValueError(f"{kind}: {name} takes no parameter, got {text!r}")
    try:
        param = float(argument)
    except ValueError:
        raise ValueError(f"{kind}: expected a number in {name}(...), got {argument!r}") from None
    if not choice.low < param < choice.high:
        raise ValueError(f"{kind}: the parameter of {name} must be {_range(choice)}, got {param:g}")
    return choice, param


def nearest(name: str, names: Mapping[str, object] | Sequence[str]) -> str | None:
    """The one of ``names`` that looks most like ``name``, if any does."""
    found = difflib.get_close_matches(name.lower(), list(names), n=1, cutoff=0.5)
    return found[0] if found else None


def write(name: str, param: float | None) -> str:
    """``name`` or ``name(param)``; `parse` reads it back exactly."""
    return name if param is None else f"{name}({param!r})"


def describe(choices: Mapping[str, Choice]) -> str:
    """One line per choice, for ``--help``."""
    signatures = {
        name: name if c.default is None else f"{name}({c.default:g})" for name, c in choices.items()
    }
    width = max(len(s) for s in signatures.values())
    return "\n".join(f"{signatures[n]:<{width}}  {c.meaning}" for n, c in choices.items())


def _range(choice: Choice) -> str:
    if math.isinf(choice.low) and math.isinf(choice.high):
        return "finite"
    return f"strictly between {choice.low:g} and {choice.high:g}"
