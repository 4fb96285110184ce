"""Draw sample folders from a model's files over all processes: exactly one PNG per seed, a folder per schedule."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deme.config.experiment import Config
from deme.config.paths import image_path
from deme.data import samples
from deme.errors import RunError, naming
from deme.job.files import Watched
from deme.job.processes import Processes, in_main_process, locked_by_all
from deme.job.records import ENCODER, PASSES, SAMPLES, SCHEDULE, Record, provenance
from deme.method.process import process_of
from deme.method.sampling import NetworkAt, ensemble, passed_over, sampler_name
from deme.models.adapters import load_denoisers
from deme.models.denoisers import freeze, load_scheduler
from deme.models.drawing import Drawing, try_samplers
from deme.models.encoder_loading import load_encoder, try_out
from deme.models.pipelines import labels_of
from deme.models.searched import prediction_scales
from deme.models.variants import ModelFiles
from deme.models.weights import weights_hash

GRID_IMAGES = 100
Scales = Sequence[tuple[int, int, float]]  # of the predicted noise, as `scaled` takes them


def draw_samples(
    config: Config, model: ModelFiles, watched: Watched, texts: dict[int, Any], processes: Processes
) -> None:
    """Draw the images of `config.sample` that are missing in its folder, or in the folder of each of its schedules.

    `watched` has the model's files, since before they were checked; `texts` each seed's prompt or label if
    the model takes them.
    """
    drawn, settings = config.drawn, config.sample
    scales = prediction_scales(config)
    drawings, network_at = load_model(processes, drawn, model, scales)
    beside = {"num_images": len(settings.seeds), "seed_offset": settings.seeds.start}
    made_from = identities(drawn, model, scales)
    processes.wait_for_everyone()
    watched.check()  # all processes have read the same
    shares_folder = settings.block is not None  # with jobs of other blocks: it is locked to claim and to count
    block = settings.chosen_blocks[0] if shares_folder else settings.seeds
    lock = partial(locked_by_all, processes, key="sample.output")
    lock_folder = partial(lock, wait=True) if shares_folder else nullcontext
    with ExitStack() as locks:
        for one, drawing, identity in zip(drawn, drawings, made_from, strict=True):  # all, before any is drawn
            told = beside | {PASSES: drawing.passes} | provenance(one)
            output, wanted = one.paths.samples, Record(SAMPLES, identity, told)
            locks.enter_context(lock(samples.block_of(output, block) if shares_folder else output))
            with lock_folder(output), naming("sample.output", output):
                in_main_process(processes, partial(samples.claim_samples, output, wanted, settings, block, texts))
        for one, drawing in zip(drawn, drawings, strict=True):
            output = one.paths.samples
            missing = in_main_process(processes, partial(samples.missing_seeds, output, block))
            count = f"{len(missing):,} of {len(block):,} images to draw"
            processes.print(f"{output}: {count}; {processes.num_processes} process(es) on {processes.device.type}")
            mine = missing[processes.process_index :: processes.num_processes]
            draw(drawing, network_at, mine, texts, output, not processes.is_main_process)
            processes.wait_for_everyone()
            with lock_folder(output):
                in_main_process(processes, partial(finish, one, block))


def load_model(
    processes: Processes, drawn: Sequence[Config], model: ModelFiles, scales: Scales
) -> tuple[list[Drawing], NetworkAt]:
    """Load the networks and the noise schedule, and try them out with the sampler of each schedule."""
    config, settings = drawn[0], drawn[0].sample
    with naming("sample.model", settings.model):
        scheduler = load_scheduler(model.pipeline)
        denoisers = list(load_denoisers(model.pipeline, model.denoisers))
        encoder = load_encoder(model.pipeline, denoisers[0])
        for folder, denoiser in zip(model.denoisers, denoisers, strict=True):
            with naming(folder):
                try_out(denoiser, process_of(scheduler), encoder)
    shape = encoder.shape_of(config.data.resolution)
    schedules, key = [one.sample for one in drawn], "sample.schedules" if len(drawn) > 1 else "sample.scheduler"
    for one, stepper in zip(schedules, try_samplers(schedules, scheduler, shape, key), strict=True):
        if ignored := passed_over(scheduler, stepper):
            told = f"sample.scheduler={one.scheduler} has no {', '.join(ignored)} of the noise schedule"
            can_clip = "clip_sample=true" in ignored and "thresholding" in stepper.config
            processes.print(f"{told}; sample.clip=true may stand for it" if can_clip else told)
    denoisers = [freeze(denoiser, processes.device, settings.mixed_precision) for denoiser in denoisers]
    encoder.prepare(processes.device, settings.mixed_precision)
    drawings = [Drawing(scheduler, encoder, one, shape, processes.device, scales) for one in schedules]
    return drawings, ensemble(denoisers, ranges_of(config, model))


def ranges_of(config: Config, model: ModelFiles) -> list[tuple[int, int]]:
    """The timesteps of each denoiser: its pipeline's or the configured ranges, all of them for a single network."""
    if model.ranges:
        return list(model.ranges)
    return config.timesteps.ranges if len(model.denoisers) > 1 else [(0, config.timesteps.num_train_timesteps)]


