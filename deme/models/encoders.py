"""What a network works on: images as it sees them, and back to pixels."""

import torch

from deme.models.inference import memory_format

MODES = {1: "L", 3: "RGB"}  # PIL's mode for a number of channels


def encode(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 images (B, C, H, W) to [−1, 1] on the device, same shape, in its memory format; a GPU is not waited for."""
    if device.type == "cuda":
        pixels = pixels.pin_memory()
    pixels = pixels.to(device, non_blocking=True, memory_format=memory_format(device))
    return pixels.float().div_(127.5).sub_(1)


def decode(images: torch.Tensor) -> torch.Tensor:
    """Images in [−1, 1] (B, C, H, W) to uint8 on the CPU, what lies outside clipped."""
    return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
