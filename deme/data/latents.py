"""Images and captions that were encoded once: a folder of parts, read by memory map.

part-000000.safetensors and so on hold PART images each: `moments` of the VAE's posterior (n, views, C, h, w),
`embeddings` of all their captions (m, tokens, D), and `first` (n + 1,), where each one's captions begin, and m.
empty.safetensors holds the embedding of the empty caption. index.json comes last, and says how many images there are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deme.data.ahead import ahead
from deme.data.captions import CaptionedImages, choose_caption
from deme.errors import RunError, UserError, one_line
from deme.job.files import atomic_file, read_json
from deme.models.encoders import Encoded, LatentsAndText

PART = 512  # images
ENCODED_AT_ONCE = 8  # images, or captions
INDEX = "index.json"
EMPTY = "empty.safetensors"


def part_file(folder: Path, part: int) -> Path:
    """Where a part lies."""
    return folder / f"part-{part:06d}.safetensors"


def num_parts(count: int) -> int:
    """How many parts so many images make."""
    return -(-count // PART)


def write_part(folder: Path, part: int, images: CaptionedImages, views: int, encoder: LatentsAndText) -> None:
    """Encode a part's images and captions, unless that is done.

    Args:
        images: all of the data set.
        views: crops and flips of each image, drawn from its number and the view's.
    """
    file = part_file(folder, part)
    if file.exists():
        return
    numbers = range(part * PART, min(len(images), (part + 1) * PART))
    captions = [images.captions_of(number) for number in numbers]
    texts = [text for own in captions for text in own]
    places = [(number, view) for number in numbers for view in range(views)]

    def crops(places: list[tuple[int, int]]) -> torch.Tensor:
        return torch.cat([images.images.batch([number], np.random.default_rng((number, v))) for number, v in places])

    decoded = ahead(crops, _groups(places), images.threads)
    tensors = {
        "moments": torch.cat([encoder.moments(pixels).cpu() for pixels in decoded]).unflatten(0, (-1, views)),
        "embeddings": torch.cat([encoder.embed(group).cpu() for group in _groups(texts)]),
        "first": torch.tensor(np.cumsum([0, *map(len, captions)])),
    }
    for name in ("moments", "embeddings"):
        if not tensors[name].isfinite().all():
            raise RunError(f"{file}: the encoders, in {encoder.dtype}, give {name} that are NaN or infinite")
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def write_index(folder: Path, count: int, encoder: LatentsAndText) -> None:
    """Write what makes the folder complete: the empty caption's embedding and the number of images."""
    with atomic_file(folder / EMPTY) as temporary:
        save_file({"embedding": encoder.embed([""]).cpu().contiguous()}, temporary)
    with atomic_file(folder / INDEX) as temporary:
        temporary.write_text(json.dumps({"images": count}), encoding="utf-8")


def _groups(items: list) -> list[list]:
    return [items[start : start + ENCODED_AT_ONCE] for start in range(0, len(items), ENCODED_AT_ONCE)]


class CachedLatents:
    """Encoded images, each with one of its captions.

    Args:
        folder: as the module's docstring says.
        chosen: which images they are.
        dropout: the probability of the empty caption in training.
    """

    threads = 0  # that help to load a batch: it only has to be copied

    def __init__(self, folder: Path, chosen: np.ndarray, dropout: float):
        self.parts = [_read(part_file(folder, part)) for part in range(num_parts(count_images(folder)))]
        self.empty = _read(folder / EMPTY)["embedding"][0]
        self.chosen = chosen
        self.dropout = dropout

    def __len__(self) -> int:
        return len(self.chosen)

    def batch(self, indices: Sequence[int], random: np.random.Generator | None = None) -> Encoded:
        """The images at `indices`, encoded, with a caption each.

        Args:
            random: draws views, then captions.
        """
        places = [divmod(int(self.chosen[index]), PART) for index in indices]
        views = self.parts[0]["moments"].shape[1]
        draws_view = random is not None and views > 1
        chosen_views = [random.integers(views) if draws_view else 0 for _ in places]
        moments = [self.parts[part]["moments"][i, v] for (part, i), v in zip(places, chosen_views, strict=True)]
        return Encoded(torch.stack(moments), torch.stack([self._embedding(*place, random) for place in places]))

    def _embedding(self, part: int, i: int, random: np.random.Generator | None) -> torch.Tensor:
        """The embedding, (tokens, D), of one caption of image i of a part."""
        first, end = self.parts[part]["first"][i : i + 2].tolist()
        number = choose_caption(end - first, self.dropout, random)
        return self.empty if number is None else self.parts[part]["embeddings"][first + number]


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: {one_line(error)}; delete the folder, it is made again") from None


def count_images(folder: Path) -> int:
    """How many images a complete folder holds.

    Raises:
        UserError: it is damaged.
    """
    count = read_json(folder / INDEX).get("images")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{folder / INDEX}: images={count}; delete the folder, it is made again")
    return count
