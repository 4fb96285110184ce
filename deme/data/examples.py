"""What a run is trained on: images, with captions where the network takes them, encoded once or in each step."""

import shutil
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from deme.config.experiment import Config
from deme.config.sections import Data, Training
from deme.data.captions import CaptionedImages
from deme.data.images import CroppedImages, TrainingImages
from deme.data.latents import (
    DATA_STATE,
    INDEX,
    CachedLatents,
    count_images,
    fits,
    num_parts,
    write_index,
    write_part,
    write_state,
)
from deme.data.opening import open_source
from deme.data.sources import as_opened, load_training_images, split_held_out
from deme.job.files import make_folder
from deme.job.processes import in_main_process, locked_by_all
from deme.job.records import DATA, ENCODER, LATENTS, Record
from deme.models.encoders import Encoder

# of the data, beside what its fingerprint tells
KEYS = ("image_column", "resolution", "center_crop", "random_flip", "skip_unreadable", "cached_views")


def load_examples(
    config: Config, settings: Training, encoder: Encoder, made_of: dict[str, str], accelerator: Accelerator
) -> TrainingImages:
    """The configured data as the encoder takes it.

    Args:
        settings: the run's own.
        made_of: what tells the data, and the encoders if there are any, from others, as in the run's record.
    """
    data = config.data
    check_captions(data, encoder)
    if not data.cache_latents:
        return load_training_images(data, encoder.image_channels, config.paths.image_cache, settings.caption_dropout)
    encoder.prepare(accelerator.device, settings.mixed_precision)
    folder = cached_latents(config, encoder, made_of, accelerator)
    parts = split_held_out(data, count_images(folder))
    return TrainingImages(*(CachedLatents(folder, chosen, settings.caption_dropout) for chosen in parts))


def check_captions(data: Data, encoder: Encoder) -> None:
    """"""
    has_captions = data.caption_column is not None
    data.check("caption_column", has_captions or not encoder.takes_text, "a text-to-image model needs captions")
    data.check("caption_column", encoder.takes_text or not has_captions, "the model takes no captions")
    data.check("cache_latents", encoder.takes_text or not data.cache_latents, "the model works on pixels")


def cached_latents(config: Config, encoder: Encoder, made_of: dict[str, str], accelerator: Accelerator) -> Path:
    """The folder of the data's latents and embeddings, made once by all processes; what a killed job made is kept.

    Another job that wants the same waits for this one.
    """
    data = as_opened(config.data)
    made_from = {
        **{key: made_of[key] for key in (DATA, ENCODER)},
        "type": str(encoder.dtype),
        **{key: getattr(data, key) for key in KEYS},
    }
    folder = config.paths.latent_cache / Record(LATENTS, made_from).digest

    source = open_source(data)

    def is_complete() -> bool:
        return in_main_process(accelerator, lambda: (folder / INDEX).exists() and fits(folder, source))

    def prepare() -> None:
        if not (
            (folder / DATA_STATE).exists() and fits(folder, source)
        ):  # begun on other images, or by an older version
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder, "output_dir")
            write_state(folder, source)

    if is_complete():
        return folder
    with locked_by_all(accelerator, folder, "output_dir", wait=True):
        if not is_complete():  # as it may be after the wait
            in_main_process(accelerator, prepare)
            images = load_training_images(data, encoder.image_channels, config.paths.image_cache).training
            pixels = images.images.images  # of all, also those that are held out
            crops = CroppedImages(pixels, data.resolution, data.center_crop, data.random_flip)
            images = CaptionedImages(crops, images.captions, dropout=0.0)
            mine = range(accelerator.process_index, num_parts(len(images)), accelerator.num_processes)
            for part in tqdm(mine, "encoding images", disable=not accelerator.is_main_process, mininterval=1):
                write_part(folder, part, images, data.cached_views, encoder)
            accelerator.wait_for_everyone()
            in_main_process(accelerator, lambda: write_index(folder, len(images), encoder))
            encoder.rest()
    return folder
