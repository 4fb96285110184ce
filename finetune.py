"""Decouple: finetune one copy of the pretrained UNet per timestep range.

    accelerate launch finetune.py                            # every range in turn
    accelerate launch finetune.py finetune.range=2           # one, counted from 0: a cluster runs them in parallel
    accelerate launch finetune.py finetune.range=continued   # the control: plain training on all timesteps, equal cost

Writes runs/<name>/finetuned/0000-0250/unet/ and so on (EMA weights); checkpoints, logs and previews lie beside it.
The same command again resumes, or does nothing when all is done.
"""

import copy
import time
from dataclasses import replace

from deme.command import print_once, provenance, run_script
from deme.config import CONTINUED, Config, Finetune, range_name
from deme.runs import free_training_settings, training_inputs


def chosen_ranges(config: Config) -> list[tuple[int, int] | None]:
    """What this command trains: timestep ranges, or None for the control."""
    chosen, ranges = config.finetune.range, config.timesteps.ranges
    if chosen == CONTINUED:
        return [None]
    return ranges if chosen is None else [ranges[chosen]]


def settings_for(config: Config, timestep_range: tuple[int, int] | None) -> Finetune:
    """The control trains on all timesteps with the plain loss, for as many steps as all ranges together."""
    if timestep_range is not None:
        return config.finetune
    steps = len(config.timesteps.ranges) * config.finetune.max_steps
    return replace(config.finetune, max_steps=steps, global_probability=1.0, consistency_weight=0.0)


def plan(config: Config) -> str:
    lines = []
    for timestep_range in chosen_ranges(config):
        folder, settings = config.finetuned_folder(timestep_range), settings_for(config, timestep_range)
        state = "complete" if (folder / "unet").exists() else f"{settings.max_steps} steps"
        lines.append(f"finetune {config.pretrained} on {range_name(timestep_range)} -> {folder / 'unet'}: {state}")
    return "\n".join(lines)


def main(config: Config) -> None:
    from deme.files import sha256
    from deme.locks import clear_lock
    from deme.pipelines import (
        check_fits,
        check_usable,
        find_pipeline,
        load_scheduler,
        load_unet,
        unet_folder,
        weights_file,
    )
    from deme.runs import check_same_run

    started, max_minutes = time.monotonic(), config.finetune.max_minutes
    deadline = None if max_minutes is None else started + 60 * max_minutes

    # --- what is left to do; torch is imported after what can be answered without it
    pretrained, runs = find_pipeline(config.pretrained), {}
    check_fits(config, [unet_folder(pretrained)], pretrained)
    weights_hash = sha256(weights_file(unet_folder(pretrained)))
    for timestep_range in chosen_ranges(config):
        folder, inputs = config.finetuned_folder(timestep_range), run_inputs(config, timestep_range, weights_hash)
        check_same_run(folder, inputs, free_training_settings(config, config.finetune))
        if (folder / "unet").exists():
            clear_lock(folder)
            print_once(f"{folder / 'unet'} is complete")
        else:
            runs[timestep_range] = inputs
    if not runs:
        return

    # --- the pretrained network and the images
    import gc

    from deme.data import load_training_images
    from deme.devices import check_shares, locked_by_all, make_accelerator

    accelerator = make_accelerator(config.finetune.mixed_precision, "finetune.mixed_precision")
    check_shares(accelerator.num_processes, config.finetune)
    scheduler, unet = load_scheduler(pretrained), load_unet(unet_folder(pretrained))
    check_usable(unet, scheduler, f"model.pretrained={config.pretrained}")
    images, _ = load_training_images(config.data, unet.config.in_channels, config.image_cache)
    accelerator.print(
        f"{config.pretrained}: {unet.num_parameters():,} parameters; {len(images):,} images; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )

    # --- one run per range
    for timestep_range, inputs in runs.items():
        with locked_by_all(accelerator, config.finetuned_folder(timestep_range), "output_dir"):
            complete = finetune(config, timestep_range, inputs, unet, scheduler, images, deadline)
        if not complete:
            accelerator.print(f"stopped after finetune.max_minutes={max_minutes}; the same command resumes")
            return
        gc.collect()  # autocast's wrappers tie the last range's networks into cycles, which would keep their memory


def run_inputs(config: Config, timestep_range: tuple[int, int] | None, weights_hash: str) -> dict:
    """Everything that determines the weights of one run, flat."""
    return training_inputs(config, settings_for(config, timestep_range)) | {
        "finetune.range": range_name(timestep_range),
        "model.projection": config.model.projection and timestep_range is not None,
        "pretrained weights (SHA-256)": weights_hash,
    }


def finetune(config, timestep_range, inputs, pretrained_unet, scheduler, images, deadline) -> bool:
    """Train one copy of the pretrained UNet; True when it is complete, False when time was up."""
    from deme.devices import in_main_process, make_accelerator
    from deme.files import atomic_folder
    from deme.projection import ProjectedUNet2DModel
    from deme.runs import claim_folder
    from deme.training import Objective, Trainer

    is_control = timestep_range is None
    folder, settings = config.finetuned_folder(timestep_range), settings_for(config, timestep_range)
    accelerator = make_accelerator(settings.mixed_precision, "finetune.mixed_precision")  # one loss scale per run
    claim_folder(accelerator, folder, inputs, free_training_settings(config, settings), provenance(config))

    # --- student and teacher start from the same weights
    projected = inputs["model.projection"]
    student = ProjectedUNet2DModel.from_unet(pretrained_unet) if projected else copy.deepcopy(pretrained_unet)
    teacher = copy.deepcopy(pretrained_unet) if settings.consistency_weight > 0 else None

    # --- train
    all_timesteps = (0, config.timesteps.num_train_timesteps)
    objective = Objective(
        name=range_name(timestep_range),
        stream=(1,) if is_control else (2, *timestep_range),
        timestep_range=all_timesteps if is_control else timestep_range,
        global_probability=settings.global_probability,
        consistency_weight=settings.consistency_weight,
    )
    trainer = Trainer(accelerator, student, teacher, scheduler, images, objective, settings, config.seed, folder)
    if not trainer.run(deadline):
        return False

    # --- the EMA weights
    def write() -> None:
        with atomic_folder(folder / "unet") as temporary:
            student.save_pretrained(temporary)
        print(f"wrote {folder / 'unet'}")

    in_main_process(accelerator, write)
    return True


if __name__ == "__main__":
    run_script(__doc__, plan, main)
