"""Noticing new milestones where a node's inputs are links, whose values ComfyUI does not tell.

ComfyUI asks a node before every prompt what its result depends on, and gives None for what another
node will give. Once the node has run it is known what that was. So all nodes with links have one
answer: how often anything that any of them was made of has changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable


class Watch:
    """Counts the changes of what was looked at before."""

    def __init__(self) -> None:
        """Start with nothing to look at."""
        self._seen: dict[tuple, Hashable] = {}
        self._changes = 0

    def note(self, state: Callable[..., Hashable], *of: Hashable) -> None:
        """Look at something from now on; changed since it was looked at last, it counts.

        Args:
            state: gives what may change; one that raises has no state.
            of: its arguments.
        """
        key = (state, *of)
        try:
            now = state(*of)
        except (OSError, ValueError):  # a file that is gone
            now = None
        self._changes += self._seen.setdefault(key, now) != now
        self._seen[key] = now

    def changes(self) -> int:
        """Look at everything again, and return how many changes there were until now."""
        for key in list(self._seen):
            self.note(*key)
        return self._changes


watch = Watch()
