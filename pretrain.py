"""Pretrain a DDPM from nothing, where no pretrained one can be downloaded (digits, own data).

    python pretrain.py                                  # the embedded digits
    accelerate launch pretrain.py --config FILE         # over many GPUs

Writes the pipeline folder runs/<name>/pretrained/, with pretrain.yaml, which says how it was made;
checkpoints, logs and previews lie in runs/<name>/pretraining/.
The same command again resumes, or does nothing when all is done.
"""

import time
from pathlib import Path

from deme.command import print_once, provenance, run_script
from deme.config import Config
from deme.runs import free_training_settings, training_inputs


def plan(config: Config) -> str:
    return f"pretrain for {config.pretrain.max_steps} steps -> {config.folder / 'pretrained'}"


def main(config: Config) -> None:
    from deme.config import UserError
    from deme.locks import clear_lock
    from deme.runs import check_same_run

    started = time.monotonic()
    settings, output = config.pretrain, config.folder / "pretrained"
    deadline = None if settings.max_minutes is None else started + 60 * settings.max_minutes

    # --- complete already, or not the run that stands there; torch is imported after it
    inputs, free = training_inputs(config, settings), free_training_settings(config, settings)
    check_same_run(work_folder(config), inputs, free)
    if output.exists():
        clear_lock(work_folder(config))
        print_once(f"{output} is complete")
        return

    import diffusers
    import torch

    from deme.data import load_training_images
    from deme.devices import check_shares, locked_by_all, make_accelerator
    from deme.pipelines import check_network, error_line

    # --- network and noise schedule from the configuration
    accelerator = make_accelerator(settings.mixed_precision, "pretrain.mixed_precision")
    check_shares(accelerator.num_processes, settings)
    torch.manual_seed(config.seed)
    try:
        unet = diffusers.UNet2DModel(sample_size=config.data.resolution, **settings.unet)
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=config.timesteps.num_train_timesteps,  # by name, or diffusers takes it for the default
            **settings.scheduler,
        )
        check_network(unet, scheduler)
    except Exception as error:  # diffusers and torch raise whatever a wrong value leads to
        given = f"pretrain.unet={settings.unet}, pretrain.scheduler={settings.scheduler}"
        raise UserError(f"{given}, data.resolution={config.data.resolution}: {error_line(error)}") from None
    data = load_training_images(config.data, unet.config.in_channels, config.image_cache)
    counts = f"{unet.num_parameters():,} parameters, {len(data[0]):,} images, {len(data[1]):,} held out"
    accelerator.print(counts)

    # --- train on all timesteps, without a teacher
    with locked_by_all(accelerator, work_folder(config), "output_dir"):
        if not pretrain(config, accelerator, inputs, free, unet, scheduler, data, deadline):
            accelerator.print(f"stopped after pretrain.max_minutes={settings.max_minutes}; the same command resumes")


def work_folder(config: Config) -> Path:
    return config.folder / "pretraining"


def pretrain(config, accelerator, inputs, free, unet, scheduler, data, deadline) -> bool:
    """Train the network and write the pipeline folder; False when time was up before."""
    import diffusers

    from deme.devices import in_main_process
    from deme.files import atomic_folder, write_yaml
    from deme.runs import claim_folder
    from deme.training import Objective, Trainer

    settings, output, (images, held_out) = config.pretrain, config.folder / "pretrained", data
    claim_folder(accelerator, work_folder(config), inputs, free, provenance(config))
    objective = Objective("pretraining", stream=(0,), timestep_range=(0, config.timesteps.num_train_timesteps))
    trainer = Trainer(
        accelerator, unet, None, scheduler, images, objective, settings, config.seed, work_folder(config), held_out
    )
    if not trainer.run(deadline):
        return False
    has_converged = trainer.state.step < settings.max_steps
    why = "the held-out loss has stopped falling" if has_converged else f"pretrain.max_steps={settings.max_steps}"
    accelerator.print(f"trained for {trainer.state.step} steps: {why}")

    def write() -> None:
        with atomic_folder(output) as temporary:
            diffusers.DDPMPipeline(unet, scheduler).save_pretrained(temporary)
            write_yaml(temporary / "pretrain.yaml", provenance(config))
        print(f"wrote {output}")
        if (start := config.model.pretrained) is not None:
            print(f"finetune.py starts from model.pretrained={start}; set it to null to start from here")

    in_main_process(accelerator, write)
    return True


if __name__ == "__main__":
    run_script(__doc__, plan, main)
