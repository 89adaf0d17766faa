"""What ComfyUI loads: the list of nodes, and the start of recording."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from server import PromptServer

from .host.folders import register_folder
from .jobs.leftovers import sweep_folders
from .nodes import NODES
from .panel.events import StatusEvents
from .panel.routes import add_routes, status
from .recording.recorder import recorder


class HSWQExtension(ComfyExtension):
    """The extension's entry into ComfyUI."""

    async def on_load(self) -> None:
        """Make the statistics folder known and start recording."""
        register_folder()
        sweep_folders()
        recorder.follow_settings()
        server = PromptServer.instance
        server.add_on_prompt_handler(_follow_settings)
        add_routes(server)
        StatusEvents(server, status).start()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return the nodes."""
        return NODES


def _follow_settings(prompt: dict) -> dict:
    """Let recording follow the settings; the prompt goes on as it is."""
    recorder.follow_settings()
    return prompt
