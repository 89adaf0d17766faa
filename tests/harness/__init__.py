"""A real ComfyUI server for tests and the demo, and a client that talks to it as a browser does.

It is no part of `tests/server`, because ComfyUI has a module named `server`.
"""
