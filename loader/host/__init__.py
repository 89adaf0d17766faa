"""The contact with ComfyUI itself: its version and names, folders, settings, and events.

May import ComfyUI, and nothing else of HSWQ.
"""
