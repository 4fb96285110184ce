"""A data set as training and scoring take it: crops and captions, or cached latents; the micro-batches of a run.

A folder of latents holds part-000000.safetensors and so on, of PART images each: `moments` of the VAE's posterior
(n, views, C, h, w), `embeddings` of all their captions (m, tokens, D), `first` (n + 1,), where each image's captions
begin, and m, and `crc32` (n,) of each image's moments and embeddings. empty.safetensors holds the embedding of the
empty caption. index.json comes last, and says how many images there are.
"""

import copy
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from deme.config.experiment import Config
from deme.config.trainings import Training
from deme.data.decoding import Source, ahead, load_images
from deme.data.opening import MICRO_BATCH, Stream, batch_indices, contents_hash, split_held_out, torch_seed
from deme.errors import RunError, UserError, one_line, shown
from deme.job.files import atomic_file, make_folder, read_json
from deme.job.processes import Processes, in_main_process, locked_by_all
from deme.job.records import CONTENTS, DATA, ENCODER, digest_of
from deme.models.encoders import Captioned, Encoded, Encoder, LatentsAndText

PART = 512  # images
ENCODED_AT_ONCE = 8  # images, or captions
INDEX = "index.json"
EMPTY = "empty.safetensors"


def choose_caption(captions: Sequence, empty: Any, dropout: float, random: np.random.Generator | None) -> Any:
    """One of an image's captions, or `empty` with probability `dropout` (Ho and Salimans 2022, algorithm 1).

    Without a generator it is the first.
    """
    if random is None:
        return captions[0]
    number = int(random.integers(len(captions))) if len(captions) > 1 else 0
    return empty if dropout > 0 and random.random() < dropout else captions[number]


