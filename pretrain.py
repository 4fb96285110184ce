"""Pretrain a DDPM from nothing, where no pretrained one can be downloaded (digits, own data).

    python pretrain.py                                  # the embedded digits
    accelerate launch pretrain.py --config FILE         # over many GPUs

Writes the pipeline folder runs/<name>/pretrained/, with pretrain.yaml, which says how it was made;
checkpoints, logs and previews lie in runs/<name>/pretraining/.
The same command again resumes, or does nothing when all is done.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.errors import UserError, blaming, naming
from deme.job.command import run_script
from deme.job.files import Watched, write_yaml
from deme.job.records import provenance
from deme.models.kinds import subfolder_of
from deme.models.pipelines import check_pipeline, latent_factor, takes_text
from deme.job.repository import found_folder
from deme.models.variants import ModelFiles, write_index, write_pipeline_files
from deme.training.session import Objective, Session

if TYPE_CHECKING:
    from deme.training.state import Networks


def find_encoders(config: Config) -> Path:
    """The pipeline folder whose encoders and noise schedule are taken."""
    pipeline = found_folder(config.pretrain.encoders)
    if pipeline is None:
        raise UserError("no such folder")
    if not takes_text(pipeline):
        raise UserError(f"{pipeline / 'text_encoder'}: missing")
    check_pipeline(pipeline, is_whole=False)
    factor = latent_factor(pipeline)
    config.data.check("resolution", config.data.resolution % factor == 0, f"must be a multiple of {factor}, as latents")
    ModelFiles(pipeline, []).check_fits(config)
    config.pretrain.check("scheduler", not config.pretrain.scheduler, "pretrain.encoders brings its own")
    return pipeline


def plan(config: Config) -> str:
    """What this command would do."""
    return f"pretrain for {config.pretrain.max_steps} steps -> {config.paths.pretrained_here}"


def make_networks(config: Config, encoders: Path | None) -> "Networks":
    """A network with random weights and the noise schedule, as configured.

    Args:
        encoders: the pipeline folder of a text-to-image model's encoders.
    """
    import diffusers
    import torch

    from deme.method.process import new_scheduler, process_of
    from deme.models.denoisers import load_scheduler, new_transformer
    from deme.models.encoder_loading import load_encoder, pixels_of, try_out
    from deme.training.state import Networks

    settings = config.pretrain
    torch.manual_seed(config.seed)
    key = "transformer" if settings.transformer else "unet"
    given = f"pretrain.{key}={getattr(settings, key)}, pretrain.scheduler={settings.scheduler}, data.resolution"
    with naming(given, config.data.resolution):
        with blaming():
            if encoders is None:
                kind = new_transformer if settings.transformer else diffusers.UNet2DModel
                unet = kind(sample_size=config.data.resolution, **getattr(settings, key))
                scheduler = new_scheduler(config.timesteps.num_train_timesteps, **settings.scheduler)
            else:
                size = config.data.resolution // latent_factor(encoders)
                unet = diffusers.UNet2DConditionModel(sample_size=size, **settings.unet)
                scheduler = load_scheduler(encoders)
        encoder = pixels_of(unet) if encoders is None else load_encoder(encoders, unet)
        try_out(unet, process_of(scheduler), encoder)
    return Networks(unet, None, process_of(scheduler, config.timesteps), encoder)


def write_pipeline(config: Config, networks: "Networks", encoders: Path | None, folder: Path) -> None:
    """Fill a pipeline folder with the trained network, the noise schedule and the encoders, if there are any."""
    from deme.models.denoisers import settings_of

    networks.student.save_pretrained(folder / subfolder_of(settings_of(networks.student)))
    if encoders is None:
        networks.process.scheduler.save_pretrained(folder / "scheduler")
        write_index(folder, folder)
    else:
        write_pipeline_files(folder, encoders)
    write_yaml(folder / "pretrain.yaml", provenance(config))


def main(config: Config) -> None:
    """Pretrain, unless it is done."""
    # --- what is left to do
    settings = config.pretrain
    session = Session(config, settings)
    session.takes_labels = bool(settings.transformer)
    encoders = None
    hashes = {}
    watched = Watched([])
    if settings.encoders is not None:
        with naming("pretrain.encoders", settings.encoders):
            encoders = find_encoders(config)
        inputs = ModelFiles(encoders, [])
        watched, hashes = inputs.watched(), inputs.hashes()
    objective = Objective("pretraining", (config.seed, 0), [(0, config.timesteps.num_train_timesteps)])
    run = session.new_run(objective, settings, config.paths.pretraining, config.paths.pretrained_here, hashes, {})
    if session.is_complete(run):
        return

    # --- network, noise schedule and images; torch is imported only now, as the lines above do not need it
    from deme.training.trainer import open_training, train

    accelerator, networks, images = open_training(session, partial(make_networks, config, encoders), watched, hashes)
    accelerator.print(
        f"{networks.student.num_parameters():,} parameters, {len(images.training):,} images, "
        f"{len(images.held_out):,} held out"
    )

    # --- train on all timesteps, without a teacher
    write = partial(write_pipeline, config, networks, encoders)
    trainer = train(session, run, networks, images, write)
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
