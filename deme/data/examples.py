"""Training data as the network's encoder takes it: images, or latents and embeddings that are cached in a folder.

part-000000.safetensors and so on hold PART images each: `moments` of the VAE's posterior (n, views, C, h, w),
`embeddings` of all their captions (m, tokens, D), `first` (n + 1,), where each image's captions begin, and m, and
`crc32` (n,) of each image's moments and embeddings. empty.safetensors holds the embedding of the empty caption.
index.json comes last, and says how many images there are.
"""

import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from deme.config.experiment import Config
from deme.config.sections import Training
from deme.data.decoding import ahead
from deme.data.images import CroppedImages, TrainingImages, choose_caption
from deme.data.opening import Source
from deme.data.sources import contents_hash, load_training_images, split_held_out
from deme.errors import RunError, UserError, one_line
from deme.job.files import atomic_file, make_folder, read_json
from deme.job.processes import Processes, in_main_process, locked_by_all
from deme.job.records import CONTENTS, DATA, ENCODER, LATENTS, Record
from deme.models.encoders import Encoded, Encoder, LatentsAndText

PART = 512  # images
ENCODED_AT_ONCE = 8  # images, or captions
INDEX = "index.json"
EMPTY = "empty.safetensors"


def load_examples(
    config: Config,
    settings: Training,
    source: Source,
    encoder: Encoder,
    made_of: dict[str, str],
    processes: Processes,
) -> TrainingImages:
    """The data as the encoder takes it.

    Args:
        made_of: the hashes of the data, and of the encoders if there are any.
    """
    data = source.data
    has_captions = data.caption_column is not None
    data.check("caption_column", has_captions or not encoder.takes_text, "a text-to-image model needs captions")
    data.check("caption_column", encoder.takes_text or not has_captions, "the model takes no captions")
    data.check("cache_latents", encoder.takes_text or not data.cache_latents, "the model works on pixels")
    if not data.cache_latents:
        return load_training_images(source, encoder.image_channels, config.paths.image_cache, settings.caption_dropout)
    encoder.prepare(processes.device, settings.mixed_precision)
    folder = cached_latents(config, source, encoder, made_of, processes)
    parts = split_held_out(data, read_count(folder))
    return TrainingImages(*(CachedLatents(folder, chosen, settings.caption_dropout) for chosen in parts))


def cached_latents(
    config: Config, source: Source, encoder: LatentsAndText, made_of: dict[str, str], processes: Processes
) -> Path:
    """The folder of the data's latents and embeddings, made once by all processes, while other jobs wait.

    What a killed job has encoded is used.
    """
    cache = config.paths.image_cache
    made_from = {
        **{key: made_of[key] for key in (DATA, ENCODER)},
        CONTENTS: contents_hash(source, cache),
        "type": str(encoder.dtype),
        **source.data.tagged("latents"),
    }
    folder = config.paths.latent_cache / Record(LATENTS, made_from).digest

    def is_complete() -> bool:
        return in_main_process(processes, (folder / INDEX).exists)

    if is_complete():
        return folder
    with locked_by_all(processes, folder, "output_dir", wait=True):
        if not is_complete():  # as it may be after the wait
            in_main_process(processes, lambda: make_folder(folder, "output_dir"))
            training = load_training_images(source, encoder.image_channels, cache).training
            images = replace(training, chosen=None)  # all of them, those that are held out too
            parts = range(processes.process_index, num_parts(len(images)), processes.num_processes)
            for part in tqdm(parts, "encoding images", disable=not processes.is_main_process, mininterval=1):
                write_part(folder, part, images, source.data.cached_views, encoder)
            processes.wait_for_everyone()
            in_main_process(processes, lambda: write_index(folder, len(images), encoder))
            encoder.rest()
    return folder


# --- writing


