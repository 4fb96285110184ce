"""A small classifier trained on the data's labels: the feature network of the classifier FD.

Inception features mean nothing on 8×8 digits and their weights are a download; the penultimate features of a network
that knows the data's classes are the same idea, made here.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1
from tqdm import trange

from deme.files import atomic_file

HELD_OUT = 0.2  # fraction of the data
FIRST_STAGE = 16  # pixels: larger images are pooled before the first stage
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05


class Classifier(nn.Module):
    """Residual network of three stages of torchvision's basic blocks; `features` is its pooled last stage.

    Args:
        width: channels of the first stage; each further one has twice as many at half the resolution.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks = [BasicBlock(width, width)]
        for channels in (width, 2 * width):
            change = nn.Sequential(conv1x1(channels, 2 * channels, stride=2), nn.BatchNorm2d(2 * channels))
            blocks.append(BasicBlock(channels, 2 * channels, stride=2, downsample=change))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(4 * width, num_classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 4 · width)."""
        hidden = self.stem(pixels.float() / 127.5 - 1)
        while hidden.shape[-1] > FIRST_STAGE:
            hidden = F.max_pool2d(hidden, 2)
        return self.blocks(hidden).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


def train_classifier(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    width: int,
    epochs: int,
    random_flip: bool,
    seed: int,
    device: torch.device,
) -> tuple[Classifier, float]:
    """
    Args:
        pixels: uint8 RGB, shape (N, 3, H, W).
        labels: int64 class indices, shape (N,).
        random_flip: mirror half of the training images.

    Returns:
        the network in eval mode, and its accuracy on a seeded random fifth of the data that it was not trained on.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(pixels))  # data sets come sorted: by class, or by writer as the digits
    held_out, kept = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]
    pixels, labels = pixels.to(device), labels.to(device)
    classifier = Classifier(width, int(labels.max()) + 1).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(kept) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in trange(epochs, desc="classifier", unit="epoch", mininterval=1):
        for batch in kept[torch.randperm(len(kept))].split(BATCH_SIZE):
            logits = classifier(_augment(pixels[batch], random_flip))
            F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    classifier.eval().to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        predictions = torch.cat([classifier(pixels[batch]).argmax(1) for batch in held_out.split(500)])
    return classifier, (predictions == labels[held_out]).float().mean().item()


def _augment(pixels: torch.Tensor, random_flip: bool) -> torch.Tensor:
    """Each batch moved by up to an eighth of its size, the edge repeated; half of its images mirrored if asked for."""
    margin = max(1, pixels.shape[-1] // 8)
    top, left = torch.randint(2 * margin + 1, (2,)).tolist()
    padded = F.pad(pixels.float(), (margin,) * 4, mode="replicate")
    moved = padded[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]]
    if not random_flip:
        return moved
    mirrored = torch.rand(len(moved), device=moved.device)[:, None, None, None] < 0.5
    return torch.where(mirrored, moved.flip(-1), moved)


def save_classifier(path: Path, classifier: Classifier, accuracy: float, made_from: dict) -> None:
    metadata = {"made_from": json.dumps(made_from), "held_out_accuracy": repr(accuracy)}
    with atomic_file(path) as temporary:
        save_file(classifier.state_dict(), temporary, metadata)


def load_classifier(path: Path, made_from: dict) -> tuple[Classifier, float] | None:
    """The cached classifier and its held-out accuracy, or None where it was made from something else."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["made_from"]) != made_from:
        return None
    weights = load_file(path)
    classifier = Classifier(len(weights["stem.1.bias"]), len(weights["head.bias"]))
    classifier.load_state_dict(weights)
    return classifier.eval(), float(metadata["held_out_accuracy"])
