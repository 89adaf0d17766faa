"""Layers that a user keeps in 16 bit by name, in addition to those that a selection keeps."""

from __future__ import annotations

from ..engine.model_structure import detect
from ..files.model_file import ModelFile

FIRST, LAST = "first", "last"
ENDS = f"{FIRST}, {LAST}"
"""Default of loaders and export: the projections from the latent and back to it.

They have at most 0.02% of a model's weights, and affect the picture more than any other layer.
"""


def also_kept(text: str, file: ModelFile) -> frozenset[str]:
    """Return the layers that a text names.

    Args:
        text: names of layers, separated by commas. "first" and "last" stand for the projections
            from the latent and back to it, whatever the model calls them. It may be empty.
        file: of the model.

    Raises:
        ValueError: the model has no layer with one of the names.
        ModelFileError: ComfyUI does not know the model.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        return frozenset()
    structure = detect(file)
    ends = {FIRST: structure.first, LAST: structure.last}
    unknown = [word for word in words if word not in ends and word not in structure.layers]
    if unknown:
        raise ValueError(f"also_keep names {unknown[0]!r}, but {file.name} has no such layer")
    # If a projection cannot be identified, "first" or "last" keeps nothing.
    return frozenset(filter(None, (ends.get(word, word) for word in words)))
