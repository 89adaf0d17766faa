"""What HSWQ needs of ComfyUI itself: version, folders, settings, and events.

May import ComfyUI, and nothing else of HSWQ.
"""
