"""The error of model files."""

from __future__ import annotations


class ModelFileError(ValueError):
    """A model file cannot be used; the message names it and says why."""
