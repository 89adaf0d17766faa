"""Layers that a user wants in 16 bit by name, beside those that a selection keeps."""

from __future__ import annotations

from ..engine.model_structure import detect
from ..files.model_file import ModelFile

FIRST, LAST = "first", "last"
ENDS = f"{FIRST}, {LAST}"
"""The default of loaders and export: the projections from the latent and back to it.

They have 0.02% of a model's weights or less, and decide more about a picture than any other layer.
"""


def also_kept(text: str, file: ModelFile) -> frozenset[str]:
    """Return the layers that a text names.

    Args:
        text: names of layers, with commas between them. "first" and "last" are the first and the
            last projection, whatever the model calls them. It may be empty.
        file: of the model.

    Raises:
        ValueError: the model has no layer of a name.
        ModelFileError: ComfyUI does not know the model.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        return frozenset()
    structure = detect(file)
    ends = {FIRST: structure.first, LAST: structure.last}
    unknown = [word for word in words if word not in ends and word not in structure.layers]
    if unknown:
        raise ValueError(f"also_keep names {unknown[0]!r}, and {file.name} has no such layer")
    # A model whose ends are not told from other layers keeps none for it.
    return frozenset(filter(None, (ends.get(word, word) for word in words)))
