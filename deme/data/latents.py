"""Images and captions that were encoded once, in a folder.

It holds part-000000.safetensors and so on, of PART images each: `moments` of the VAE's posterior (n, views, C, h, w),
`embeddings` of all their captions (m, tokens, D), `first` (n + 1,), where each image's captions begin, and m, and
`crc32` (n,) of each image's moments and embeddings; for Stable Diffusion XL also the views' `sizes` (n, views, 6),
which the checksum covers. empty.safetensors holds the embedding of the empty caption. index.json comes last, and says
how many images there are.
"""

import copy
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from deme.data.crops import CroppedImages, choose_caption
from deme.data.decoding import ahead
from deme.errors import RunError, UserError, one_line
from deme.job.files import atomic_file, read_json, write_text
from deme.job.processes import Processes, in_main_process
from deme.models.encoders import Encoded, LatentsAndText

PART = 512  # images
ENCODED_AT_ONCE = 8  # images, or captions
INDEX = "index.json"
EMPTY = "empty.safetensors"


class CachedLatents:
    """Encoded images, each with one of its captions, memory-mapped from a folder; checked when first read."""

    threads = 0  # that load batches ahead: a batch only has to be copied

    def __init__(self, folder: Path, dropout: float, takes_sizes: bool):
        self.files = sorted(folder.glob("part-*.safetensors"))
        names = "moments", "embeddings", "first", "crc32", *["sizes"] * takes_sizes
        self.parts = [_read(file, *names) for file in self.files]
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
        chosen = [random.integers(len(image[0])) if draws_view else 0 for image in images]
        embeddings = [choose_caption(image[1], self.empty, self.dropout, random) for image in images]

        def of_views(place: int) -> torch.Tensor:
            return torch.stack([image[place][view] for image, view in zip(images, chosen, strict=True)])

        return Encoded(of_views(0), torch.stack(embeddings), of_views(2) if len(images[0]) > 2 else None)

    def _read_image(self, number: int) -> tuple[torch.Tensor, ...]:
        """The moments (views, C, h, w), embeddings (captions, tokens, D) and sizes, if any, of an image, checked."""
        part, i = divmod(number, PART)
        tensors = self.parts[part]
        first, end = tensors["first"][i : i + 2].tolist()
        image = tensors["moments"][i], tensors["embeddings"][first:end]
        image += (tensors["sizes"][i],) if "sizes" in tensors else ()
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
        write_text(folder / INDEX, json.dumps({"images": len(images)}))

    in_main_process(processes, write_index)
    encoder.rest()


def _encode(images: CroppedImages, numbers: range, views: int, encoder: LatentsAndText) -> dict[str, torch.Tensor]:
    """The tensors of a part; views are drawn from the numbers of image and view."""
    captions = [images.captions_of(number) for number in numbers]
    texts = [text for own in captions for text in own]
    places = [(number, view) for number in numbers for view in range(views)]

    def grouped(items: list) -> list[list]:
        return [items[start : start + ENCODED_AT_ONCE] for start in range(0, len(items), ENCODED_AT_ONCE)]

    def crops(places: list[tuple[int, int]]) -> list[tuple]:
        return list(zip(*(images.crops([place[0]], np.random.default_rng(place)) for place in places), strict=True))

    decoded, encoded, sizes = ahead(crops, grouped(places), images.threads), [], []
    for pixels, of_crops in decoded:
        encoded.append(encoder.moments(torch.cat(pixels)).cpu())
        sizes += of_crops
    moments = torch.cat(encoded).unflatten(0, (-1, views))
    further = {"sizes": torch.cat(sizes).unflatten(0, (-1, views))} if encoder.takes_sizes else {}
    embeddings = torch.cat([encoder.embed(group).cpu() for group in grouped(texts)])
    first = torch.tensor(np.cumsum([0, *map(len, captions)]))
    own = embeddings.tensor_split(first[1:-1])
    crc32 = torch.tensor([_crc32(*tensors) for tensors in zip(moments, own, *further.values(), strict=True)])
    return {"moments": moments, "embeddings": embeddings, "first": first, "crc32": crc32, **further}


def _save(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    with atomic_file(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def _crc32(*tensors: torch.Tensor) -> int:
    """The checksum of tensors one after another."""
    return zlib.crc32(b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors))
