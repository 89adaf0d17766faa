"""Noticing new milestones for nodes whose inputs are links.

Before every prompt, ComfyUI asks a node for a value that changes when the node should run again. An
input that comes from another node is None at that time, so that the node cannot look at its
statistics. But when the node ran before, it knew the input. So all nodes with links share one
answer: how many changes there were of anything that such a node has used before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable


class Watch:
    """Counts the changes of states that nodes have used."""

    def __init__(self) -> None:
        """Start without states."""
        self._seen: dict[tuple, Hashable] = {}
        self._changes = 0

    def note(self, state: Callable[..., Hashable], *arguments: Hashable) -> None:
        """Watch a state from now on. If it was watched before and has changed, count that.

        Args:
            state: returns the state; if it raises OSError or ValueError, the state is None.
            arguments: of `state`.
        """
        key = (state, *arguments)
        try:
            now = state(*arguments)
        except (OSError, ValueError):  # e.g. a file that was removed
            now = None
        self._changes += self._seen.setdefault(key, now) != now
        self._seen[key] = now

    def changes(self) -> int:
        """Look at all states again, and return how many changes there were until now."""
        for key in list(self._seen):
            self.note(*key)
        return self._changes


watch = Watch()
