"""Judges from local weights: classifiers of torchvision and timm, and DINOv2 of transformers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from deme.config.judges import Judge
from deme.config.section import one_of
from deme.config.sections import LEAST_CLASSIFIED
from deme.errors import UserError, blaming, naming, one_line
from deme.models.encoder_loading import check_filled

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of the channels
WITH_TRANSFORM = {"transform_input": True, "init_weights": False}  # as published weights are built
UNLIKE = {"googlenet": WITH_TRANSFORM, "inception_v3": WITH_TRANSFORM}
UNREAD = "num_batches_tracked"  # of batch normalization: only training reads it, and old files lack it


@dataclass(frozen=True)
class Preparation:
    """What becomes of images before a network sees them."""

    size: int | tuple[int, int]  # pixels after resizing: of the shorter side, or height and width
    crop: int  # pixels of the centre's square, which the network sees
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 3, crop, crop).

        Resized as by Pillow, which the weights were published with: the width, then the height, each rounded.
        """
        sides, how = pixels.shape[-2:], InterpolationMode(self.interpolation)
        height, width = self.size if isinstance(self.size, tuple) else (self.size * s // min(sides) for s in sides)
        pixels = transforms.resize(pixels, [sides[0], width], how, antialias=True)
        pixels = transforms.resize(pixels, [height, width], how, antialias=True)
        pixels = transforms.convert_image_dtype(transforms.center_crop(pixels, self.crop))
        return transforms.normalize(pixels, self.mean, self.std)


class LocalNetwork(nn.Module):
    """A network without its head, and the preprocessing that its weights were published with."""

    def __init__(self, judge: Judge):
        super().__init__()
        load = {"torchvision": _torchvision, "timm": _timm, "dinov2": _dinov2}[judge.library]
        with naming("evaluate.features", judge.text):
            network, self.prepare = load(judge)
            self.network = network.eval().requires_grad_(False)
            with blaming("can't take images"):
                self.features(torch.zeros(1, 3, LEAST_CLASSIFIED, LEAST_CLASSIFIED, dtype=torch.uint8))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, D)."""
        found = self.network(self.prepare(pixels))
        return getattr(found, "pooler_output", found)  # DINOv2's: the normalised CLS token


def _torchvision(judge: Judge) -> tuple[nn.Module, Preparation]:
    """A classifier of torchvision. resnet50.IMAGENET1K_V1 names one of several published weights."""
    network_name, _, entry = judge.network.partition(".")
    _check_known(network_name, models.list_models(module=models), "torchvision")
    published = {weights.name: weights.transforms() for weights in models.get_model_weights(network_name)}
    if entry and entry not in published:
        raise UserError(f"{entry}: {one_of(published, entry)}")
    how = _the_only({f"{network_name}.{name}": how for name, how in published.items() if entry in ("", name)})
    network = models.get_model(network_name, weights=None, **UNLIKE.get(network_name, {}))
    heads = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not heads:
        raise UserError(f"{network_name} has no classifier head whose input could be taken")
    _fill(network, judge.files[0], heads[-1:])
    network.set_submodule(heads[-1], nn.Identity())
    [size], [crop], normal = how.resize_size, how.crop_size, (tuple(how.mean), tuple(how.std))
    return network, Preparation(size, crop, how.interpolation.value, *normal)


def _timm(judge: Judge) -> tuple[nn.Module, Preparation]:
    """A classifier of timm, with or without the tag that names one of several published weights."""
    try:
        import timm
    except ImportError:
        raise UserError("timm is not installed: pip install timm") from None
    network_name, _, tag = judge.network.partition(".")
    _check_known(network_name, timm.list_models(), "timm")
    tagged = [judge.network] if tag else timm.list_pretrained(f"{network_name}.*") or [network_name]
    try:
        settings = {name: timm.data.resolve_data_config(pretrained_cfg=_settings(timm, name)) for name in tagged}
        how = _the_only(settings)
        network = timm.create_model(judge.network, pretrained=False)
    except RuntimeError as error:  # an unknown tag
        raise UserError(str(error)) from None
    heads = network.pretrained_cfg.get("classifier")
    if not network.num_classes or not heads:
        raise UserError(f"{judge.network} has no classifier head whose input could be taken")
    _fill(network, judge.files[0], [heads] if isinstance(heads, str) else heads)
    network.reset_classifier(0)
    _, height, width = how["input_size"]
    if height != width or how["crop_mode"] not in ("center", "squash"):
        raise UserError(f"takes images of {width} x {height} pixels by crop mode {how['crop_mode']}, which is not here")
    side = math.floor(height / how["crop_pct"])
    size = side if how["crop_mode"] == "center" else (side, side)
    return network, Preparation(size, height, how["interpolation"], how["mean"], how["std"])


def _settings(timm: object, name: str) -> dict:
    found = timm.models.get_pretrained_cfg(name)
    return {} if found is None else found.to_dict()


def _dinov2(judge: Judge) -> tuple[nn.Module, Preparation]:
    """DINOv2, as FD-DINOv2 uses it (Stein et al. 2023, arXiv 2306.04675): whole images, bicubic, 224 pixels."""
    from transformers import Dinov2Model
    from transformers.utils import logging

    logging.set_verbosity_error()  # what does not fit is told below, in one line
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    with blaming("no DINOv2 model can be loaded from it"):
        network, report = Dinov2Model.from_pretrained(judge.path, ignore_mismatched_sizes=True, **options)
    check_filled(report)
    if unread := [name for name in report["unexpected_keys"] if not name.startswith("classifier.")]:
        raise UserError(f"holds the tensor {min(unread)}, which the network of its config.json lacks")
    return network, Preparation((224, 224), 224, "bicubic", *IMAGENET)


def _check_known(name: str, known: Iterable[str], library: str) -> None:
    known = list(known)
    if name not in known:
        near = get_close_matches(name, known, 3)
        raise UserError(f"{library} has no classifier {name}" + (f"; it has {', '.join(near)}" if near else ""))


def _the_only(ways: dict[str, object]) -> object:
    """The preprocessing that all of these published weights share."""
    if len(set(map(repr, ways.values()))) > 1:
        raise UserError(f"weights with different preprocessing were published: write one of {', '.join(ways)}")
    return next(iter(ways.values()), None)


def _fill(network: nn.Module, file: Path, heads: Iterable[str]) -> None:
    """Load all tensors but the heads', which may be of other classes."""
    try:
        tensors = load_file(file)
    except Exception as error:  # safetensors' errors have no common class with the system's
        raise UserError(f"{file}: not a safetensors file ({one_line(error)})") from None
    head = tuple(f"{name}." for name in heads)
    expected, given = (
        {name: tensor for name, tensor in part.items() if not name.startswith(head) and not name.endswith(UNREAD)}
        for part in (network.state_dict(), tensors)
    )
    for name, tensor in expected.items():
        if name not in given:
            raise UserError(f"{file}: lacks the tensor {name}")
        if given[name].shape != tensor.shape:
            shapes = f"{tuple(given[name].shape)}, the network's {tuple(tensor.shape)}"
            raise UserError(f"{file}: the tensor {name} has the shape {shapes}")
    if more := given.keys() - expected.keys():
        raise UserError(f"{file}: holds the tensor {min(more)}, which the network lacks")
    network.load_state_dict(given, strict=False)
