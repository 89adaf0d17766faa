"""All that needs ComfyUI: loading, recording, exporting, nodes and the panel's routes.

Each folder is a room; its `__init__` says what belongs there and what it may import.
"""
