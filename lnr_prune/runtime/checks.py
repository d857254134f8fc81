"""Checks of user settings: each error says what was given and what was expected."""

import math
import numbers
from typing import Any

import numpy as np


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
