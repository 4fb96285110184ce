"""A data set as training and scoring take it: crops and captions, or cached latents; the micro-batches of a run."""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from deme.config.experiment import Config
from deme.config.trainings import Training
from deme.data.crops import CroppedImages
from deme.data.decoding import Source, ahead, load_images
from deme.data.latents import INDEX, CachedLatents, write_latents
from deme.data.opening import MICRO_BATCH, Stream, batch_indices, contents_hash, split_held_out, torch_seed
from deme.errors import UserError, naming, shown
from deme.job.files import make_folder
from deme.job.processes import Processes, in_main_process, locked_by_all
from deme.job.records import CONTENTS, DATA, ENCODER, digest_of
from deme.models.encoders import Encoder, Pixels

Examples = CroppedImages | CachedLatents
NUMBER = re.compile(r"-?\d+", re.ASCII)


class TrainingImages(NamedTuple):
    """The data in two parts, of images with this many pixels along each side."""

    training: Examples
    held_out: Examples
    resolution: int


def load_training_images(
    source: Source, channels: int, cache: Path, caption_dropout: float = 0.0, takes_sizes: bool = False
) -> TrainingImages:
    """The images to train on, and the `data.held_out_images` others, cropped at the centre and not flipped."""
    data = source.data
    images = load_images(source, channels, cache)
    trained, held_out = split_held_out(data, len(images))
    captions = (source.captions, caption_dropout, source.original_sizes(images.rows) if takes_sizes else None)
    return TrainingImages(
        CroppedImages(images, data.resolution, data.center_crop, data.random_flip, trained, *captions),
        CroppedImages(images, data.resolution, True, False, held_out, *captions),
        data.resolution,
    )


def load_evaluation_images(source: Source, cache: Path) -> tuple[CroppedImages, torch.Tensor | None]:
    """All images as RGB, centre-cropped and not flipped, and int64 class indices (N,), if the data has labels."""
    data = source.data
    images = load_images(source, 3, cache)
    classes = None
    if source.labels is not None:
        for row, label in enumerate(source.labels):
            if not isinstance(label, (int, str, float)) or label != label:
                raise UserError(f"data.label_column={data.label_column}: row {row} has the label {shown(label)}")
        labels = np.asarray(source.labels)[images.rows]
        classes = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    return CroppedImages(images, data.resolution, center_crop=True, random_flip=False), classes


def labels_for(source: Source, classes: int, id2label: Mapping[str, str] | None = None) -> list[int]:
    """The number of each row's class, below `classes`.

    Labels that are numbers, or names that are, are those numbers. Other names have the numbers that the model's
    `id2label` (number → name) gives them; if it knows none of them, their places among as many names as classes.
    """
    with naming("data.label_column", source.data.label_column):
        if source.labels is None:
            raise UserError("the model takes labels")
        labels, names = list(source.labels), source.class_names
        if all(isinstance(label, str) and NUMBER.fullmatch(label) for label in labels):
            labels = [int(label) for label in labels]
        if all(isinstance(label, str) for label in labels):
            names = sorted(set(labels))
            places = {name: place for place, name in enumerate(names)}
            labels = [places[label] for label in labels]
        if names is not None and (numbers := _known_classes(names, id2label or {})):
            labels = [numbers[label] if label in range(len(names)) else label for label in labels]
        elif names is not None and len(names) != classes:  # the places of a part would be other classes' numbers
            raise UserError(f"holds {len(names)} names, and the model has {classes} classes: give their numbers")
        for row, label in enumerate(labels):
            if type(label) is not int or not 0 <= label < classes:
                raise UserError(f"row {row} has the label {shown(source.labels[row])}, and the model {classes} classes")
    return labels


def _known_classes(names: Sequence[str], id2label: Mapping[str, str]) -> list[int] | None:
    """The numbers of the classes with these names; None if none of them is known, or none with another number."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for number, text in id2label.items():
        for name in (text, *text.split(",")):  # ImageNet's have synonyms
            numbers[_plain(name)].add(int(number))
    found = [numbers.get(_plain(name), set()) for name in names]
    if all(len(known) == 1 for known in found):
        return [min(known) for known in found]
    if all(place in known for place, known in enumerate(found) if known):
        return None
    name = next(name for name, known in zip(names, found, strict=True) if len(known) != 1)
    raise UserError(f"{name} names no class, or several, in id2label of the model's model_index.json: give numbers")


def _plain(name: str) -> str:
    return name.replace("_", " ").strip().casefold()


def load_examples(
    config: Config, settings: Training, source: Source, encoder: Encoder, made_of: dict[str, str], processes: Processes
) -> TrainingImages:
    """The data as the encoder takes it; latents, by the hashes in `made_of`, are made once, while other jobs wait."""
    data, cache = source.data, config.paths.image_cache
    rule = "a text-to-image model needs captions" if encoder.takes_text else "the model takes no captions"
    data.check("caption_column", encoder.takes_text == (data.caption_column is not None), rule)
    in_pixels = isinstance(encoder, Pixels)
    data.check("cache_latents", not (in_pixels and data.cache_latents), "the model works on pixels")
    dropout = settings.caption_dropout
    if encoder.classes > 0:
        source = replace(source, captions=[[label] for label in labels_for(source, encoder.classes, encoder.id2label)])
        dropout = settings.label_dropout
    if not data.cache_latents:
        return load_training_images(source, encoder.image_channels, cache, dropout, encoder.takes_sizes)

    encoder.prepare(processes.device, settings.mixed_precision)
    made_from = {key: made_of[key] for key in (DATA, ENCODER)} | {CONTENTS: contents_hash(source, cache)}
    made_from |= {"type": str(encoder.dtype), **data.tagged("latents")}
    folder = config.paths.latent_cache / digest_of(made_from)

    def is_complete() -> bool:
        return in_main_process(processes, (folder / INDEX).exists)

    if not is_complete():
        with locked_by_all(processes, folder, "output_dir", wait=True):
            if not is_complete():  # as it may be after the wait
                in_main_process(processes, lambda: make_folder(folder, "output_dir"))
                further = 0.0, encoder.takes_sizes
                images = load_training_images(source, encoder.image_channels, cache, *further).training
                images = replace(images, chosen=None)  # all of them, those that are held out too
                write_latents(folder, images, data.cached_views, encoder, processes)
    latents = CachedLatents(folder, dropout, encoder.takes_sizes)
    return TrainingImages(*map(latents.of, split_held_out(data, len(latents))), data.resolution)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass of training sees, and the random draws that are not made on the device."""

    number: int  # within the step, over all processes
    examples: Any  # as the encoder takes them
    uniform: float  # in [0, 1): decides between the run's range and all timesteps
    seed: int  # of torch's generator: timesteps, noise, dropout


def micro_batches(
    images: Examples, stream: Stream, settings: Training, numbers: range, first_step: Callable[[], int]
) -> Iterator[MicroBatch]:
    """A process's micro-batches, its `numbers` of each step, loaded ahead; `first_step` is called for the first one."""
    size = settings.micro_batch_size or settings.batch_size

    def load(place: tuple[int, int]) -> MicroBatch:
        step, number = place
        random = np.random.default_rng((*stream, MICRO_BATCH, step, number))
        indices = batch_indices(stream, len(images), step * settings.batch_size + number * size, size)
        uniform = random.random()
        examples = images.batch(indices, random)
        return MicroBatch(number, examples, uniform, torch_seed(random))

    places = ((step, number) for step in itertools.count(first_step()) for number in numbers)
    yield from ahead(load, places, images.threads)