@dataclass
class CroppedImages:
    """Square crops of images whose shorter side is `resolution`, each with a caption if the data has captions."""

    images: Sequence[np.ndarray]  # uint8 (H, W, C)
    resolution: int
    center_crop: bool
    random_flip: bool
    chosen: np.ndarray | None = None  # indices of the images to use; None: all
    captions: Sequence[list[str]] | None = None  # of each row of the data set, one or more
    caption_dropout: float = 0.0  # the probability of an empty caption

    def __post_init__(self):
        self.chosen = np.arange(len(self.images)) if self.chosen is None else self.chosen
        self.threads = getattr(self.images, "threads", 0)

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor | Captioned:
        """The crops at `indices`, captioned if the data is; `random` draws crops and flips, then captions."""
        pixels = self.crops(indices, random)
        if self.captions is None:
            return pixels
        captions = map(self.captions_of, indices)
        return Captioned(pixels, [choose_caption(own, "", self.caption_dropout, random) for own in captions])

    def captions_of(self, index: int) -> list[str]:
        """All captions of an image."""
        return self.captions[int(self.images.rows[self.chosen[index]])]

    def crops(self, indices: Sequence[int], random: np.random.Generator | None = None) -> torch.Tensor:
        """uint8, shape (B, C, R, R), channels-last; centre crops without flips need no generator."""
        size = self.resolution
        crops = []
        for number in self.chosen[np.asarray(indices)].tolist():
            image = self.images[number]
            sides = image.shape[:2]
            if self.center_crop:
                top, left = ((side - size) // 2 for side in sides)
            else:
                top, left = (random.integers(side - size + 1) if side > size else 0 for side in sides)
            crop = image[top : top + size, left : left + size]
            crops.append(crop[:, ::-1] if self.random_flip and random.random() < 0.5 else crop)
        return torch.from_numpy(np.ascontiguousarray(np.stack(crops))).permute(0, 3, 1, 2)


class CachedLatents:
    """Encoded images, each with one of its captions, memory-mapped from a folder; checked when first read."""

    threads = 0  # that load batches ahead: a batch only has to be copied

    def __init__(self, folder: Path, dropout: float):
        self.files = sorted(folder.glob("part-*.safetensors"))
        self.parts = [_read(file, "moments", "embeddings", "first", "crc32") for file in self.files]
        for file, part in zip(self.files, self.parts, strict=True):  # the checksums cover neither of these
            counts = {len(part["moments"]), len(part["crc32"]), len(part["first"]) - 1}
            if len(counts) > 1 or int(part["first"][-1]) != len(part["embeddings"]):
                raise _damaged(file, "its images, captions and checksums do not fit each other")
        count = sum(len(part["moments"]) for part in self.parts)
        expected = read_json(folder / INDEX).get("images")
        if count != expected:
            raise _damaged(folder / INDEX, f"images={expected}, and the parts hold {count}")
        empty = _read(folder / EMPTY, "embedding", "crc32")
        if empty["crc32"].tolist() != [_crc32(empty["embedding"])]:
            raise _damaged(folder / EMPTY, "is not what was written")
        self.empty = empty["embedding"][0]
        self.checked = np.zeros(count, dtype=bool)
        self.chosen = np.arange(count)
        self.dropout = dropout  # the probability of the empty caption

    def __len__(self) -> int:
        return len(self.chosen)

    def of(self, chosen: np.ndarray) -> "CachedLatents":
        """The images of these numbers."""
        some = copy.copy(self)
        some.chosen = chosen
        return some

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Encoded:
        """The images at `indices`; `random` draws views, then captions."""
        images = [self._read_image(int(self.chosen[index])) for index in indices]
        draws_view = random is not None and len(images[0][0]) > 1
        moments = [views[random.integers(len(views)) if draws_view else 0] for views, _ in images]
        embeddings = [choose_caption(captions, self.empty, self.dropout, random) for _, captions in images]
        return Encoded(torch.stack(moments), torch.stack(embeddings))

    def _read_image(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The moments (views, C, h, w) and embeddings (captions, tokens, D) of an image, checked once."""
        part, i = divmod(number, PART)
        tensors = self.parts[part]
        first, end = tensors["first"][i : i + 2].tolist()
        image = tensors["moments"][i], tensors["embeddings"][first:end]
        if not self.checked[number] and _crc32(*image) != int(tensors["crc32"][i]):
            raise _damaged(self.files[part], f"image {number} is not what was written")
        self.checked[number] = True
        return image


def _read(file: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors in a file, memory-mapped."""
    try:
        tensors = load_file(file)
        return {name: tensors[name] for name in names}
    except Exception as error:
        raise _damaged(file, one_line(error)) from None


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: {reason}; delete the folder, it is made again")


Examples = CroppedImages | CachedLatents


class TrainingImages(NamedTuple):
    """The data in two parts."""

    training: Examples
    held_out: Examples


def load_training_images(source: Source, channels: int, cache: Path, caption_dropout: float = 0.0) -> TrainingImages:
    """The images to train on, and the `data.held_out_images` others, cropped at the centre and not flipped."""
    data = source.data
    images = load_images(source, channels, cache)
    trained, held_out = split_held_out(data, len(images))
    captions = (source.captions, caption_dropout)
    return TrainingImages(
        CroppedImages(images, data.resolution, data.center_crop, data.random_flip, trained, *captions),
        CroppedImages(images, data.resolution, True, False, held_out, *captions),
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


def load_examples(
    config: Config, settings: Training, source: Source, encoder: Encoder, made_of: dict[str, str], processes: Processes
) -> TrainingImages:
    """The data as the encoder takes it; latents, by the hashes in `made_of`, are made once, while other jobs wait."""
    data, cache = source.data, config.paths.image_cache
    rule = "a text-to-image model needs captions" if encoder.takes_text else "the model takes no captions"
    data.check("caption_column", encoder.takes_text == (data.caption_column is not None), rule)
    data.check("cache_latents", encoder.takes_text or not data.cache_latents, "the model works on pixels")
    if not data.cache_latents:
        return load_training_images(source, encoder.image_channels, cache, settings.caption_dropout)

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
                images = load_training_images(source, encoder.image_channels, cache).training
                images = replace(images, chosen=None)  # all of them, those that are held out too
                write_latents(folder, images, data.cached_views, encoder, processes)
    latents = CachedLatents(folder, settings.caption_dropout)
    return TrainingImages(*map(latents.of, split_held_out(data, len(latents))))


def write_latents(
    folder: Path, images: CroppedImages, views: int, encoder: LatentsAndText, processes: Processes
) -> None:
    """Encode all images and captions, shared out over the processes. What a killed job has encoded is used."""
    parts = range(processes.process_index, -(-len(images) // PART), processes.num_processes)
    for part in tqdm(parts, "encoding images", disable=not processes.is_main_process, mininterval=1):
        file = folder / f"part-{part:06d}.safetensors"
        if not file.exists():
            numbers = range(part * PART, min(len(images), (part + 1) * PART))
            tensors = _encode(images, numbers, views, encoder)
            for name, tensor in tensors.items():
                if not tensor.isfinite().all():
                    raise RunError(f"{file}: the encoders, in {encoder.dtype}, give {name} that are NaN or infinite")
            _save(file, tensors)
    processes.wait_for_everyone()

    def write_index() -> None:
        embedding = encoder.embed([""]).cpu()
        _save(folder / EMPTY, {"embedding": embedding, "crc32": torch.tensor([_crc32(embedding)])})
        with atomic_file(folder / INDEX) as temporary:
            temporary.write_text(json.dumps({"images": len(images)}), encoding="utf-8")

    in_main_process(processes, write_index)
    encoder.rest()


def _encode(images: CroppedImages, numbers: range, views: int, encoder: LatentsAndText) -> dict[str, torch.Tensor]:
    """The tensors of a part; views are drawn from the numbers of image and view."""
    captions = [images.captions_of(number) for number in numbers]
    texts = [text for own in captions for text in own]
    places = [(number, view) for number in numbers for view in range(views)]

    def grouped(items: list) -> list[list]:
        return [items[start : start + ENCODED_AT_ONCE] for start in range(0, len(items), ENCODED_AT_ONCE)]

    def crops(places: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([images.crops([place[0]], np.random.default_rng(place)) for place in places])

    decoded = ahead(crops, grouped(places), images.threads)
    moments = torch.cat([encoder.moments(pixels).cpu() for pixels in decoded]).unflatten(0, (-1, views))
    embeddings = torch.cat([encoder.embed(group).cpu() for group in grouped(texts)])
    first = torch.tensor(np.cumsum([0, *map(len, captions)]))
    own = embeddings.tensor_split(first[1:-1])
    crc32 = torch.tensor([_crc32(*tensors) for tensors in zip(moments, own, strict=True)])
    return {"moments": moments, "embeddings": embeddings, "first": first, "crc32": crc32}


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _crc32(*tensors: torch.Tensor) -> int:
    """The checksum of tensors one after another."""
    return zlib.crc32(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors))


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
