"""Images and captions that were encoded once: a folder of parts, read by memory map.

part-000000.safetensors and so on hold PART images each: `moments` of the VAE's posterior (n, views, C, h, w),
`embeddings` of all their captions (m, tokens, D), `first` (n + 1,), where each one's captions begin, and m, and
`crc32` (n,) of what each image has of the first two, which older files lack. empty.safetensors holds the embedding of
the empty caption. data.json says what the images were read from; index.json comes last, and says how many there are.
"""

import json
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from deme.data.ahead import ahead
from deme.data.captions import CaptionedImages, choose_caption
from deme.data.opening import Source
from deme.errors import RunError, UserError, one_line
from deme.job.files import atomic_file, read_json
from deme.models.encoders import Encoded, LatentsAndText

PART = 512  # images
ENCODED_AT_ONCE = 8  # images, or captions
INDEX = "index.json"
EMPTY = "empty.safetensors"
DATA_STATE = "data.json"


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
    tensors["crc32"] = torch.tensor([_checksum(tensors, i) for i in range(len(numbers))])
    for name in ("moments", "embeddings"):
        if not tensors[name].isfinite().all():
            raise RunError(f"{file}: the encoders, in {encoder.dtype}, give {name} that are NaN or infinite")
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def write_index(folder: Path, count: int, encoder: LatentsAndText) -> None:
    """Write what makes the folder complete: the empty caption's embedding and the number of images."""
    embedding = encoder.embed([""]).cpu().contiguous()
    with atomic_file(folder / EMPTY) as temporary:
        save_file({"embedding": embedding, "crc32": torch.tensor([_crc32(embedding)])}, temporary)
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
        count = count_images(folder)
        self.files = [part_file(folder, part) for part in range(num_parts(count))]
        if part_file(folder, num_parts(count)).exists():
            raise _damaged(folder / INDEX, f"images={count}, and there are more")
        self.parts = [_read_part(file, min(PART, count - PART * part)) for part, file in enumerate(self.files)]
        self.empty = _read_empty(folder / EMPTY, self.parts[0]["embeddings"])
        self.checked = np.zeros(count, dtype=bool)
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
        for place in places:
            self._check(*place)
        views = self.parts[0]["moments"].shape[1]
        draws_view = random is not None and views > 1
        chosen_views = [random.integers(views) if draws_view else 0 for _ in places]
        moments = [self.parts[part]["moments"][i, v] for (part, i), v in zip(places, chosen_views, strict=True)]
        return Encoded(torch.stack(moments), torch.stack([self._embedding(*place, random) for place in places]))

    def _check(self, part: int, i: int) -> None:
        """Compare image i of a part with its checksum, once."""
        if self.checked[part * PART + i]:
            return
        tensors = self.parts[part]
        if "crc32" in tensors and _checksum(tensors, i) != int(tensors["crc32"][i]):
            raise _damaged(self.files[part], f"image {part * PART + i} is not what was written")
        self.checked[part * PART + i] = True

    def _embedding(self, part: int, i: int, random: np.random.Generator | None) -> torch.Tensor:
        """The embedding, (tokens, D), of one caption of image i of a part."""
        first, end = self.parts[part]["first"][i : i + 2].tolist()
        number = choose_caption(end - first, self.dropout, random)
        return self.empty if number is None else self.parts[part]["embeddings"][first + number]


def _crc32(*tensors: torch.Tensor) -> int:
    """The checksum of tensors one after another, by their bytes."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy(), value)
    return value


def _checksum(tensors: dict[str, torch.Tensor], i: int) -> int:
    """Of what image i of a part has: its moments, and the embeddings of its captions."""
    first, end = tensors["first"][i : i + 2].tolist()
    return _crc32(tensors["moments"][i], tensors["embeddings"][first:end])


def _damaged(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: {reason}; delete the folder, it is made again")


def _read(file: Path, dimensions: dict[str, int]) -> dict[str, torch.Tensor]:
    """The tensors in a file, by memory map.

    Args:
        dimensions: how many each has that has to be there.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, one_line(error)) from None
    for name, count in dimensions.items():
        if name not in tensors or tensors[name].dim() != count:
            raise _damaged(file, f"{name} is missing, or has not {count} dimensions")
    return tensors


def _read_part(file: Path, count: int) -> dict[str, torch.Tensor]:
    """
    Args:
        count: how many images it is to hold.
    """
    tensors = _read(file, {"moments": 5, "embeddings": 3, "first": 1})
    first = tensors["first"].tolist()
    ends_fit = first[:1] == [0] and first[-1:] == [len(tensors["embeddings"])]
    counts = {len(tensors["moments"]), len(first) - 1, len(tensors.get("crc32", first[1:]))}
    if counts != {count} or not ends_fit or any(low >= high for low, high in pairwise(first)):
        raise _damaged(
            file, f"holds {len(tensors['moments'])} images and the captions of {len(first) - 1}, not {count}"
        )
    return tensors


def _read_empty(file: Path, like: torch.Tensor) -> torch.Tensor:
    """The embedding of the empty caption, of the shape of those in `like` (m, tokens, D)."""
    tensors = _read(file, {"embedding": 3})
    embedding = tensors["embedding"]
    if embedding.shape[1:] != like.shape[1:] or len(embedding) != 1:
        raise _damaged(file, f"is of shape {tuple(embedding.shape)}")
    if "crc32" in tensors and tensors["crc32"].tolist() != [_crc32(embedding)]:
        raise _damaged(file, "is not what was written")
    return embedding[0]


def fits(folder: Path, source: Source) -> bool:
    """Whether what a folder holds was made from these images: their files are those that were read, or hold the same.

    Folders of older versions do not say; they fit.
    """
    file = folder / DATA_STATE
    if not file.exists():
        return True
    before = read_json(file)
    if before.get("files") == source.fingerprint():
        return True
    if before.get("contents") != source.contents():
        return False
    write_state(folder, source)
    return True


def write_state(folder: Path, source: Source) -> None:
    """Write what the images are read from, before they are."""
    with atomic_file(folder / DATA_STATE) as temporary:
        state = {"files": source.fingerprint(), "contents": source.contents()}
        temporary.write_text(json.dumps(state), encoding="utf-8")


def count_images(folder: Path) -> int:
    """How many images a complete folder holds."""
    count = read_json(folder / INDEX).get("images")
    if not isinstance(count, int) or count < 1:
        raise UserError(f"{folder / INDEX}: images={count}; delete the folder, it is made again")
    return count
