"""The comparison node: how different a quantized model's pictures are from the original's."""

from __future__ import annotations

import comfy.model_management as memory
import torch
from comfy_api.latest import io
from kornia.metrics import psnr, ssim

from .inputs import CATEGORY, line

_WINDOW = 11  # pixels: SSIM was published with this window and a Gaussian of 1.5 pixels
_GREY = 0.5
_IDENTICAL_DB = 100.0  # in place of infinity, which JSON and most nodes cannot handle


class HSWQCompare(io.ComfyNode):
    """Measures how alike two pictures are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="HSWQCompare",
            display_name="HSWQ Compare Images",
            category=CATEGORY,
            description="Compares two pictures of the same seed and prompt, such as those of a "
            "model in 16 bit and in FP8: SSIM, PSNR, and where they differ. Batches are compared "
            "picture by picture; the numbers are means. Transparent pictures are put on grey.",
            search_aliases=["ssim", "psnr", "difference", "fidelity"],
            is_output_node=True,
            inputs=[
                io.Image.Input("original", tooltip="The 16-bit model's picture."),
                io.Image.Input("image", tooltip="The other picture, of the same size."),
                io.Float.Input(
                    "amplify",
                    default=4.0,
                    min=0.0,
                    max=100.0,
                    step=0.5,
                    tooltip="The difference is multiplied by this, so that it can be seen.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="SSIM", tooltip="1 for identical pictures."),
                io.Float.Output(
                    display_name="PSNR",
                    tooltip=f"In dB; {_IDENTICAL_DB:.0f} for identical pictures.",
                ),
                io.Image.Output(
                    display_name="difference",
                    tooltip="Grey where the pictures are equal; lighter or darker where `image` "
                    "is, in each colour.",
                ),
            ],
        )

    @classmethod
    def execute(cls, original: torch.Tensor, image: torch.Tensor, amplify: float) -> io.NodeOutput:
        if not min(len(original), len(image)):
            raise ValueError("there are no pictures to compare")
        original, image = _opaque(original), _opaque(image)
        if original.shape != image.shape:
            raise ValueError(
                f"only pictures of one size can be compared: the original is {_size(original)}, "
                f"the image {_size(image)}"
            )
        if min(original.shape[1:3]) < _WINDOW:
            raise ValueError(
                f"the pictures are {_size(original)}: SSIM needs at least {_WINDOW} pixels each way"
            )
        likeness = [_compare(*pair) for pair in zip(original, image, strict=True)]
        similarities, ratios = (torch.tensor(values) for values in zip(*likeness, strict=True))
        difference = (_GREY + amplify * (image - original)).clamp(0, 1)
        difference = difference.to(memory.intermediate_device(), memory.intermediate_dtype())
        likeness = similarities.mean().item(), ratios.mean().item()
        return io.NodeOutput(*likeness, difference, ui=line(_summary(similarities, ratios)))


def _opaque(images: torch.Tensor) -> torch.Tensor:
    """Return an IMAGE (B, H, W, C) as FP32, with transparent parts put on grey."""
    images = images.to(torch.float32)
    if images.shape[-1] != 4:
        return images
    colours, alpha = images[..., :3], images[..., 3:]
    return colours * alpha + _GREY * (1 - alpha)


def _compare(original: torch.Tensor, image: torch.Tensor) -> tuple[float, float]:
    """Return SSIM and PSNR of two pictures, each (H, W, C)."""
    device = memory.get_torch_device()
    pair = [one.to(device).movedim(-1, 0)[None] for one in (original, image)]
    similarity = ssim(*pair, window_size=_WINDOW, max_val=1.0, eps=0.0, padding="valid")
    ratio = psnr(*pair, max_val=1.0).clamp(max=_IDENTICAL_DB)
    return similarity.mean().item(), ratio.item()


def _size(images: torch.Tensor) -> str:
    count, height, width, channels = images.shape
    return f"{count} x {width} x {height} pixels of {channels} channels"


def _summary(similarities: torch.Tensor, ratios: torch.Tensor) -> str:
    if len(ratios) == 1:
        return f"SSIM {similarities[0]:.4f}, PSNR {ratios[0]:.1f} dB"
    return (
        f"{len(ratios)} pictures: SSIM {similarities.mean():.4f} (worst {similarities.min():.4f}), "
        f"PSNR {ratios.mean():.1f} dB (worst {ratios.min():.1f})"
    )
