"""Pretrain a DDPM from nothing, where no pretrained one can be downloaded (digits, own data).

    python pretrain.py                                  # the embedded digits
    accelerate launch pretrain.py --config FILE         # over many GPUs

Writes the pipeline folder runs/<name>/pretrained/, with pretrain.yaml, which says how it was made;
checkpoints, logs and previews lie in runs/<name>/pretraining/.
The same command again resumes, or does nothing when all is done.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from pathlib import Path

from deme.config.experiment import Config
from deme.errors import UserError, naming, one_line
from deme.job.command import run_script
from deme.job.files import Watched, sha256, write_yaml
from deme.job.records import ENCODER, SCHEDULE, provenance
from deme.models.kinds import check_pipeline
from deme.models.pipelines import (
    SCHEDULER_CONFIG,
    encoder_files,
    encoders_hash,
    find_folder,
    latent_factor,
    num_train_timesteps,
    scheduler_folder,
    takes_text,
    unet_folder,
    write_pipeline_files,
)
from deme.training.session import Session


def find_encoders(config: Config) -> Path:
    """The pipeline folder whose encoders and noise schedule are taken."""
    pipeline = find_folder(config.pretrain.encoders)
    if pipeline is None:
        raise UserError("no such folder")
    if not takes_text(pipeline):
        raise UserError(f"{pipeline / 'text_encoder'}: missing")
    check_pipeline(pipeline, unet_folder(pipeline), scheduler_folder(pipeline))
    factor = latent_factor(pipeline)
    config.data.check("resolution", config.data.resolution % factor == 0, f"must be a multiple of {factor}, as latents")
    config.check_fits({}, scheduler_folder(pipeline), num_train_timesteps(pipeline))
    config.pretrain.check("scheduler", not config.pretrain.scheduler, "pretrain.encoders brings its own")
    return pipeline


def plan(config: Config) -> str:
    """What this command would do."""
    return f"pretrain for {config.pretrain.max_steps} steps -> {config.paths.pretrained_here}"


def main(config: Config) -> None:
    """Pretrain, unless it is done."""
    # --- what is left to do
    settings = config.pretrain
    session = Session(config, settings)
    encoders = None
    others = {}
    watched = Watched([])
    if settings.encoders is not None:
        with naming("pretrain.encoders", settings.encoders):
            encoders = find_encoders(config)
        schedule = scheduler_folder(encoders) / SCHEDULER_CONFIG
        watched = Watched([*encoder_files(encoders).values(), schedule])
        others = {ENCODER: encoders_hash(encoders), SCHEDULE: sha256(schedule)}
    run = session.run(config.paths.pretraining, config.paths.pretrained_here, settings, others)
    if session.is_complete(run):
        return

    # --- torch is imported after what can be answered without it
    import diffusers
    import torch

    from deme.data.examples import load_examples
    from deme.job.processes import make_accelerator
    from deme.models.encoders import Pixels, load_encoder
    from deme.models.networks import load_scheduler, try_out
    from deme.training.held_out import HeldOut
    from deme.training.trainer import Networks, Objective, Trainer

    # --- network and noise schedule from the configuration
    accelerator = make_accelerator(settings.mixed_precision, "pretrain.mixed_precision")
    settings.check_shares(accelerator.num_processes)
    torch.manual_seed(config.seed)
    given = f"pretrain.unet={settings.unet}, pretrain.scheduler={settings.scheduler}, data.resolution"
    with naming(given, config.data.resolution):
        try:
            if encoders is None:
                unet = diffusers.UNet2DModel(sample_size=config.data.resolution, **settings.unet)
                scheduler = diffusers.DDPMScheduler(
                    num_train_timesteps=config.timesteps.num_train_timesteps,  # by name, or diffusers drops it later
                    **settings.scheduler,
                )
            else:
                size = config.data.resolution // latent_factor(encoders)
                unet = diffusers.UNet2DConditionModel(sample_size=size, **settings.unet)
                scheduler = load_scheduler(encoders)
        except Exception as error:  # diffusers and torch raise whatever a wrong value leads to
            raise UserError(one_line(error)) from None
        encoder = Pixels(unet.config.in_channels) if encoders is None else load_encoder(encoders, unet)
        try_out(unet, scheduler, encoder)
    accelerator.wait_for_everyone()
    watched.check()  # all processes have read the same
    made_of = session.data_hashes | others
    images, held_out_images = load_examples(config, settings, encoder, made_of, accelerator)
    counts = f"{unet.num_parameters():,} parameters, {len(images):,} images, {len(held_out_images):,} held out"
    accelerator.print(counts)

    # --- train on all timesteps, without a teacher
    objective = Objective("pretraining", stream=(config.seed, 0), ranges=[(0, config.timesteps.num_train_timesteps)])
    held_out = HeldOut(held_out_images, settings.held_out_every, settings.patience) if held_out_images else None
    networks = Networks(unet, None, scheduler, encoder)

    def write(folder: Path) -> None:
        if encoders is None:
            diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
        else:
            unet.save_pretrained(folder / "unet")
            write_pipeline_files(folder, encoders)
        write_yaml(folder / "pretrain.yaml", provenance(config))

    trainer = session.train(
        accelerator,
        session.reading(run),
        lambda: Trainer(accelerator, networks, images, objective, settings, run.folder, held_out),
        write,
    )
    if trainer is None:
        return
    has_converged = trainer.state.step < settings.max_steps
    why = "the held-out loss has stopped falling" if has_converged else f"pretrain.max_steps={settings.max_steps}"
    accelerator.print(f"trained for {trainer.state.step} steps: {why}")
    if config.model.pretrained is not None:
        accelerator.print(
            f"finetune.py starts from model.pretrained={config.model.pretrained}; set it to null to start from here"
        )


if __name__ == "__main__":
    run_script(__doc__, plan, main)
