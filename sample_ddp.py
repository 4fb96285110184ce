"""Draw images over all processes: exactly sample.num_images PNGs, each named by its seed.

    accelerate launch sample_ddp.py                              # from the merged model, by DDIM
    accelerate launch sample_ddp.py sample.model=pretrained      # or continued, ensemble, distilled, or a folder
    accelerate launch sample_ddp.py sample.scheduler=dpmsolver++ sample.num_inference_steps=20
    accelerate launch sample_ddp.py --config configs/stable_diffusion_v1_4.yaml "sample.prompts=[a cat, a dog]" \
        sample.num_images=2

Writes runs/<name>/samples/<model>/000000.png … and the contact sheet samples/grid-<model>.png. An image depends on
its seed alone, not on the batch or the number of processes. A second run writes only what is missing; a folder that
another model or other settings filled is refused unless sample.overwrite=true. Of sample.blocks=8 parts of the seeds,
jobs with sample.block=0 … 7 draw one each into the same folder, at the same time; the last one counts them all.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deme.config.experiment import Config
from deme.config.paths import image_path
from deme.config.sections import Sample
from deme.data.samples import claim_prompts, load_prompts
from deme.errors import RunError, naming
from deme.job.command import run_script
from deme.job.files import check_apart, sha256
from deme.job.records import ENCODER, SAMPLES, Record, provenance
from deme.models.kinds import schedule_file
from deme.models.pipelines import encoders_hash, takes_text
from deme.models.variants import ModelFiles, find_model
from deme.models.weights import weights_hash

if TYPE_CHECKING:
    from accelerate import Accelerator

    from deme.method.sampling import NetworkAt
    from deme.models.encoders import Drawing

GRID_IMAGES = 100


def plan(config: Config) -> str:
    """What this command would do."""
    from deme.data.samples import count_samples

    output = config.paths.samples
    lines = []
    for seeds in config.sample.chosen_blocks:
        count = count_samples(output, seeds)
        state = "complete" if count == len(seeds) else f"{count} of {len(seeds)} images"
        lines.append(f"draw seeds {seeds[0]} ... {seeds[-1]} from {config.sample.model} -> {output}: {state}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Draw the images that are missing."""
    # --- the model, and what is drawn: image i from seed i and, where the model takes text, prompt i
    settings = config.sample
    output = config.paths.samples
    with naming("sample.model", settings.model):
        model = find_model(settings.model, config.paths)
    check_apart("sample.output", output, model.denoisers)
    watched = model.watched()
    model.check_fits(config)
    shares_folder = settings.block is not None  # with jobs that draw other blocks
    block = settings.chosen_blocks[0] if shares_folder else settings.seeds
    texts = prompts_of(settings, takes_text(model.pipeline))

    # --- torch is imported after what can be answered without it
    from deme.data.samples import block_of, missing_seeds
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.method.sampling import sampler_name

    # --- networks and noise schedule
    accelerator = make_accelerator(settings.mixed_precision, "sample.mixed_precision")
    drawing, network_at = load(accelerator, config, model)
    beside = {"num_images": len(settings.seeds), "seed_offset": settings.seeds.start, **provenance(config)}
    wanted = Record(SAMPLES, identity(config, model, sampler_name(settings.scheduler)), beside)
    accelerator.wait_for_everyone()
    watched.check()  # all processes have read the same

    # --- draw; a job that draws a block locks that, and the folder only while it claims and counts
    lock = partial(locked_by_all, accelerator, key="sample.output")
    lock_folder = partial(lock, output, wait=True) if shares_folder else nullcontext
    with lock(block_of(output, block) if shares_folder else output):
        with lock_folder():
            in_main_process(accelerator, partial(claim, config, wanted, block, texts))
        missing = in_main_process(accelerator, partial(missing_seeds, output, block))
        processes = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        accelerator.print(f"{output}: {len(missing):,} of {len(block):,} images to draw; {processes}")
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        draw(accelerator, drawing, network_at, mine, texts, output)
        accelerator.wait_for_everyone()
        with lock_folder():
            in_main_process(accelerator, partial(finish, config, block))


def prompts_of(settings: Sample, takes_text: bool) -> dict[int, str]:
    """Seed → prompt, the prompts in turn; empty where the model takes none."""
    has_prompts = settings.prompts is not None
    settings.check("prompts", takes_text or not has_prompts, f"sample.model={settings.model} takes none")
    settings.check("prompts", has_prompts or not takes_text, f"sample.model={settings.model} needs prompts")
    if not takes_text:
        return {}
    with naming("sample.prompts", settings.prompts):
        prompts = load_prompts(settings.prompts, settings.prompt_column)
    return {seed: prompts[seed % len(prompts)] for seed in settings.seeds}


