"""Refusing values that a node's linked input may bring: ComfyUI checks only those of widgets."""

from __future__ import annotations

from collections.abc import Collection

_MAX_SHOWN = 40  # characters


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a value that is not one of some texts.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        shown = repr(value)[:_MAX_SHOWN]
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {shown}")
