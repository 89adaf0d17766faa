"""The Triton kernels give what plain torch gives, on machines without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_kernels_agree_with_torch_in_tritons_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent)}
    script = [sys.executable, str(HERE / "interpreted.py")]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
