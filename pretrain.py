"""Pretrain a DDPM from nothing, where no pretrained one can be downloaded (digits, own data).

    python pretrain.py                                  # the embedded digits
    accelerate launch pretrain.py --config FILE         # over many GPUs

Writes the pipeline folder runs/<name>/pretrained/, with pretrain.yaml, which says how it was made;
checkpoints, logs and previews lie in runs/<name>/pretraining/.
The same command again resumes, or does nothing when all is done.
"""

import time

from deme.command import provenance, run_script
from deme.config import Config, training_inputs


def plan(config: Config) -> str:
    return f"pretrain for {config.pretrain.max_steps} steps -> {config.folder / 'pretrained'}"


def main(config: Config) -> None:
    import diffusers
    import torch

    from deme.config import UserError
    from deme.data import load_training_images
    from deme.devices import check_shares, make_accelerator
    from deme.files import atomic_folder, write_yaml
    from deme.runs import claim_folder
    from deme.training import Objective, Trainer

    started = time.monotonic()
    settings, output, work = config.pretrain, config.folder / "pretrained", config.folder / "pretraining"

    # --- the run's folder, or the same run in it
    accelerator = make_accelerator(settings.mixed_precision, "pretrain.mixed_precision")
    check_shares(accelerator.num_processes, settings)
    claim_folder(accelerator, work, training_inputs(config, settings), provenance(config))
    if output.exists():
        accelerator.print(f"{output} is complete")
        return

    # --- network and noise schedule from the configuration
    torch.manual_seed(config.seed)
    try:
        unet = diffusers.UNet2DModel(sample_size=config.data.resolution, **settings.unet)
        scheduler = diffusers.DDPMScheduler(config.timesteps.num_train_timesteps, **settings.scheduler)
    except (TypeError, ValueError) as error:
        raise UserError(f"pretrain.unet={settings.unet}, pretrain.scheduler={settings.scheduler}: {error}") from None
    images, held_out = load_training_images(config.data, unet.config.in_channels, config.image_cache)
    counts = f"{unet.num_parameters():,} parameters, {len(images):,} images, {len(held_out):,} held out"
    accelerator.print(counts)

    # --- train on all timesteps, without a teacher
    objective = Objective("pretraining", stream=(0,), timestep_range=(0, config.timesteps.num_train_timesteps))
    trainer = Trainer(accelerator, unet, None, scheduler, images, objective, settings, config.seed, work, held_out)
    deadline = None if settings.max_minutes is None else started + 60 * settings.max_minutes
    if not trainer.run(deadline):
        accelerator.print(f"stopped after pretrain.max_minutes={settings.max_minutes}; the same command resumes")
        return
    has_converged = trainer.state.step < settings.max_steps
    why = "the held-out loss has stopped falling" if has_converged else f"pretrain.max_steps={settings.max_steps}"
    accelerator.print(f"trained for {trainer.state.step} steps: {why}")
    if accelerator.is_main_process:
        with atomic_folder(output) as temporary:
            diffusers.DDPMPipeline(unet, scheduler).save_pretrained(temporary)
            write_yaml(temporary / "pretrain.yaml", provenance(config))
        print(f"wrote {output}")
        if config.model.pretrained is not None:
            print(
                f"finetune.py starts from model.pretrained={config.model.pretrained}; set it to null to start from here"
            )


if __name__ == "__main__":
    run_script(__doc__, plan, main)
