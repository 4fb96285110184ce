"""Shared setup and teardown for pretrain.py, finetune.py and scripts/cache.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from deme.config.experiment import check_shares
from deme.data.examples import load_examples
from deme.data.images import Examples, TrainingImages
from deme.errors import UserError, naming
from deme.job.files import Watched, atomic_folder
from deme.job.processes import in_main_process, locked_by_all, make_accelerator
from deme.method.losses import Experts
from deme.models.denoisers import load_denoiser, load_scheduler, try_out
from deme.models.encoders import Encoder, load_encoder
from deme.models.variants import ModelFiles
from deme.training.held_out import HeldOut
from deme.training.session import Session, TrainingRun
from deme.training.trainer import Networks, Trainer


@dataclass(frozen=True)
class Start:
    """What a training starts from."""

    denoiser: nn.Module  # float32
    scheduler: DDPMScheduler
    encoder: Encoder
    experts: Experts | None = None  # for distillation


class Opened(NamedTuple):
    """What all runs of a command share."""

    accelerator: Accelerator
    start: Start
    images: TrainingImages


def load_start(inputs: ModelFiles, key: str, source: str) -> Start:
    """Load and try out a pipeline, and the experts if `inputs` has more than one denoiser.

    Args:
        key, source: the setting that names the pipeline, for errors.
    """
    folder, *expert_folders = inputs.denoisers
    with naming(key, source):
        denoiser = load_denoiser(folder)
        scheduler = load_scheduler(inputs.pipeline)
        encoder = load_encoder(inputs.pipeline, denoiser)
        try_out(denoiser, scheduler, encoder)
    experts = []
    for path in expert_folders:
        expert = load_denoiser(path)
        with naming(path):
            try_out(expert, scheduler, encoder)
            channels = expert.config.in_channels
            if channels != denoiser.config.in_channels:
                raise UserError(f"in_channels={channels}: {folder} has {denoiser.config.in_channels}")
        experts.append(expert)
    return Start(denoiser, scheduler, encoder, Experts(experts) if experts else None)


def open_training(session: Session, load: Callable[[], Start], watched: Watched, made_from: dict[str, str]) -> Opened:
    """Open networks and data.

    Args:
        watched: the files that `load` reads.
        made_from: hashes of what `load` reads.
    """
    settings = session.settings
    accelerator = make_accelerator(settings.mixed_precision, f"{settings.section}.mixed_precision")
    check_shares(settings, accelerator.num_processes)
    start = load()
    accelerator.wait_for_everyone()
    watched.check()  # every process has read the same files
    made_of = session.data_hashes | made_from
    images = load_examples(session.config, settings, session.source, start.encoder, made_of, accelerator)
    return Opened(accelerator, start, images)


def train(
    session: Session,
    run: TrainingRun,
    networks: Networks,
    images: Examples,
    write: Callable[[Path], None],
    held_out: HeldOut | None = None,
) -> Trainer | None:
    """Train to the end and write the output; None if time was up first.

    Args:
        write: fills the output's folder.
    """
    settings = session.settings
    key = f"{settings.section}.mixed_precision"
    accelerator = make_accelerator(settings.mixed_precision, key)  # anew, as each run has its own loss scale

    def finish() -> None:
        with atomic_folder(run.output) as temporary:
            write(temporary)
        print(f"wrote {run.output}")

    with locked_by_all(accelerator, run.folder, "output_dir"):
        in_main_process(accelerator, run.claim)
        trainer = Trainer(accelerator, networks, images, run.objective, run.settings, run.folder, held_out)
        if trainer.run(session.deadline):
            in_main_process(accelerator, finish)
            return trainer
    accelerator.print(f"stopped after {settings.section}.max_minutes={settings.max_minutes}; the same command resumes")
    return None
