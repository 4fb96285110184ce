"""Draw images with DDIM over all processes: exactly sample.num_images PNGs, each named by its seed.

    accelerate launch sample_ddp.py                              # from the merged model
    accelerate launch sample_ddp.py sample.model=pretrained      # or continued, ensemble, or a folder

Writes runs/<name>/samples/<model>/000000.png … and the contact sheet samples/grid-<model>.png. An image depends on
its seed alone, not on the batch or the number of processes. A second run writes only what is missing; a folder that
another model or other settings filled is refused unless sample.overwrite=true.
"""

from dataclasses import dataclass
from pathlib import Path

from deme.command import provenance, run_script
from deme.config import CONTINUED, Config, RunError, Sample, UserError

GRID_IMAGES = 100


@dataclass(frozen=True)
class Source:
    """Where a model's networks and noise schedule lie."""

    unets: list[Path]  # one UNet folder, or one per timestep range
    pipeline: str  # whose scheduler is used: a folder or a Hub id


def find_source(config: Config) -> Source:
    """
    Raises:
        UserError: the model is unknown or not made yet; says how it is made.
    """
    from deme.pipelines import find_pipeline, unet_folder

    model = config.sample.model
    if model == "pretrained":
        return Source([unet_folder(find_pipeline(config.pretrained))], config.pretrained)
    named = {
        "merged": (Source([config.merged / "unet"], str(config.merged)), "merge.py"),
        "ensemble": (Source(config.merge_inputs, config.pretrained), "finetune.py"),
        CONTINUED: (
            Source([config.finetuned_folder(None) / "unet"], config.pretrained),
            f"finetune.py finetune.range={CONTINUED}",
        ),
    }
    if model in named:
        source, maker = named[model]
        for folder in source.unets:
            if not folder.is_dir():
                raise UserError(f"sample.model={model}: {folder} is missing; {maker} makes it")
        return source
    folder = Path(model)
    if (folder / "unet").is_dir():
        has_scheduler = (folder / "scheduler").is_dir()
        return Source([folder / "unet"], model if has_scheduler else config.pretrained)
    if (folder / "config.json").is_file():
        return Source([folder], config.pretrained)
    raise UserError(
        f"sample.model={model}: not merged, pretrained, {CONTINUED}, ensemble, or a folder that holds a UNet"
    )


def output_folder(config: Config) -> Path:
    if config.sample.output is not None:
        return Path(config.sample.output)
    parts = [part for part in Path(config.sample.model).parts if part not in ("/", ".", "..")]
    return config.folder / "samples" / "-".join(parts)


def plan(config: Config) -> str:
    settings = config.sample
    last = settings.seed_offset + settings.num_images - 1
    return f"draw seeds {settings.seed_offset} ... {last} from {settings.model} -> {output_folder(config)}"


def main(config: Config) -> None:
    from deme.files import sha256
    from deme.pipelines import (
        SCHEDULER_CONFIG,
        check_fits,
        check_usable,
        find_pipeline,
        load_scheduler,
        load_unet,
        scheduler_folder,
        weights_file,
    )

    settings, output, source = config.sample, output_folder(config), find_source(config)
    pipeline = find_pipeline(source.pipeline)
    check_fits(config, source.unets, pipeline)  # torch is imported after what can be answered without it

    from deme.devices import in_main_process, locked_by_all, make_accelerator
    from deme.inference import freeze
    from deme.samples import claim_samples, image_path, missing_seeds, read_images
    from deme.sampling import ensemble, save_grid

    # --- networks and noise schedule
    accelerator = make_accelerator(settings.mixed_precision, "sample.mixed_precision")
    scheduler, unets = load_scheduler(pipeline), [load_unet(folder) for folder in source.unets]
    for unet, folder in zip(unets, source.unets, strict=True):
        check_usable(unet, scheduler, str(folder))
    unets = [freeze(unet, accelerator.device, settings.mixed_precision) for unet in unets]
    ranges = config.timesteps.ranges if len(unets) > 1 else [(0, config.timesteps.num_train_timesteps)]
    shape = (unets[0].config.in_channels, config.data.resolution, config.data.resolution)

    # --- the folder: what it is made from, and which images are missing
    identity = {
        "weights": [sha256(weights_file(folder)) for folder in source.unets],
        "timesteps": [list(edges) for edges in ranges],
        "scheduler": sha256(scheduler_folder(pipeline) / SCHEDULER_CONFIG),
        "num_inference_steps": settings.num_inference_steps,
        "eta": settings.eta,
        "mixed_precision": settings.mixed_precision,
        "resolution": config.data.resolution,
    }
    seeds = range(settings.seed_offset, settings.seed_offset + settings.num_images)

    def claim() -> list[int]:
        claim_samples(output, identity, seeds, settings.overwrite, provenance(config))
        return missing_seeds(output, seeds)

    def finish() -> None:
        left = [seed for seed in seeds if not image_path(output, seed).exists()]
        if left:
            raise RunError(f"{output}: {len(left):,} of {len(seeds):,} images are not there; the same command goes on")
        grid = output.with_name(f"grid-{output.name}.png")
        save_grid(read_images([image_path(output, seed) for seed in seeds[:GRID_IMAGES]]), grid)
        print(f"{output}: {len(seeds):,} images; {grid}")

    with locked_by_all(accelerator, output, "sample.output"):
        missing = in_main_process(accelerator, claim)
        processes = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        accelerator.print(f"{output}: {len(missing):,} of {len(seeds):,} images to draw; {processes}")
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        draw(accelerator, settings, ensemble(unets, ranges), scheduler, shape, mine, output)
        accelerator.wait_for_everyone()
        in_main_process(accelerator, finish)


def draw(accelerator, settings: Sample, network_at, scheduler, shape: tuple, seeds: list[int], output: Path) -> None:
    """Draw the images of these seeds; threads write one batch while the next is drawn."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from deme.samples import write_image
    from deme.sampling import sample_images

    batches = [seeds[start : start + settings.batch_size] for start in range(0, len(seeds), settings.batch_size)]
    silent = not accelerator.is_main_process or not batches
    steps, writes = settings.num_inference_steps, []
    with ThreadPoolExecutor(max_workers=4) as pool:
        for batch in tqdm(batches, settings.model, unit="batch", disable=silent):
            with accelerator.autocast():
                images = sample_images(network_at, scheduler, batch, shape, accelerator.device, steps, settings.eta)
            for write in writes:
                write.result()  # a full disk stops the run here
            writes = [pool.submit(write_image, output, *pair) for pair in zip(batch, images, strict=True)]
        for write in writes:
            write.result()


if __name__ == "__main__":
    run_script(__doc__, plan, main)
