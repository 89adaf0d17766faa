"""Which layers are measured in which forward, if not all layers are measured in every one."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence


class Rotation:
    """Groups of layers that are measured in turns, every layer equally often.

    Each round goes through all layers once, in a new random order. In a fixed order, a layer might
    always be measured in the same step of a sampling, and its statistics would show only that step.
    """

    def __init__(self, names: Sequence[str], share: float, seed: int | None = None) -> None:
        """Take the layers, the share of them in a group, and a seed for a reproducible order.

        Raises:
            ValueError: the share is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"the share must be above 0 and at most 1, got {share}")
        self._names = list(names)
        self._groups = min(math.ceil(1 / share - 1e-9), max(1, len(self._names)))
        self._random = random.Random(seed)  # its own, so that other random numbers do not change
        self._waiting: list[list[str]] = []
        self._lock = threading.Lock()  # clones of a model on several GPUs run in threads

    def __len__(self) -> int:
        """Return the number of groups in a round."""
        return self._groups

    def next(self) -> list[str]:
        """Return the names of the next group."""
        with self._lock:
            if not self._waiting:
                order = self._random.sample(self._names, len(self._names))
                self._waiting = [order[start :: self._groups] for start in range(self._groups)]
            return self._waiting.pop()
