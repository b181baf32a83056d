"""Inputs of nodes as INPUT_TYPES lists them: (type, options), each with its tooltip."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Input = tuple[str | list[str], dict[str, Any]]


def wire(kind: str, tooltip: str) -> Input:
    """An input that only another node can give, such as a MODEL."""
    return kind, {"tooltip": tooltip}


def choice(names: Iterable[str], tooltip: str, **options: Any) -> Input:
    """A menu; without a `default` its first name is chosen."""
    return list(names), {**options, "tooltip": tooltip}


def integer(default: int, low: int, high: int, tooltip: str, **options: Any) -> Input:
    """A whole number within low..high."""
    return "INT", {"default": default, "min": low, "max": high, **options, "tooltip": tooltip}


def real(default: float, low: float, high: float, step: float, tooltip: str, **options: Any) -> Input:
    """A floating-point number within low..high; the arrows change it by `step`."""
    return "FLOAT", {"default": default, "min": low, "max": high, "step": step, **options, "tooltip": tooltip}


def problem_of(check: Callable[..., Any], *values: Any) -> str | None:
    """The sentence of the ValueError that a check raises, or None: for VALIDATE_INPUTS."""
    try:
        check(*values)
    except ValueError as error:
        return str(error)
    return None


def text(tooltip: str, multiline: bool = True, **options: Any) -> Input:
    """A text, empty at first."""
    return "STRING", {"default": "", "multiline": multiline, **options, "tooltip": tooltip}
