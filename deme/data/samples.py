"""Sample folders: one PNG per seed and samples.yaml, the record; prompts.jsonl for text-to-image models."""

import glob
import math
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from deme.config.paths import image_path
from deme.data.decoding import as_seen, decoding
from deme.data.files import image_suffixes
from deme.data.prompts import PROMPTS
from deme.errors import UserError
from deme.job.files import TEMPORARY, atomic_file, make_folder, unfinished
from deme.job.locks import InUse, locked
from deme.job.records import SAMPLES, Record, read_record

if TYPE_CHECKING:
    import torch

TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height


def block_of(folder: Path, seeds: range) -> Path:
    """The path that a job locks while it draws these seeds into a folder next to other jobs."""
    return folder.with_name(f"{folder.name}.seeds-{seeds.start}-{seeds.stop}")


def check_apart_from_other_jobs(folder: Path, seeds: range) -> None:
    """Raise InUse if another job draws some of these seeds into the folder."""
    own = block_of(folder, seeds).name
    for lock in folder.parent.glob(f".{glob.escape(folder.name)}.seeds-*-*.lock"):
        name = lock.name.removeprefix(".").removesuffix(".lock")
        numbers = re.fullmatch(r"([0-9]{1,20})-([0-9]{1,20})", name.rpartition(".seeds-")[2])
        if numbers is None or lock.is_dir():  # none of ours
            continue
        start, stop = map(int, numbers.groups())
        if name != own and max(start, seeds.start) < min(stop, seeds.stop):
            try:
                with locked(lock.with_name(name), "sample.output"):  # it may be a dead job's
                    pass
            except InUse:
                message = f"another job draws the seeds {start} … {stop - 1}; if that has ended, `rm {lock}`"
                raise InUse(message) from None


def claim_samples(folder: Path, wanted: Record, seeds: range, overwrite: bool, block: range | None = None) -> None:
    """Create a sample folder, or check that an existing one belongs to the same model, settings and seeds.

    Args:
        seeds: of all images that the folder is to hold.
        overwrite: delete what does not belong instead of refusing.
        block: the seeds of this job, while other jobs may draw the rest; None: all.
    """
    block = seeds if block is None else block
    check_apart_from_other_jobs(folder, block)
    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder")
    remedy = "choose another folder or set sample.overwrite=true"
    if folder.exists() and any(not path.name.startswith(f"{TEMPORARY}{SAMPLES.file}-") for path in folder.iterdir()):
        record = read_record(SAMPLES, folder)
        if record is None:
            raise UserError(f"holds files but no {SAMPLES.file}; choose another folder")
        if not record.fits(wanted, folder, remedy, overwrite):
            for path in (*folder.glob("*.png"), folder / SAMPLES.file, folder / PROMPTS):
                path.unlink(missing_ok=True)
    make_folder(folder, "sample.output")
    for leftover in unfinished(folder, "*.png"):  # now that these seeds are ours
        if block == seeds or _seed(leftover.name.removeprefix(TEMPORARY)) in block:
            leftover.unlink()
    images = {image_path(folder, seed) for seed in seeds}
    surplus = [path for path in folder.glob("*.png") if path not in images]
    if surplus and not overwrite:
        raise UserError(f"holds {len(surplus)} images of other seeds than {seeds.start} … {seeds.stop - 1}; {remedy}")
    for path in surplus:
        path.unlink()
    wanted.write(folder)


def _seed(name: str) -> int | None:
    """The seed that an image's file is named by; None for other files."""
    stem = name.split(".")[0]
    return int(stem) if stem.isdecimal() else None


def count_samples(folder: Path, seeds: range) -> int:
    """How many of these seeds have an image in the folder, if it exists."""
    return sum(_seed(path.name) in seeds for path in folder.glob("[!.]*.png"))


