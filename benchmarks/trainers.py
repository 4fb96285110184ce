"""finetune.py's training loop on a given network and given images, for benchmarks and tests."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel

from deme.config.trainings import Finetune, Training
from deme.data.crops import CroppedImages
from deme.data.examples import Examples, TrainingImages
from deme.job.records import RUN, Record
from deme.method.process import process_of
from deme.models.adapters import freeze_base
from deme.models.denoisers import with_projections
from deme.models.encoders import Pixels
from deme.training.session import Objective, TrainingRun
from deme.training.state import Networks, with_new_lora
from deme.training.trainer import Trainer

OBJECTIVE = Objective("benchmark", (0, 2, 0, 250), [(0, 250)], global_probability=0.3, consistency_weight=1.0)


def make_accelerator(device: str, precision: str) -> Accelerator:
    """A new one, though accelerate keeps the first one's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision=precision)


def bare_run(objective: Objective, settings: Training, folder: Path) -> TrainingRun:
    """A run without a record."""
    return TrainingRun(objective, settings, folder, folder / "unet", Record(RUN, {}))


def make_trainer(
    accelerator: Accelerator,
    pretrained: UNet2DModel,
    pixels: Sequence[torch.Tensor],
    settings: Training,
    folder: Path,
    objective: Objective = OBJECTIVE,
    projected: bool = True,
    random_flip: bool = False,
    held_out: Examples | None = None,
) -> Trainer:
    """The trainer of a range. The pretrained network is the teacher if the objective needs one.

    Args:
        pixels: uint8 images of the network's size, shape (C, H, W) each.
        projected: train with channel-wise projections.
    """
    pixels = [image.permute(1, 2, 0).numpy() for image in pixels]
    images = CroppedImages(pixels, pretrained.config.sample_size, center_crop=False, random_flip=random_flip)
    networks = Networks(pretrained, None, process_of(DDPMScheduler()), Pixels(pretrained.config.in_channels))
    if isinstance(settings, Finetune) and settings.lora_rank is not None:
        freeze_base(pretrained, settings)
        networks = with_new_lora(networks, settings, objective)
    else:
        student = with_projections(pretrained) if projected else copy.deepcopy(pretrained)
        teacher = copy.deepcopy(pretrained) if objective.consistency_weight > 0 else None
        networks = replace(networks, student=student, teacher=teacher)
    data = TrainingImages(images, held_out or [], pretrained.config.sample_size)
    return Trainer(accelerator, networks, data, bare_run(objective, settings, folder))
