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

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.paths import image_path
from deme.config.sections import Sample
from deme.data.prompts import claim_prompts, load_prompts
from deme.errors import RunError, naming
from deme.job.command import run_script
from deme.job.files import check_apart, sha256
from deme.job.records import ENCODER, SAMPLES, Record, provenance
from deme.models.pipelines import encoders_hash, takes_text
from deme.models.variants import find_model
from deme.models.weights import weights_hash

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DDPMScheduler

    from deme.method.sampling import NetworkAt
    from deme.models.encoders import Encoder

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
    # --- the model
    settings = config.sample
    output = config.paths.samples
    with naming("sample.model", settings.model):
        model = find_model(settings.model, config.paths)
    check_apart("sample.output", output, model.denoisers)
    watched = model.watched()
    model.check_fits(config)

    # --- what is drawn: image i from seed i and, where the model takes text, prompt i
    seeds = settings.seeds
    shares = settings.block is not None  # the folder, with jobs that draw other blocks
    block = settings.chosen_blocks[0] if shares else seeds
    texts = prompts_of(settings, takes_text(model.pipeline), seeds)

    # --- torch is imported after what can be answered without it
    from deme.data.samples import (
        block_of,
        claim_samples,
        count_samples,
        missing_seeds,
        read_images,
        save_grid,
    )
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.method.sampling import ensemble, passed_over, sampler_name, try_sampler
    from deme.models.denoisers import load_denoiser, load_scheduler, try_out
    from deme.models.encoders import load_encoder
    from deme.models.inference import freeze

    # --- networks and noise schedule
    accelerator = make_accelerator(settings.mixed_precision, "sample.mixed_precision")
    with naming("sample.model", settings.model):
        scheduler = load_scheduler(model.pipeline)
        unets = [load_denoiser(folder) for folder in model.denoisers]
        encoder = load_encoder(model.pipeline, unets[0])
        for folder, unet in zip(model.denoisers, unets, strict=True):
            with naming(folder):
                try_out(unet, scheduler, encoder)
    size = unets[0].config.sample_size
    shape = (unets[0].config.in_channels, size, size)
    with naming("sample.scheduler", settings.scheduler):
        sampler = (settings.scheduler, settings.num_inference_steps, shape, settings.timestep_spacing)
        stepper = try_sampler(scheduler, *sampler)
    if ignored := passed_over(scheduler, stepper):
        accelerator.print(f"sample.scheduler={settings.scheduler} has no {', '.join(ignored)} of the noise schedule")
    unets = [freeze(unet, accelerator.device, settings.mixed_precision) for unet in unets]
    encoder.prepare(accelerator.device, settings.mixed_precision)
    ranges = config.timesteps.ranges if len(unets) > 1 else [(0, config.timesteps.num_train_timesteps)]

    # --- the folder: what it is made from, and which images are missing
    made_from = {
        "weights": list(map(weights_hash, model.denoisers)),
        "timesteps": [list(edges) for edges in ranges],
        "scheduler": sha256(model.schedule),
        "num_inference_steps": settings.num_inference_steps,
        "sample.scheduler": sampler_name(settings.scheduler),
        "eta": settings.eta,
        "mixed_precision": settings.mixed_precision,
        "resolution": config.data.resolution,
        "size_on_disk": settings.size_on_disk,
        **model.spacing(settings),
    }
    if texts:
        made_from |= {
            ENCODER: encoders_hash(model.pipeline),
            "negative_prompt": settings.negative_prompt,
            "guidance_scale": settings.guidance_scale,
        }
    beside = {"num_images": len(seeds), "seed_offset": seeds.start, **provenance(config)}
    wanted = Record(SAMPLES, made_from, beside)
    accelerator.wait_for_everyone()
    watched.check()  # all processes have read the same

    def claim() -> None:
        with naming("sample.output", output):
            claim_samples(output, wanted, seeds, settings.overwrite, block)
            if texts:
                claim_prompts(
                    output, {image_path(output, seed).name: texts[seed] for seed in seeds}, settings.overwrite
                )

    def finish() -> None:
        left = [seed for seed in block if not image_path(output, seed).exists()]
        if left:
            raise RunError(f"{output}: {len(left):,} of {len(block):,} images are not there; the same command goes on")
        count = count_samples(output, seeds)
        if count < len(seeds):
            print(f"{output}: {count:,} of {len(seeds):,} images, with those of other blocks")
            return
        save_grid(read_images([image_path(output, seed) for seed in seeds[:GRID_IMAGES]]), config.paths.grid)
        print(f"{output}: {len(seeds):,} images; {config.paths.grid}")

    # --- draw them; who draws a block holds that, and the folder only while it claims and counts
    held = block_of(output, block) if shares else output

    def alone() -> AbstractContextManager[None]:
        return locked_by_all(accelerator, output, "sample.output", wait=True) if shares else nullcontext()

    with locked_by_all(accelerator, held, "sample.output"):
        with alone():
            in_main_process(accelerator, claim)
        missing = in_main_process(accelerator, lambda: missing_seeds(output, block))
        processes = f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
        accelerator.print(f"{output}: {len(missing):,} of {len(block):,} images to draw; {processes}")
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        draw(accelerator, settings, ensemble(unets, ranges), scheduler, encoder, shape, mine, texts, output)
        accelerator.wait_for_everyone()
        with alone():
            in_main_process(accelerator, finish)


def prompts_of(settings: Sample, takes_text: bool, seeds: range) -> dict[int, str]:
    """The prompt of each seed, which take them in turn; none where the model takes none."""
    has_prompts = settings.prompts is not None
    settings.check("prompts", takes_text or not has_prompts, f"sample.model={settings.model} takes none")
    settings.check("prompts", has_prompts or not takes_text, f"sample.model={settings.model} needs prompts")
    if not takes_text:
        return {}
    with naming("sample.prompts", settings.prompts):
        prompts = load_prompts(settings.prompts, settings.prompt_column)
    return {seed: prompts[seed % len(prompts)] for seed in seeds}


def draw(
    accelerator: "Accelerator",
    settings: Sample,
    network_at: "NetworkAt",
    scheduler: "DDPMScheduler",
    encoder: "Encoder",
    shape: tuple[int, int, int],
    seeds: list[int],
    texts: dict[int, str],
    output: Path,
) -> None:
    """Draw the images of these seeds; threads write one batch while the next is drawn.

    Args:
        shape: (C, H, W) of an image or a latent.
        texts: seed → prompt; empty where the model takes none.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from deme.data.samples import write_image
    from deme.models.drawing import Drawing

    drawing = Drawing(scheduler, encoder, settings, shape, accelerator.device)
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


if __name__ == "__main__":
    run_script(__doc__, plan, main)
