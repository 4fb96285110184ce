"""Decouple: finetune one copy of the pretrained UNet per timestep range.

    accelerate launch finetune.py                            # every range in turn
    accelerate launch finetune.py finetune.range=2           # one, counted from 0: a cluster runs them in parallel
    accelerate launch finetune.py finetune.range=continued   # the control: plain training on all timesteps, equal cost

Writes runs/<name>/finetuned/0000-0250/unet/ and so on (EMA weights); checkpoints, logs and previews lie beside it.
The same command again resumes, or does nothing when all is done.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from dataclasses import replace
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.sections import CONTINUED, Finetune, range_name
from deme.errors import naming
from deme.job.command import run_script
from deme.job.files import Watched, sha256
from deme.job.records import ARCHITECTURE, DATA, ENCODER, SCHEDULE
from deme.models.pipelines import (
    SCHEDULER_CONFIG,
    encoder_files,
    encoders_hash,
    num_train_timesteps,
    sample_size,
    scheduler_folder,
    takes_text,
    unet_folder,
)
from deme.models.variants import find_pretrained
from deme.models.weights import weights_files, weights_hash
from deme.training.session import Run, Session

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, ModelMixin

    from deme.data.images import Examples
    from deme.models.encoders import Encoder


def chosen_ranges(config: Config) -> list[tuple[int, int] | None]:
    """What this command trains: timestep ranges, or None for the control."""
    chosen = config.finetune.range
    ranges = config.timesteps.ranges
    if chosen == CONTINUED:
        return [None]
    return ranges if chosen is None else [ranges[chosen]]


def settings_for(config: Config, timestep_range: tuple[int, int] | None) -> Finetune:
    """The control trains on all timesteps with the plain loss, for as many steps as all ranges together."""
    if timestep_range is not None:
        return config.finetune
    steps = len(config.timesteps.ranges) * config.finetune.max_steps
    return replace(config.finetune, max_steps=steps, global_probability=1.0, consistency_weight=0.0)


def run_of(session: Session, timestep_range: tuple[int, int] | None, pretrained: dict[str, str]) -> Run:
    """The run of one range, and everything that determines its weights.

    Args:
        pretrained: hashes of what it starts from.
    """
    config = session.config
    folder = config.paths.finetuning(timestep_range)
    others = {
        "finetune.range": range_name(timestep_range),
        "model.projection": config.model.projection and timestep_range is not None,
        **pretrained,
    }
    return session.run(folder, folder / "unet", settings_for(config, timestep_range), others)


def plan(config: Config) -> str:
    """What this command would do."""
    lines = []
    for timestep_range in chosen_ranges(config):
        unet = config.paths.finetuning(timestep_range) / "unet"
        state = "complete" if unet.exists() else f"{settings_for(config, timestep_range).max_steps} steps"
        lines.append(f"finetune {config.paths.pretrained} on {range_name(timestep_range)} -> {unet}: {state}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Finetune what is not finetuned yet."""
    # --- what is left to do
    session = Session(config, config.finetune)
    source = config.paths.pretrained
    pretrained = find_pretrained(config.paths)
    folder = unet_folder(pretrained)
    schedule = scheduler_folder(pretrained)
    sizes = {folder: sample_size(folder, pretrained)}
    config.check_fits(sizes, schedule, num_train_timesteps(pretrained))
    files = (*weights_files(folder), *encoder_files(pretrained).values())
    watched = Watched([*files, folder / "config.json", schedule / SCHEDULER_CONFIG])
    hashes = {
        "pretrained weights (SHA-256)": weights_hash(folder),
        ARCHITECTURE: sha256(folder / "config.json"),
        SCHEDULE: sha256(schedule / SCHEDULER_CONFIG),
    }
    if takes_text(pretrained):
        hashes[ENCODER] = encoders_hash(pretrained)
    runs = {chosen: run_of(session, chosen, hashes) for chosen in chosen_ranges(config)}
    runs = {chosen: run for chosen, run in runs.items() if not session.is_complete(run)}
    if not runs:
        return

    # --- torch is imported after what can be answered without it
    import gc

    from deme.data.sources import data_fingerprint
    from deme.job.processes import make_accelerator
    from deme.models.encoders import load_encoder
    from deme.models.networks import load_scheduler, load_unet, try_out
    from deme.training.examples import load_examples

    # --- the pretrained network and the images
    accelerator = make_accelerator(config.finetune.mixed_precision, "finetune.mixed_precision")
    config.finetune.check_shares(accelerator.num_processes)
    with naming("model.pretrained", source):
        unet = load_unet(folder)
        scheduler = load_scheduler(pretrained)
        encoder = load_encoder(pretrained, unet)
        try_out(unet, scheduler, encoder)
    accelerator.wait_for_everyone()
    watched.check()  # all processes have read the same
    fingerprint = data_fingerprint(config.data, with_captions=True)
    images = load_examples(config, config.finetune, encoder, {DATA: fingerprint, **hashes}, accelerator).training
    accelerator.print(
        f"{source}: {unet.num_parameters():,} parameters; {len(images):,} images; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )

    # --- one run per range
    for timestep_range, run in runs.items():
        if not finetune(session, run.reading(fingerprint), timestep_range, unet, scheduler, encoder, images):
            return
        gc.collect()  # autocast's wrappers tie this range's networks into cycles, which would keep their memory


def finetune(
    session: Session,
    run: Run,
    timestep_range: tuple[int, int] | None,
    pretrained: "ModelMixin",
    scheduler: "DDPMScheduler",
    encoder: "Encoder",
    images: "Examples",
) -> bool:
    """Train one copy of the pretrained UNet and write it; False when time was up before."""
    import copy
    from functools import partial

    from deme.job.processes import make_accelerator
    from deme.models.networks import with_projections
    from deme.training.trainer import Networks, Objective, Trainer

    config = session.config
    settings = settings_for(config, timestep_range)

    # --- student and teacher start from the same weights
    projected = run.record.made_from["model.projection"]
    student = with_projections(pretrained) if projected else copy.deepcopy(pretrained)
    teacher = copy.deepcopy(pretrained) if settings.consistency_weight > 0 else None
    networks = Networks(student, teacher, scheduler, encoder)

    # --- which timesteps it sees, and what it is held to
    is_control = timestep_range is None
    objective = Objective(
        name=range_name(timestep_range),
        stream=(config.seed, 1) if is_control else (config.seed, 2, *timestep_range),
        timestep_range=(0, config.timesteps.num_train_timesteps) if is_control else timestep_range,
        global_probability=settings.global_probability,
        consistency_weight=settings.consistency_weight,
    )

    # --- train; the output holds the EMA weights
    accelerator = make_accelerator(settings.mixed_precision, "finetune.mixed_precision")  # one loss scale per run
    make_trainer = partial(Trainer, accelerator, networks, images, objective, settings, run.folder)
    return session.train(accelerator, run, make_trainer, write=student.save_pretrained) is not None


if __name__ == "__main__":
    run_script(__doc__, plan, main)
