"""The comparison node in a graph: its numbers go on, and it shows them."""

import pytest
from harness.client import Client
from harness.prompts import Prompt, node

pytestmark = pytest.mark.server

BLACK, DARK = 0x000000, 0x333333


def comparison(first: int, second: int, width: int = 32) -> Prompt:
    """Two flat pictures, compared; its SSIM goes into a node of ComfyUI's, the PSNR too."""
    picture = {"batch_size": 1, "height": 32}
    return {
        "first": node("EmptyImage", width=32, color=first, **picture),
        "second": node("EmptyImage", width=width, color=second, **picture),
        "compare": node("HSWQCompare", original=["first", 0], image=["second", 0], amplify=2.0),
        "ssim": node("PreviewAny", source=["compare", 0]),
        "psnr": node("PreviewAny", source=["compare", 1]),
        "difference": node("PreviewImage", images=["compare", 2]),
    }


class TestCompare:
    def test_shows_its_numbers_and_passes_them_on(self, client: Client):
        run = client.run(comparison(BLACK, DARK))
        assert run.texts["compare"] == ["SSIM 0.0025, PSNR 14.0 dB"]
        assert float(run.outputs["psnr"]["text"][0]) == pytest.approx(13.979, abs=1e-3)
        assert run.outputs["difference"]["images"]

    def test_identical_pictures_let_the_graph_go_on(self, client: Client):
        run = client.run(comparison(DARK, DARK))
        assert run.texts["compare"] == ["SSIM 1.0000, PSNR 100.0 dB"]
        assert run.outputs["psnr"]["text"] == ["100.0"]
