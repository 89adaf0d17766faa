"""The merge node: it adds up statistics that several machines have recorded."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from ..store.merge import ALL, folders, gather
from .inputs import CATEGORY, line


class HSWQMergeStatistics(io.ComfyNode):
    """Adds up the statistics files of a folder, into one file for each model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQMergeStatistics",
            display_name="HSWQ Merge Statistics",
            category=CATEGORY,
            description="Adds up statistics files that other machines recorded, into one file for "
            "each model, which the loaders then use. Run it again when the files have grown: "
            "nothing counts twice.",
            search_aliases=["render farm", "collect statistics", "calibration"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folders(),
                    default=ALL,
                    tooltip="A folder below models/hswq with the other machines' files, of any "
                    "names. all: every file there that is not a session yet.",
                ),
                io.String.Input(
                    "session",
                    default="merged",
                    tooltip="The new file's session. The file is written anew each time.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_) -> float:
        """Run every time: the files may have grown."""
        return float("nan")

    @classmethod
    def execute(cls, folder: str, session: str) -> io.NodeOutput:
        written, left_out = gather(folder, session)
        parts = [
            f"{one.samples} images of {one.files} file{'s' * (one.files > 1)} in {one.path.name}"
            for one in written
        ]
        parts += [f"left out {name}: {reason}" for name, reason in left_out.items()]
        text = "; ".join(parts)
        logging.info("HSWQ: %s", text)
        return io.NodeOutput(ui=line(text))
