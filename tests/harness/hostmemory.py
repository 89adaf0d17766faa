"""What a process takes of the host's memory, beyond the files that it maps."""

from __future__ import annotations

import threading
import time
from pathlib import Path


def anonymous(process: int | str = "self") -> int:
    """Return a process's anonymous memory in bytes, as Linux tells it."""
    lines = Path(f"/proc/{process}/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


class PeakMemory:
    """Largest growth of this process's anonymous memory in a block.

    Attributes:
        bytes: known once the block has ended.
    """

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._start = anonymous()
        self._running = True
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            self.bytes = max(self.bytes, anonymous() - self._start)
            time.sleep(0.001)
