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
WIDTHS = (32, 64, 128)  # each stage after the first halves the resolution
BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05


class Classifier(nn.Module):
    """Residual network of three stages of torchvision's basic blocks; `features` is its pooled last stage."""

    def __init__(self, num_classes: int):
        super().__init__()
        blocks, channels = [], WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            stride = 1 if stage == 0 else 2
            change = nn.Sequential(conv1x1(channels, width, stride), nn.BatchNorm2d(width)) if stride > 1 else None
            blocks += [BasicBlock(channels, width, stride, change)]
            channels = width
        self.stem = nn.Sequential(
            nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        )
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 128)."""
        return self.blocks(self.stem(pixels.float() / 127.5 - 1)).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


def train_classifier(
    pixels: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int, device: torch.device
) -> tuple[Classifier, float]:
    """
    Args:
        pixels: uint8 RGB, shape (N, 3, H, W).
        labels: int64 class indices, shape (N,).

    Returns:
        the network in eval mode, and its accuracy on a seeded random fifth of the data that it was not trained on.
    """
    torch.manual_seed(seed)
    order = torch.randperm(len(pixels))  # data sets come sorted: by class, or by writer as the digits
    held_out, kept = order[: int(HELD_OUT * len(order))], order[int(HELD_OUT * len(order)) :]
    pixels, labels = pixels.to(device), labels.to(device)
    classifier = Classifier(int(labels.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(kept) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in trange(epochs, desc="classifier", unit="epoch", mininterval=1):
        for batch in kept[torch.randperm(len(kept))].split(BATCH_SIZE):
            logits = classifier(_shift(pixels[batch]))
            F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    classifier.eval()
    with torch.inference_mode():
        predictions = torch.cat([classifier(pixels[batch]).argmax(1) for batch in held_out.split(500)])
    return classifier, (predictions == labels[held_out]).float().mean().item()


def _shift(pixels: torch.Tensor) -> torch.Tensor:
    """Each batch moved by up to an eighth of its size, the edge repeated: the augmentation."""
    margin = max(1, pixels.shape[-1] // 8)
    top, left = torch.randint(2 * margin + 1, (2,)).tolist()
    padded = F.pad(pixels.float(), (margin,) * 4, mode="replicate")
    return padded[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]]


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
    classifier = Classifier(len(weights["head.bias"]))
    classifier.load_state_dict(weights)
    return classifier.eval(), float(metadata["held_out_accuracy"])
