"""What goes wrong with model files."""

from __future__ import annotations


class ModelFileError(ValueError):
    """A model file cannot be used; the message names it and what is wrong."""
