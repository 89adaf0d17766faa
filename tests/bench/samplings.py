"""Memory and hooks after many recorded samplings, against after ten."""

import common

chosen = common.arguments(
    __doc__,
    size={"type": int, "default": 128},
    count={"type": int, "default": 1000, "help": "samplings of one step"},
)

import gc  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from harness.hostmemory import anonymous  # noqa: E402
from hswq.loader import store  # noqa: E402
from hswq.loader.files.fingerprints import fingerprint  # noqa: E402
from hswq.loader.host.folders import register_folder  # noqa: E402
from hswq.loader.recording.recorder import recorder  # noqa: E402

WARM_UP = 10


def measure(network: torch.nn.Module) -> dict:
    """Return what there is now."""
    common.synchronize()
    gc.collect()
    row = {
        "host MB": anonymous() / 1e6,
        "objects": len(gc.get_objects()),
        "hooks": sum(
            len(part._forward_hooks) + len(part._forward_pre_hooks) for part in network.modules()
        ),
        "recorded": store.statistics_of(fingerprint(chosen.checkpoint)).samples,
    }
    if chosen.device == "cuda":
        row["GPU MB"] = torch.cuda.memory_allocated() / 1e6
        row["GPU reserved MB"] = torch.cuda.memory_reserved() / 1e6
    return row


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.models_dir, folder_paths.user_directory = folder, folder
        settings = Path(folder, "default", "comfy.settings.json")
        settings.parent.mkdir()
        settings.write_text(json.dumps({"HSWQ.Target": 4096}))
        register_folder()
        recorder.install()
        patcher = comfy.sd.load_checkpoint_guess_config(
            chosen.checkpoint, output_clip=False, output_vae=False
        )[0]
        sample, results = common.Sampling(patcher, chosen.size), {}
        for number in range(1, chosen.count + 1):
            sample(1)
            if number in (WARM_UP, chosen.count // 2, chosen.count):
                results[f"after {number}"] = measure(patcher.model.diffusion_model)
    common.report("many recorded samplings", chosen, results)


main()
