"""Sketches of a model's layers, wherever they lie: which layers share one, and their sums."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence

from ...calibration import Sketch


class Sketches(Mapping[str, Sketch]):
    """Layer name to Sketch. One is read or computed when it is asked for, and not kept.

    `sketches[name]` raises KeyError where there is none that can be used.
    """

    @abc.abstractmethod
    def key(self, name: str) -> Hashable:
        """Return what is equal for layers that share a sketch, None where a layer has none."""

    @abc.abstractmethod
    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""

    def close(self) -> None:
        """Let go of the files; nothing is read from then on."""

    def groups(self) -> dict[Hashable, list[str]]:
        """Return the layers of every sketch."""
        found: dict[Hashable, list[str]] = {}
        for name in self:
            found.setdefault(self.key(name), []).append(name)
        return found

    def get(self, name: str, default: Sketch | None = None) -> Sketch | None:
        """Return a layer's sketch, the default where it has none."""
        try:
            return self[name]
        except KeyError:
            return default


class Recorded(Sketches):
    """Sketches in memory."""

    def __init__(self, sketches: Mapping[str, Sketch]) -> None:
        """Take them."""
        self._sketches = sketches

    def __getitem__(self, name: str) -> Sketch:
        return self._sketches[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)

    def key(self, name: str) -> Hashable:
        """Return which object it is."""
        return id(self._sketches[name]) if name in self._sketches else None

    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""
        return self._sketches[name].matrix.shape[1]


class Total(Sketches):
    """Sums of several; layers share a sketch where they do in all of them.

    Two layers have the same Sketch object as long as somebody holds it.
    """

    def __init__(self, parts: Sequence[Sketches]) -> None:
        """Take what to add up.

        Raises:
            ValueError: a layer has different input channels in them.
        """
        self._parts = list(parts)
        self._names = dict.fromkeys(name for part in self._parts for name in part)
        self._alive: weakref.WeakValueDictionary[Hashable, Sketch] = weakref.WeakValueDictionary()
        for name in self._names:
            sizes = {part.channels(name) for part in self._parts if name in part}
            if len(sizes) > 1:
                raise ValueError(f"the sketches of layer {name!r} have {sorted(sizes)} channels")

    def __getitem__(self, name: str) -> Sketch:
        key = self.key(name)
        sketch = self._alive.get(key)
        if sketch is None:
            found = [part.get(name) for part in self._parts if name in part]
            usable = [one for one in found if one is not None]
            if not usable:
                raise KeyError(name)
            sketch = usable[0]
            for other in usable[1:]:
                sketch = sketch.merge(other)
            self._alive[key] = sketch
        return sketch

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        """Let go of the parts' files."""
        for part in self._parts:
            part.close()

    def key(self, name: str) -> Hashable:
        """Return the keys in all parts."""
        return tuple(part.key(name) for part in self._parts) if name in self._names else None

    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""
        return next(part.channels(name) for part in self._parts if name in part)
