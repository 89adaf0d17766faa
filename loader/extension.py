"""The extension as ComfyUI loads it: the list of nodes; starting the recording and the panel."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .host import selfcheck
from .host.events import on_change, on_progress
from .host.folders import register_folder
from .nodes import nodes_of


class HSWQExtension(ComfyExtension):
    """The entry that ComfyUI calls. Parts that need names which this ComfyUI lacks stay off."""

    async def on_load(self) -> None:
        """Register the statistics folder, and start the recording and the panel."""
        self._parts, off = selfcheck.working()
        if off is not None:
            logging.warning("HSWQ %s", off)
        register_folder()
        server = PromptServer.instance
        if selfcheck.QUANTIZING in self._parts:
            _sweep()
        if selfcheck.RECORDING in self._parts:
            _start_recording(server)
        if selfcheck.PANEL in self._parts:
            _start_panel(server)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes."""
        return nodes_of(self._parts)


def _sweep() -> None:
    from .jobs.leftovers import sweep_folders

    sweep_folders()


def _start_recording(server: PromptServer) -> None:
    from .files.whole_hash import background
    from .recording.recorder import recorder

    def follow_settings(prompt: dict) -> dict:
        """Turn recording on or off as the settings say; return the prompt unchanged."""
        recorder.follow_settings()
        return prompt

    background.busy = lambda: server.prompt_queue.get_tasks_remaining() > 0
    recorder.follow_settings()
    server.add_on_prompt_handler(follow_settings)


def _start_panel(server: PromptServer) -> None:
    from .panel.events import PROGRESS, StatusEvents
    from .panel.routes import add_routes, progress, status

    add_routes(server)
    on_change(StatusEvents(server, status).changed)
    on_progress(StatusEvents(server, progress, PROGRESS).changed)
