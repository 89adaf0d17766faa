"""Sketches of a model's layers, in memory or in files: which layers share one, and sums."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence

from ...calibration import Sketch


class Sketches(Mapping[str, Sketch]):
    """Maps layer name to Sketch. A sketch is read or computed when it is asked for, and not kept.

    `sketches[name]` raises KeyError if there is none, or it is damaged.
    """

    @abc.abstractmethod
    def key(self, name: str) -> Hashable:
        """Return a key that is equal for layers that share a sketch; None for a layer without."""

    def __contains__(self, name: object) -> bool:
        """Whether there is a sketch of a layer, which may be damaged: none is read for it."""
        return self.key(name) is not None

    @abc.abstractmethod
    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""

    def close(self) -> None:
        """Close the files; nothing can be read after that."""

    def groups(self) -> dict[Hashable, list[str]]:
        """Return the names of the layers that share each sketch, by its key."""
        found: dict[Hashable, list[str]] = {}
        for name in self:
            found.setdefault(self.key(name), []).append(name)
        return found

    def get(self, name: str, default: Sketch | None = None) -> Sketch | None:
        """Return a layer's sketch, or the default if it has none."""
        try:
            return self[name]
        except KeyError:
            return default


class Recorded(Sketches):
    """Sketches in memory."""

    def __init__(self, sketches: Mapping[str, Sketch]) -> None:
        """Take the sketches by layer name."""
        self._sketches = sketches

    def __getitem__(self, name: str) -> Sketch:
        return self._sketches[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sketches)

    def __len__(self) -> int:
        return len(self._sketches)

    def key(self, name: str) -> Hashable:
        """Return the id of the layer's Sketch object."""
        return id(self._sketches[name]) if name in self._sketches else None

    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""
        return self._sketches[name].matrix.shape[1]


class Total(Sketches):
    """Sums of several Sketches. Layers share a sketch if they share one in all of the parts.

    Such layers get the same Sketch object, for as long as somebody holds it.
    """

    def __init__(self, parts: Sequence[Sketches]) -> None:
        """Take the parts to add up.

        Raises:
            ValueError: a layer has different numbers of input channels in two parts.
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
        """Close the parts' files."""
        for part in self._parts:
            part.close()

    def key(self, name: str) -> Hashable:
        """Return the layer's keys in all parts."""
        return tuple(part.key(name) for part in self._parts) if name in self._names else None

    def channels(self, name: str) -> int:
        """Return the input channels of a layer's sketch."""
        return next(part.channels(name) for part in self._parts if name in part)
