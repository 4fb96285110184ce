"""Folders of samples: one PNG per seed, named by it, and samples.yaml, which says what they were drawn from.

Those of a text-to-image model also hold prompts.jsonl: a line for each image, in seed order.
"""

import glob
import io
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
from deme.job.files import TEMPORARY, atomic_file, make_folder, unfinished, write_small_file
from deme.job.locks import InUse, locked
from deme.job.records import SAMPLES, Record, read_record

if TYPE_CHECKING:
    import torch

TURNED = (5, 6, 7, 8)  # values of EXIF's orientation that exchange width and height


def block_of(folder: Path, seeds: range) -> Path:
    """What a job holds that draws these seeds into a folder beside other jobs: `locks.locked` puts its file there."""
    return folder.with_name(f"{folder.name}.seeds-{seeds.start}-{seeds.stop}")


def check_apart_from_other_jobs(folder: Path, seeds: range) -> None:
    """Make sure that none of these seeds is drawn by another job that holds its own `block_of` the folder.

    Raises:
        InUse: one is; names the lock.
    """
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


def claim_samples(folder: Path, wanted: Record, seeds: range, overwrite: bool, mine: range | None = None) -> None:
    """Create a sample folder, or make sure that what stands there belongs to the same model, settings and seeds.

    Args:
        wanted: the images' record: weights, noise schedule, steps, eta, precision, resolution.
        seeds: of all images that the folder is to hold.
        overwrite: delete what does not belong instead of refusing.
        mine: those that this job draws, while other jobs may draw the rest; None: all.
    """
    mine = seeds if mine is None else mine
    check_apart_from_other_jobs(folder, mine)
    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder")
    remedy = "choose another folder or set sample.overwrite=true"
    if folder.exists() and any(not path.name.startswith(f"{TEMPORARY}{SAMPLES.file}-") for path in folder.iterdir()):
        found = read_record(SAMPLES, folder)
        if found is None:
            raise UserError(f"holds files but no {SAMPLES.file}; choose another folder")
        if not found.fits(wanted, folder, remedy, overwrite):
            for path in (*folder.glob("*.png"), folder / SAMPLES.file, folder / PROMPTS):
                path.unlink(missing_ok=True)
    make_folder(folder, "sample.output")
    for leftover in unfinished(folder, "*.png"):  # now that these seeds are ours
        if mine == seeds or _seed(leftover.name.removeprefix(TEMPORARY)) in mine:
            leftover.unlink()
    own = {image_path(folder, seed) for seed in seeds}
    surplus = [path for path in folder.glob("*.png") if path not in own]
    if surplus and not overwrite:
        raise UserError(f"holds {len(surplus)} images of other seeds than {seeds.start} … {seeds.stop - 1}; {remedy}")
    for path in surplus:
        path.unlink()
    wanted.write(folder)


def _seed(name: str) -> int | None:
    """The seed that an image's file is named by; None for other files."""
    stem = name.split(".")[0]
    return int(stem) if stem.isdecimal() else None


def count_images(folder: Path, seeds: range) -> int:
    """How many of these seeds have an image in the folder, if there is one."""
    return sum(_seed(path.name) in seeds for path in folder.glob("[!.]*.png"))


def missing_seeds(folder: Path, seeds: range) -> list[int]:
    """The seeds whose image is absent or does not decode (a machine that crashed may leave such files)."""

    def is_whole(seed: int) -> bool:
        try:
            with decoding(str(seed)), Image.open(image_path(folder, seed)) as image:
                image.load()
            return True
        except UserError:
            return False

    with ThreadPoolExecutor() as pool:
        return [seed for seed, whole in zip(seeds, pool.map(is_whole, seeds), strict=True) if not whole]


def write_image(folder: Path, seed: int, image: "torch.Tensor", size: int | None = None) -> None:
    """Save one uint8 image (C, H, W), C = 1 (grayscale) or 3 (RGB).

    Args:
        size: pixels of its sides on disk, by PIL's best filter; None: as it is.
    """
    file = io.BytesIO()
    as_picture(image, size).save(file, format="PNG")
    write_small_file(image_path(folder, seed), file.getvalue())


def as_picture(image: "torch.Tensor", size: int | None = None) -> Image.Image:
    """One uint8 image (C, H, W) as PIL's, shrunk to `size` as on disk."""
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    if size is not None and size != picture.width:
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return picture


def as_read(images: "torch.Tensor", size: int | None = None) -> "torch.Tensor":
    """uint8 images (N, C, H, W) as `read_images` would read them from their PNGs: uint8 RGB (N, 3, size, size)."""
    import torch

    if size is None or size == images.shape[-1]:
        return images.expand(-1, 3, -1, -1)
    pictures = [np.array(as_picture(image, size).convert("RGB")) for image in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def list_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name: for our folders, in seed order."""
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
    """SHA-256 of the weights that a folder's images were drawn from, or None where sample_ddp.py did not make it."""
    record = read_record(SAMPLES, folder)
    return None if record is None else record.made_from.get("weights")


def check_sizes(paths: Sequence[Path]) -> tuple[int, int]:
    """Open every image for its size alone, in pixels: (width, height), the same for all."""

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
    """Image files of one size as uint8 RGB, shape (N, 3, H, W), as a person sees them, which is how data is read, too.

    pytorch_fid reads the PNGs of sample_ddp.py the same.
    """
    import torch

    images = []
    for path in paths:
        with decoding(str(path)), Image.open(path) as image:
            images.append(np.array(as_seen(image, 3)))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def save_grid(images: "torch.Tensor", path: Path) -> None:
    """Write a nearly square contact sheet of uint8 images (N, C, H, W); small ones are magnified to 32 pixels."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    scale = max(1, 32 // images.shape[-1])
    magnified = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = make_grid(magnified, nrow=math.ceil(math.sqrt(len(images))), padding=2)
    with atomic_file(path) as temporary:
        to_pil_image(sheet).save(temporary, format="PNG")
