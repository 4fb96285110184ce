"""Folders of samples: one PNG per seed, named by it, and samples.yaml, which says what they were drawn from."""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from deme.config import UserError
from deme.files import make_folder, read_yaml, remove_leftovers, write_small_file, write_yaml

if TYPE_CHECKING:
    import torch

RECORD = "samples.yaml"
IMAGE_SUFFIXES = ("bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp")  # those that pytorch_fid scores


def image_path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:06d}.png"


def claim_samples(folder: Path, identity: dict, seeds: range, overwrite: bool, record: dict) -> None:
    """Create a sample folder, or make sure that what stands there belongs to the same model, settings and seeds.

    Args:
        identity: what determines the images: weights, noise schedule, steps, eta, precision, resolution.
        overwrite: delete what does not belong instead of refusing.
        record: provenance, written beside the identity.

    Raises:
        UserError: the folder holds something else; says what differs.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"sample.output={folder}: is not a folder")
    remove_leftovers(folder)
    if folder.exists() and any(folder.iterdir()):
        if not (folder / RECORD).exists():
            raise UserError(f"sample.output={folder}: holds files but no {RECORD}; choose another folder")
        before = read_record(folder)["identity"]
        changed = [key for key in identity if before.get(key) != identity[key]]
        if changed and not overwrite:
            raise UserError(
                f"sample.output={folder}: holds samples of other {', '.join(changed)}; "
                "choose another folder or set sample.overwrite=true"
            )
        if changed:
            for path in (*folder.glob("*.png"), folder / RECORD):
                path.unlink()
    make_folder(folder, "sample.output")
    wanted = {image_path(folder, seed) for seed in seeds}
    surplus = [path for path in folder.glob("*.png") if path not in wanted]
    if surplus and not overwrite:
        raise UserError(
            f"sample.num_images={len(seeds)} from sample.seed_offset={seeds.start}: {folder} holds {len(surplus)} "
            "images of other seeds; choose another folder or set sample.overwrite=true"
        )
    for path in surplus:
        path.unlink()
    write_yaml(folder / RECORD, {"identity": identity, "num_images": len(seeds), "seed_offset": seeds.start, **record})


def missing_seeds(folder: Path, seeds: range) -> list[int]:
    """The seeds whose image is absent or does not decode (a machine that crashed may leave such files)."""

    def is_whole(seed: int) -> bool:
        try:
            with Image.open(image_path(folder, seed)) as image:
                image.load()
            return True
        except (OSError, SyntaxError):  # PIL raises SyntaxError on broken PNG chunks
            return False

    with ThreadPoolExecutor() as pool:
        return [seed for seed, whole in zip(seeds, pool.map(is_whole, seeds), strict=True) if not whole]


def write_image(folder: Path, seed: int, image: "torch.Tensor") -> None:
    """Save one uint8 image (C, H, W), C = 1 (grayscale) or 3 (RGB)."""
    pixels = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, format="PNG")
    write_small_file(image_path(folder, seed), file.getvalue())


def list_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name: for our folders, in seed order.

    Raises:
        UserError: no such folder, no images, or a sample folder that sample_ddp.py has not finished.
    """
    if not folder.is_dir():
        raise UserError(f"evaluate.samples={folder}: no such folder")
    paths = [path for path in folder.glob("[!.]*") if path.suffix.lstrip(".").lower() in IMAGE_SUFFIXES]
    paths.sort(key=lambda path: (len(path.name), path.name))  # a seed of seven digits comes after those of six
    if not paths:
        raise UserError(f"evaluate.samples={folder}: no images in this folder")
    if (folder / RECORD).exists():
        expected = read_record(folder)["num_images"]
        if len(paths) != expected:
            raise UserError(f"evaluate.samples={folder}: holds {len(paths)} of {expected} images; finish sample_ddp.py")
    return paths


def drawn_from(folder: Path) -> list[str] | None:
    """SHA-256 of the weights that a folder's images were drawn from, or None where sample_ddp.py did not make it."""
    if not (folder / RECORD).exists():
        return None
    return read_record(folder)["identity"].get("weights")


def read_record(folder: Path) -> dict:
    """
    Raises:
        UserError: samples.yaml is damaged.
    """
    record = read_yaml(folder / RECORD)
    if not isinstance(record.get("identity"), dict) or not isinstance(record.get("num_images"), int):
        raise UserError(f"{folder / RECORD}: not a record of sample_ddp.py: identity or num_images is missing")
    return record


def check_sizes(paths: Sequence[Path]) -> None:
    """
    Raises:
        UserError: an unreadable file, or images of different sizes.
    """

    def size_of(path: Path) -> tuple[int, int]:
        try:
            with Image.open(path) as image:
                return image.size
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path}: not a readable image: {error}") from None

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size_of, paths))
    for path, (width, height) in zip(paths, sizes, strict=True):
        if (width, height) != sizes[0]:
            first = f"{paths[0].name} is {sizes[0][0]} x {sizes[0][1]}"
            raise UserError(f"{path}: is {width} x {height}, {first}; all images of a folder must have one size")


def read_images(paths: Sequence[Path]) -> "torch.Tensor":
    """Image files of one size as uint8 RGB, shape (N, 3, H, W), as pytorch_fid reads them.

    Raises:
        UserError: an unreadable file.
    """
    import torch

    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.array(image.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path}: not a readable image: {error}") from None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
