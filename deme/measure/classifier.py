"""A small classifier trained on the data's labels: the feature network of the classifier FD.

Inception features mean nothing on 8×8 digits and their weights are a download; the penultimate features of a network
that knows the data's classes are the same idea, made here.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.resnet import BasicBlock
from tqdm import trange

from deme.config.experiment import Config
from deme.config.sections import LEAST_CLASSIFIED
from deme.data.examples import load_evaluation_images
from deme.data.opening import Source, data_hashes
from deme.errors import UserError, one_line
from deme.job.files import atomic_file
from deme.job.processes import Processes, in_main_process

HELD_OUT_SHARE = 0.2  # of the data
LARGEST = 32  # pixels: the sides of larger images are halved before the first stage
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05


class Classifier(nn.Module):
    """Residual network of three stages after a convolution to `width` channels; `features` is its pooled last stage.

    A stage is a convolution that doubles the channels, max pooling that halves the resolution, and torchvision's
    basic residual block.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        layers = _convolution(3, width)
        for channels in (width, 2 * width, 4 * width):
            layers += [*_convolution(channels, 2 * channels), nn.MaxPool2d(2), BasicBlock(2 * channels, 2 * channels)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(8 * width, num_classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W), H and W ≥ 8 → float32 (B, 8 · width)."""
        images = pixels.float() / 127.5 - 1
        while images.shape[-1] > LARGEST:
            images = F.avg_pool2d(images, 2)
        return self.layers(images).mean((2, 3))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → logits (B, classes)."""
        return self.head(self.features(pixels))


def _convolution(channels: int, out_channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, out_channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def train_classifier(
    pixels: torch.Tensor, labels: torch.Tensor, config: Config, device: torch.device
) -> tuple[Classifier, float]:
    """Train a classifier on all but a fifth of the data: uint8 RGB images (N, 3, H, W), and int64 classes (N,).

    Returns:
        the network in eval mode, and its accuracy on a seeded random fifth of the data that it was not trained on.
    """
    settings = config.evaluate
    torch.manual_seed(config.seed)
    order = torch.randperm(len(pixels))  # data sets come sorted: by class, or by writer as the digits
    held_out, kept = order.tensor_split([int(HELD_OUT_SHARE * len(order))])
    pixels, labels = pixels.to(device), labels.to(device)
    classifier = Classifier(settings.classifier_width, int(labels.max()) + 1)
    classifier.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=WEIGHT_DECAY)
    steps = settings.classifier_epochs * -(-len(kept) // settings.classifier_batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    in_bf16 = settings.classifier_precision == "bf16"
    for _ in trange(settings.classifier_epochs, desc="classifier", unit="epoch", mininterval=1):
        for batch in kept[torch.randperm(len(kept))].split(settings.classifier_batch_size):
            if len(batch) == 1:  # too few for batch normalization
                continue
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):  # features are always float32
                logits = classifier(_augment(pixels[batch], config.data.random_flip))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    classifier.eval().to(memory_format=torch.contiguous_format)
    with torch.inference_mode():
        predictions = torch.cat([classifier(pixels[batch]).argmax(1) for batch in held_out.split(500)])
    return classifier, (predictions == labels[held_out]).float().mean().item()


def _augment(pixels: torch.Tensor, random_flip: bool) -> torch.Tensor:
    """Images (B, C, S, S), each moved by up to S / 8 pixels, the edge repeated, and mirrored at random if asked for."""
    count, _, _, size = pixels.shape
    margin = max(1, size // 8)
    places = torch.arange(size, device=pixels.device)
    shifts = torch.randint(-margin, margin + 1, (2, count, 1), device=pixels.device)
    rows, columns = (places + shifts).clamp(0, size - 1)
    if random_flip:
        columns = torch.where(torch.rand(count, 1, device=pixels.device) < 0.5, columns.flip(1), columns)
    # the two index arrays stand at the front of the result: (B, S, S, C)
    images = torch.arange(count, device=pixels.device)[:, None, None]
    return pixels.permute(0, 2, 3, 1)[images, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def evaluated_data(config: Config, source: Source, with_labels: bool = False) -> dict[str, Any]:
    """The record of the images that are evaluated: the settings that choose them, and their SHA-256."""
    return {"data": source.data.tagged("statistics"), **data_hashes(source, config.paths.image_cache, with_labels)}


def check_classified(features: str, width: int, height: int) -> None:
    """Refuse images that are too small for the classifier, if `features` are its."""
    if features == "classifier" and min(width, height) < LEAST_CLASSIFIED:
        rule = f"evaluate.features=classifier needs at least {LEAST_CLASSIFIED} pixels"
        raise UserError(f"images of {width} x {height} pixels, {rule}")


def trained_classifier(config: Config, processes: Processes, source: Source) -> tuple[Classifier, float]:
    """The classifier of the data, trained once and kept, on the device; its held-out accuracy."""
    file, settings = config.paths.classifier, config.evaluate
    made_from = evaluated_data(config, source, with_labels=True)
    made_from |= {key: getattr(settings, f"classifier_{key}") for key in ("width", "epochs", "batch_size")}
    made_from |= {
        "random_flip": config.data.random_flip,
        "precision": settings.classifier_precision,
        "seed": config.seed,
    }

    def train() -> None:
        if load_classifier(file, made_from) is None:
            images, labels = load_evaluation_images(source, config.paths.image_cache)
            if labels is None:
                raise UserError("data.label_column=null: evaluate.features=classifier needs labels")
            trained = train_classifier(images.batch(range(len(images))), labels, config, processes.device)
            save_classifier(file, *trained, made_from)

    in_main_process(processes, train)
    classifier, accuracy = load_classifier(file, made_from)
    return classifier.to(processes.device), accuracy


def save_classifier(path: Path, classifier: Classifier, accuracy: float, made_from: dict[str, Any]) -> None:
    """Write a classifier as safetensors, its record and accuracy in the metadata."""
    metadata = {"made_from": json.dumps(made_from), "held_out_accuracy": repr(accuracy)}
    with atomic_file(path) as temporary:
        save_file(classifier.state_dict(), temporary, metadata)


def load_classifier(path: Path, made_from: dict[str, Any]) -> tuple[Classifier, float] | None:
    """The kept classifier and its held-out accuracy; None if it was made from something else or is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if json.loads(metadata["made_from"]) != made_from:
            return None
        weights = load_file(path)
        classifier = Classifier(len(weights["layers.1.bias"]), len(weights["head.bias"]))
        classifier.load_state_dict(weights)
        return classifier.eval(), float(metadata["held_out_accuracy"])
    except Exception as error:  # a damaged header or tensor leads to errors of safetensors, json and torch
        print(f"{path}: unreadable, training it again ({one_line(error)})")
        return None
