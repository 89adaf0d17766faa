"""Telling listeners that something a user may see has changed."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Call a function whenever anything changes that a user may see.

    From any thread, and while objects are collected: it must not wait, and must not raise.
    """
    _listeners.append(listener)


def changed() -> None:
    """Tell the listeners that recording, statistics, findings or models in memory are others."""
    for listener in _listeners:
        listener()
