"""Checks of user settings: each error says what was given and what was expected."""

import math
import numbers
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import numpy as np

FEW = 5  # names that are listed of many


def check_flags(**flags: Any) -> None:
    """Refuses anything but True and False: "no" would count as true.

    Raises:
        TypeError: If a flag is anything else; the message names it.
    """
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: Any, least: int) -> None:
    """Refuses anything but an int of at least ``least``.

    Raises:
        ValueError, TypeError: If it is anything else; the message names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_seed(seed: Any) -> None:
    """Refuses seeds that torch's random generators do not accept.

    Raises:
        ValueError, TypeError: If it is not an int, or is outside [-2^63, 2^64).
    """
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed must be an int, got {seed!r}")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"seed must be in [-2^63, 2^64), got {seed}")


def check_share(name: str, value: Any) -> None:
    """Refuses anything but a fraction in (0, 1].

    Raises:
        ValueError, TypeError: If it is anything else; the message names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, a fraction in (0, 1], got {value!r}")
    if not (0 < float(value) <= 1):
        raise ValueError(f"{name} must be a fraction in (0, 1], got {value}")


def check_size(name: str, value: Any) -> None:
    """Refuses anything but a finite number that is not negative.

    Raises:
        ValueError, TypeError: If it is anything else; the message names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def nearest(name: object, known: Iterable[str]) -> str:
    """The known names for an error's text: those that look like the wrong one, or the first few."""
    names = list(map(str, known))
    if alike := get_close_matches(str(name), names, n=3, cutoff=0.6):
        return f"did you mean {' or '.join(alike)}?"
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return f"known: {', '.join(names[:FEW]) or 'none'}{more}"