def identities(drawn: Sequence[Config], model: ModelFiles, scales: Scales) -> list[dict[str, Any]]:
    """Everything that determines the images of each schedule, for their records."""
    hashes, weights = model.hashes(), list(map(weights_hash, model.denoisers))
    schedule, architecture = hashes.pop(SCHEDULE), model.architecture()
    config = drawn[0]
    unused = {"scheduler", "timestep_spacing", "prediction_scale"} | (
        {} if ENCODER in hashes or labels_of(model.pipeline) else config.sample.tagged("text")
    ).keys()
    return [
        {
            "weights": weights,
            "timesteps": [list(edges) for edges in ranges_of(config, model)],
            "scheduler": schedule,
            "sample.scheduler": sampler_name(one.scheduler),
            "resolution": config.data.resolution,
            **{key: value for key, value in one.tagged("samples").items() if key not in unused},
            **model.spacing(one),
            **model.sampling(),
            **({"prediction_scale": list(map(list, scales))} if scales else {}),
            **hashes,
            **architecture,
        }
        for one in (other.sample for other in drawn)
    ]


def draw(
    drawing: Drawing, network_at: NetworkAt, seeds: list[int], texts: dict[int, Any], output: Path, is_silent: bool
) -> None:
    """Draw the images of these seeds; threads write one batch while the next is drawn."""
    settings = drawing.settings
    batches = [seeds[start : start + settings.batch_size] for start in range(0, len(seeds), settings.batch_size)]
    writes = ()
    with ThreadPoolExecutor(max_workers=4) as pool:
        for batch in tqdm(batches, output.name, unit="batch", disable=is_silent or not batches):
            images = drawing.images(network_at, batch, [texts[seed] for seed in batch if texts])
            list(writes)  # a full disk stops the run here
            writes = pool.map(partial(samples.write_image, output, size=settings.size_on_disk), batch, images)
        list(writes)


def finish(config: Config, block: range) -> None:
    """Check that the block is complete; if the whole folder is, write the contact sheet."""
    output, seeds = config.paths.samples, config.sample.seeds
    left = [seed for seed in block if not image_path(output, seed).exists()]
    if left:
        raise RunError(f"{output}: {len(left):,} of {len(block):,} images are not there; the same command goes on")
    count = samples.count_samples(output, seeds)
    if count < len(seeds):
        print(f"{output}: {count:,} of {len(seeds):,} images, with those of other blocks")
        return
    first = [image_path(output, seed) for seed in seeds[:GRID_IMAGES]]
    samples.save_grid(samples.read_images(first), config.paths.grid)
    print(f"{output}: {len(seeds):,} images; {config.paths.grid}")
