"""Checks of the numbers and keys of a drawing, whose messages name them."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np


def check_number(value: object, name: str, minimum: float = -math.inf, maximum: float = math.inf) -> None:
    """Makes sure that a value is a finite number from `minimum` to `maximum`.

    Raises:
        ValueError: it is not; names it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        number = float(cast("float", value))
    except OverflowError:  # a whole number too large for a float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum:g}, got {number:g}")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum:g}, got {number:g}")


def suggest(name: object, known: Sequence[str]) -> str:
    """What someone who wrote `name` may have meant, as the end of a message; empty if nothing is like it."""
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def check_keys(fields: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Makes sure that a JSON object has no other keys than the known ones.

    Raises:
        ValueError: it has; names the key, and the known key that is most like it or all of them.
    """
    for key in fields:
        if key not in known:
            hint = suggest(key, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
