"""Shared setup and teardown for pretrain.py, finetune.py and scripts/cache.py."""

from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator

from deme.config.experiment import check_shares
from deme.data.examples import Examples, TrainingImages, load_examples
from deme.errors import naming
from deme.job.files import Watched, atomic_folder
from deme.job.processes import in_main_process, locked_by_all, make_accelerator
from deme.method.losses import Experts
from deme.models.denoisers import load_denoiser, load_scheduler
from deme.models.encoders import load_encoder, try_out
from deme.models.variants import ModelFiles
from deme.training.session import Session, TrainingRun
from deme.training.state import Networks
from deme.training.trainer import Trainer


def load_networks(inputs: ModelFiles, key: str, source: str) -> Networks:
    """Load and try out a pipeline, and the experts as its teacher if `inputs` has more than one denoiser.

    Errors name the setting `key` and its value, which the pipeline comes from.
    """
    folder, *expert_folders = inputs.denoisers
    with naming(key, source):
        denoiser = load_denoiser(folder)
        scheduler = load_scheduler(inputs.pipeline)
        encoder = load_encoder(inputs.pipeline, denoiser)
        try_out(denoiser, scheduler, encoder)
    experts = []
    for path in expert_folders:
        experts.append(load_denoiser(path))
        with naming(path):
            try_out(experts[-1], scheduler, encoder)
    return Networks(denoiser, Experts(experts) if experts else None, scheduler, encoder)


def open_training(
    session: Session, load: Callable[[], Networks], watched: Watched, made_from: dict[str, str]
) -> tuple[Accelerator, Networks, TrainingImages]:
    """The accelerator, networks and data that all runs of a command share.

    `load` reads the files in `watched`; `made_from` has their hashes.
    """
    settings = session.settings
    accelerator = make_accelerator(settings.mixed_precision, f"{settings.section}.mixed_precision")
    check_shares(settings, accelerator.num_processes)
    networks = load()
    accelerator.wait_for_everyone()
    watched.check()  # every process has read the same files
    made_of = session.data_hashes | made_from
    images = load_examples(session.config, settings, session.source, networks.encoder, made_of, accelerator)
    return accelerator, networks, images


def train(
    session: Session,
    run: TrainingRun,
    networks: Networks,
    images: Examples,
    write: Callable[[Path], None],
    held_out: Examples | None = None,
) -> Trainer | None:
    """Train to the end and have `write` fill the output's folder; None if time was up first."""
    settings = session.settings
    key = f"{settings.section}.mixed_precision"
    accelerator = make_accelerator(settings.mixed_precision, key)  # anew, as each run has its own loss scale

    def finish() -> None:
        with atomic_folder(run.output) as temporary:
            write(temporary)
        print(f"wrote {run.output}")

    with locked_by_all(accelerator, run.folder, "output_dir"):
        in_main_process(accelerator, run.claim)
        trainer = Trainer(accelerator, networks, images, run, held_out)
        if trainer.run(session.deadline):
            in_main_process(accelerator, finish)
            return trainer
    accelerator.print(f"stopped after {settings.section}.max_minutes={settings.max_minutes}; the same command resumes")
    return None