def part_file(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{part:06d}.safetensors"


def num_parts(count: int) -> int:
    """How many parts hold `count` images."""
    return -(-count // PART)


def write_part(folder: Path, part: int, images: CroppedImages, views: int, encoder: LatentsAndText) -> None:
    """Encode a part's images and captions, unless that is done; views are drawn from the numbers of image and view."""
    file = part_file(folder, part)
    if file.exists():
        return
    numbers = range(part * PART, min(len(images), (part + 1) * PART))
    captions = [images.captions_of(number) for number in numbers]
    texts = [text for own in captions for text in own]
    places = [(number, view) for number in numbers for view in range(views)]

    def crops(places: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([images.crops([number], np.random.default_rng((number, v))) for number, v in places])

    decoded = ahead(crops, _groups(places), images.threads)
    tensors = {
        "moments": torch.cat([encoder.moments(pixels).cpu() for pixels in decoded]).unflatten(0, (-1, views)),
        "embeddings": torch.cat([encoder.embed(group).cpu() for group in _groups(texts)]),
        "first": torch.tensor(np.cumsum([0, *map(len, captions)])),
    }
    for name in ("moments", "embeddings"):
        if not tensors[name].isfinite().all():
            raise RunError(f"{file}: the encoders, in {encoder.dtype}, give {name} that are NaN or infinite")
    tensors["crc32"] = torch.tensor([_image_crc32(tensors, i) for i in range(len(numbers))])
    _save(file, tensors)


def write_index(folder: Path, count: int, encoder: LatentsAndText) -> None:
    """Complete the folder: write the empty caption's embedding and the number of images."""
    embedding = encoder.embed([""]).cpu()
    _save(folder / EMPTY, {"embedding": embedding, "crc32": torch.tensor([_crc32(embedding)])})
    with atomic_file(folder / INDEX) as temporary:
        temporary.write_text(json.dumps({"images": count}), encoding="utf-8")


def _groups(items: list) -> list[list]:
    return [items[start : start + ENCODED_AT_ONCE] for start in range(0, len(items), ENCODED_AT_ONCE)]


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _crc32(*tensors: torch.Tensor) -> int:
    """The checksum of tensors one after another."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), value)
    return value


def _image_crc32(tensors: dict[str, torch.Tensor], i: int) -> int:
    """The checksum of image i of a part."""
    first, end = tensors["first"][i : i + 2].tolist()
    return _crc32(tensors["moments"][i], tensors["embeddings"][first:end])


# --- reading


class CachedLatents:
    """Encoded images, each with one of its captions, memory-mapped from a folder; checked when first read.

    Args:
        chosen: the numbers of the images to use.
        dropout: the probability of the empty caption.
    """

    threads = 0  # that load batches ahead: a batch only has to be copied

    def __init__(self, folder: Path, chosen: np.ndarray, dropout: float):
        count = read_count(folder)
        self.files = [part_file(folder, part) for part in range(num_parts(count))]
        if part_file(folder, num_parts(count)).exists():
            raise _damaged(folder / INDEX, f"images={count}, and there are more")
        self.parts = [_read_part(file, min(PART, count - PART * part)) for part, file in enumerate(self.files)]
        empty = _read(folder / EMPTY, "embedding", "crc32")
        if empty["crc32"].tolist() != [_crc32(empty["embedding"])]:
            raise _damaged(folder / EMPTY, "is not what was written")
        self.empty = empty["embedding"][0]
        self.checked = np.zeros(count, dtype=bool)
        self.chosen = chosen
        self.dropout = dropout

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Encoded:
        """The images at `indices`; `random` draws views, then captions."""
        places = [divmod(int(self.chosen[index]), PART) for index in indices]
        for place in places:
            self._check(*place)
        views = self.parts[0]["moments"].shape[1]
        draws_view = random is not None and views > 1
        chosen_views = [random.integers(views) if draws_view else 0 for _ in places]
        moments = [self.parts[part]["moments"][i, v] for (part, i), v in zip(places, chosen_views, strict=True)]
        return Encoded(torch.stack(moments), torch.stack([self._embedding(*place, random) for place in places]))

    def _check(self, part: int, i: int) -> None:
        """Compare image i of a part with its checksum, once."""
        number = part * PART + i
        if not self.checked[number] and _image_crc32(self.parts[part], i) != int(self.parts[part]["crc32"][i]):
            raise _damaged(self.files[part], f"image {number} is not what was written")
        self.checked[number] = True

    def _embedding(self, part: int, i: int, random: np.random.Generator | None) -> torch.Tensor:
        """The embedding, (tokens, D), of one caption of image i of a part."""
        first, end = self.parts[part]["first"][i : i + 2].tolist()
        number = choose_caption(end - first, self.dropout, random)
        return self.empty if number is None else self.parts[part]["embeddings"][first + number]


def read_count(folder: Path) -> int:
    """How many images a complete folder holds."""
    count = read_json(folder / INDEX).get("images")
    if not isinstance(count, int) or count < 1:
        raise _damaged(folder / INDEX, f"images={count}")
    return count


def _read_part(file: Path, count: int) -> dict[str, torch.Tensor]:
    """The tensors of a part of `count` images; their checksums tell whether what they hold is what was written."""
    tensors = _read(file, "moments", "embeddings", "first", "crc32")
    counts = [len(tensors["moments"]), len(tensors["crc32"]), len(tensors["first"]) - 1]
    is_whole = tensors["moments"].dim() == 5 and int(tensors["first"][-1]) == len(tensors["embeddings"])
    if counts != [count] * 3 or not is_whole:
        raise _damaged(file, f"holds {counts[0]} images and the captions of {counts[2]}, not {count}")
    return tensors


def _read(file: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors in a file, memory-mapped."""
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, one_line(error)) from None
    if missing := {*names} - tensors.keys():
        raise _damaged(file, f"{', '.join(sorted(missing))} is missing")
    return tensors


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: {reason}; delete the folder, it is made again")