def ranges_of(config: Config, model: ModelFiles) -> list[tuple[int, int]]:
    """The timesteps of each denoiser: the configured ranges for an ensemble, all of them for a single network."""
    return config.timesteps.ranges if len(model.denoisers) > 1 else [(0, config.timesteps.num_train_timesteps)]


def load(accelerator: "Accelerator", config: Config, model: ModelFiles) -> tuple["Drawing", "NetworkAt"]:
    """Load the networks and the noise schedule, and try them out with the sampler."""
    from deme.method.sampling import ensemble, passed_over, try_sampler
    from deme.models.denoisers import load_denoiser, load_scheduler, try_out
    from deme.models.encoders import Drawing, load_encoder
    from deme.models.inference import freeze

    settings = config.sample
    with naming("sample.model", settings.model):
        scheduler = load_scheduler(model.pipeline)
        denoisers = [load_denoiser(folder) for folder in model.denoisers]
        encoder = load_encoder(model.pipeline, denoisers[0])
        for folder, denoiser in zip(model.denoisers, denoisers, strict=True):
            with naming(folder):
                try_out(denoiser, scheduler, encoder)
    size = denoisers[0].config.sample_size
    shape = (denoisers[0].config.in_channels, size, size)
    with naming("sample.scheduler", settings.scheduler):
        sampler = (settings.scheduler, settings.num_inference_steps, shape, settings.timestep_spacing)
        stepper = try_sampler(scheduler, *sampler)
    if ignored := passed_over(scheduler, stepper):
        accelerator.print(f"sample.scheduler={settings.scheduler} has no {', '.join(ignored)} of the noise schedule")
    denoisers = [freeze(denoiser, accelerator.device, settings.mixed_precision) for denoiser in denoisers]
    encoder.prepare(accelerator.device, settings.mixed_precision)
    drawing = Drawing(scheduler, encoder, settings, shape, accelerator.device)
    return drawing, ensemble(denoisers, ranges_of(config, model))


def identity(config: Config, model: ModelFiles, sampler: str) -> dict[str, Any]:
    """Everything that determines the images, for their record."""
    of_text = takes_text(model.pipeline)
    unused = {"scheduler", "timestep_spacing"} | ({} if of_text else config.sample.tagged("text")).keys()
    return {
        "weights": list(map(weights_hash, model.denoisers)),
        "timesteps": [list(edges) for edges in ranges_of(config, model)],
        "scheduler": sha256(schedule_file(model.pipeline)),
        "sample.scheduler": sampler,
        "resolution": config.data.resolution,
        **{key: value for key, value in config.sample.tagged("samples").items() if key not in unused},
        **model.spacing(config.sample),
        **({ENCODER: encoders_hash(model.pipeline)} if of_text else {}),
    }


def claim(config: Config, wanted: Record, block: range, texts: dict[int, str]) -> None:
    """Create the folder, or make sure that it belongs to the same images."""
    from deme.data.samples import claim_samples

    settings = config.sample
    output = config.paths.samples
    with naming("sample.output", output):
        claim_samples(output, wanted, settings.seeds, settings.overwrite, block)
        if texts:
            by_name = {image_path(output, seed).name: text for seed, text in texts.items()}
            claim_prompts(output, by_name, settings.overwrite)


def draw(
    accelerator: "Accelerator",
    drawing: "Drawing",
    network_at: "NetworkAt",
    seeds: list[int],
    texts: dict[int, str],
    output: Path,
) -> None:
    """Draw the images of these seeds; threads write one batch while the next is drawn."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from deme.data.samples import write_image

    settings = drawing.settings
    batches = [seeds[start : start + settings.batch_size] for start in range(0, len(seeds), settings.batch_size)]
    silent = not accelerator.is_main_process or not batches
    writes = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        for batch in tqdm(batches, settings.model, unit="batch", disable=silent):
            images = drawing.images(network_at, batch, [texts[seed] for seed in batch if texts])
            for write in writes:
                write.result()  # a full disk stops the run here
            pairs = zip(batch, images, strict=True)
            writes = [pool.submit(write_image, output, *pair, settings.size_on_disk) for pair in pairs]
        for write in writes:
            write.result()


def finish(config: Config, block: range) -> None:
    """Check that the block is complete; if the whole folder is, write the contact sheet."""
    from deme.data.samples import count_samples, read_images, save_grid

    output = config.paths.samples
    seeds = config.sample.seeds
    left = [seed for seed in block if not image_path(output, seed).exists()]
    if left:
        raise RunError(f"{output}: {len(left):,} of {len(block):,} images are not there; the same command goes on")
    count = count_samples(output, seeds)
    if count < len(seeds):
        print(f"{output}: {count:,} of {len(seeds):,} images, with those of other blocks")
        return
    save_grid(read_images([image_path(output, seed) for seed in seeds[:GRID_IMAGES]]), config.paths.grid)
    print(f"{output}: {len(seeds):,} images; {config.paths.grid}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