def missing_seeds(folder: Path, seeds: range) -> list[int]:
    """The seeds whose image is absent or does not decode, as after a machine crashed."""

    def is_whole(seed: int) -> bool:
        try:
            with decoding(str(seed)), Image.open(image_path(folder, seed)) as image:
                image.load()
            return True
        except UserError:
            return False

    with ThreadPoolExecutor() as pool:
        return [seed for seed, whole in zip(seeds, pool.map(is_whole, seeds), strict=True) if not whole]


def to_picture(image: "torch.Tensor", size: int | None = None) -> Image.Image:
    """One uint8 image (C, H, W), grayscale or RGB, as PIL's, resized to `size` pixels by PIL's best filter."""
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    if size is not None and size != picture.width:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return picture


def write_image(folder: Path, seed: int, image: "torch.Tensor", size: int | None = None) -> None:
    """Save `to_picture` of an image under its seed."""
    with atomic_file(image_path(folder, seed), is_durable=False) as temporary:
        to_picture(image, size).save(temporary, format="PNG")


def as_read(images: "torch.Tensor", size: int | None = None) -> "torch.Tensor":
    """uint8 images (N, C, H, W) as `read_images` would read them after `write_image`: RGB (N, 3, size, size)."""
    import torch

    if size is None or size == images.shape[-1]:
        return images.expand(-1, 3, -1, -1)
    pictures = [np.array(to_picture(image, size).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# --- reading


def list_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name: in seed order, if sample_ddp.py drew them."""
    if not folder.is_dir():
        raise UserError("no such folder")
    paths = [path for path in folder.glob("[!.]*") if path.suffix.lower() in image_suffixes()]
    paths.sort(key=lambda path: (len(path.name), path.name))  # a seed of seven digits comes after those of six
    if not paths:
        raise UserError("no images in this folder")
    record = read_record(SAMPLES, folder)
    strays = [path for path in paths if _seed(path.name) is None or path != image_path(folder, _seed(path.name))]
    if record is not None and strays:
        raise UserError(f"holds {strays[0].name}, which sample_ddp.py did not draw; move it elsewhere")
    if record is not None and len(paths) != record.beside["num_images"]:
        raise UserError(f"holds {len(paths)} of {record.beside['num_images']} images; finish sample_ddp.py")
    return paths


def drawn_from(folder: Path) -> list[str] | None:
    """SHA-256 of the weights that a folder's images were drawn from; None if sample_ddp.py did not draw them."""
    record = read_record(SAMPLES, folder)
    return None if record is None else record.made_from.get("weights")


def check_sizes(paths: Sequence[Path]) -> tuple[int, int]:
    """The size in pixels, (width, height), that all images must have; only their headers are read."""

    def size_of(path: Path) -> tuple[int, int]:
        with decoding(str(path)), Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in TURNED
            return image.size[::-1] if turned else image.size

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size_of, paths))
    for path, (width, height) in zip(paths, sizes, strict=True):
        if (width, height) != sizes[0]:
            first = f"{paths[0].name} is {sizes[0][0]} x {sizes[0][1]}"
            raise UserError(f"{path}: is {width} x {height}, {first}; all images of a folder must have one size")
    return sizes[0]


def read_images(paths: Sequence[Path]) -> "torch.Tensor":
    """Image files of one size as uint8 RGB, shape (N, 3, H, W), decoded as data is.

    pytorch_fid reads the PNGs of sample_ddp.py the same.
    """
    import torch

    images = []
    for path in paths:
        with decoding(str(path)), Image.open(path) as image:
            images.append(np.array(as_seen(image, 3)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def save_grid(images: "torch.Tensor", path: Path) -> None:
    """Write a nearly square contact sheet of uint8 images (N, C, H, W), magnified to at least 32 pixels."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    scale = max(1, 32 // images.shape[-1])
    magnified = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = make_grid(magnified, nrow=math.ceil(math.sqrt(len(images))), padding=2)
    with atomic_file(path) as temporary:
        to_pil_image(sheet).save(temporary, format="PNG")
