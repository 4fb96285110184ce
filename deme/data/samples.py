"""Sample folders: one PNG per seed and samples.yaml, the record; prompts.jsonl for text-to-image models."""

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from deme.config.paths import image_path
from deme.config.sections import Sample
from deme.data.decoding import as_seen, size_as_seen
from deme.data.files import image_suffixes, read_lines, read_rows
from deme.errors import UserError, blaming, naming, shown
from deme.job.files import TEMPORARY, InUse, atomic_file, locked, make_folder, unfinished, write_text
from deme.job.records import SAMPLES, Record, read_record

if TYPE_CHECKING:
    import torch

PROMPTS = "prompts.jsonl"  # in a sample folder: which image was drawn from which prompt
REMEDY = "choose another folder or set sample.overwrite=true"


def block_of(folder: Path, seeds: range) -> Path:
    """The path that a job locks while it draws these seeds into a folder next to other jobs."""
    return folder.with_name(f"{folder.name}.seeds-{seeds.start}-{seeds.stop}")


def check_apart_from_other_jobs(folder: Path, seeds: range) -> None:
    """Raise InUse if another job draws some of these seeds into the folder."""
    for lock in folder.parent.glob(f".{glob.escape(folder.name)}.seeds-*-*.lock"):
        numbers = re.search(r"\.seeds-([0-9]{1,20})-([0-9]{1,20})\.lock$", lock.name)
        if numbers is None or lock.is_dir():  # none of ours
            continue
        other = range(*map(int, numbers.groups()))
        if other != seeds and max(other.start, seeds.start) < min(other.stop, seeds.stop):
            try:
                with locked(block_of(folder, other), "sample.output"):  # it may be a dead job's
                    pass
            except InUse:
                message = f"another job draws the seeds {other[0]} … {other[-1]}; if that has ended, `rm {lock}`"
                raise InUse(message) from None


def claim_samples(folder: Path, wanted: Record, settings: Sample, block: range, texts: dict[int, Any]) -> None:
    """Create a sample folder, or check that an existing one belongs to the same model, settings, seeds and prompts.

    `settings.overwrite` deletes what does not belong instead of refusing it. `block` has the seeds of this job, while
    other jobs may draw the rest; `texts` the prompt or label of each seed, if the model takes them.
    """
    seeds = settings.seeds
    check_apart_from_other_jobs(folder, block)
    if folder.exists() and not folder.is_dir():
        raise UserError("is not a folder")
    make_folder(folder, "sample.output")
    if any(not path.name.startswith(f"{TEMPORARY}{SAMPLES.file}-") for path in folder.iterdir()):
        record = read_record(SAMPLES, folder)
        if record is None:
            raise UserError(f"holds files but no {SAMPLES.file}; choose another folder")
        if not record.fits(wanted, folder, REMEDY, settings.overwrite):
            for path in (*folder.glob("*.png"), folder / SAMPLES.file, folder / PROMPTS):
                path.unlink(missing_ok=True)
    for leftover in unfinished(folder, "*.png"):  # now that these seeds are ours
        if block == seeds or _seed(leftover.name.removeprefix(TEMPORARY)) in block:
            leftover.unlink()
    surplus = {*folder.glob("*.png")} - {image_path(folder, seed) for seed in seeds}
    if surplus and not settings.overwrite:
        raise UserError(f"holds {len(surplus)} images of other seeds than {seeds.start} … {seeds.stop - 1}; {REMEDY}")
    for path in surplus:
        path.unlink()
    wanted.write(folder)
    if any(isinstance(text, str) for text in texts.values()):  # labels follow from the settings in the record
        claim_prompts(folder, texts, settings.overwrite)


def _seed(name: str) -> int | None:
    """The seed that an image's file is named by; None for other files."""
    stem = name.split(".")[0]
    return int(stem) if stem.isdecimal() else None


def count_samples(folder: Path, seeds: range) -> int:
    """How many of these seeds have an image in the folder, if it exists."""
    return sum(_seed(path.name) in seeds for path in folder.glob("[!.]*.png"))


def drawn_by(folder: Path, made_from: dict[str, Any]) -> str | None:
    """The sampler, steps and scales of the predicted noise that drew a folder, by its record; None: unknown."""
    with blaming(folder / SAMPLES.file):
        sampler, steps = map(made_from.get, ("sample.scheduler", "num_inference_steps"))
        scales = [f"{scale:g}" for *_, scale in made_from.get("prediction_scale", [])]
        text = f"{sampler}-{steps}" + (f", the predicted noise divided by {', '.join(scales)}" if scales else "")
        return text if sampler else None


def missing_seeds(folder: Path, seeds: range) -> list[int]:
    """The seeds whose image is absent or does not decode, as after a machine crashed."""

    def is_whole(seed: int) -> bool:
        with suppress(Exception), Image.open(image_path(folder, seed)) as image:
            image.load()
            return True
        return False

    with ThreadPoolExecutor() as pool:
        return [seed for seed, whole in zip(seeds, pool.map(is_whole, seeds), strict=True) if not whole]


def to_picture(image: "torch.Tensor", size: int | None) -> Image.Image:
    """One uint8 image (C, H, W), grayscale or RGB, as PIL's, resized to `size` pixels by PIL's best filter."""
    picture = Image.fromarray(image.movedim(0, 2).squeeze(2).numpy())
    return picture if size is None else picture.resize((size, size), Image.Resampling.LANCZOS)


def write_image(folder: Path, seed: int, image: "torch.Tensor", size: int | None = None) -> None:
    """Save `to_picture` of an image under its seed; it is checked before it is relied on, so it is not synced."""
    with atomic_file(image_path(folder, seed), is_durable=False) as temporary:
        to_picture(image, size).save(temporary, format="PNG")


def as_read(images: "torch.Tensor", size: int | None = None) -> "torch.Tensor":
    """uint8 images (N, C, H, W) as `read_images` would read them after `write_image`: RGB (N, 3, size, size)."""
    if size is None or size == images.shape[-1]:
        return images.expand(-1, 3, -1, -1)
    pictures = [to_picture(image, size).convert("RGB") for image in images]
    return images.new_tensor(np.stack(pictures)).permute(0, 3, 1, 2)


def list_images(folder: Path) -> list[Path]:
    """The images directly in a folder, by name: in seed order, if sample_ddp.py drew them."""
    if not folder.is_dir():
        raise UserError("no such folder")
    paths = [path for path in folder.glob("[!.]*") if path.suffix.lower() in image_suffixes()]
    paths.sort(key=lambda path: (len(path.name), path.name))  # a seed of seven digits comes after those of six
    if not paths:
        raise UserError("no images in this folder")
    record = read_record(SAMPLES, folder)
    if record is not None:
        for path in paths:
            if _seed(path.name) is None or path != image_path(folder, _seed(path.name)):
                raise UserError(f"holds {path.name}, which sample_ddp.py did not draw; move it elsewhere")
        if len(paths) != record.beside["num_images"]:
            raise UserError(f"holds {len(paths)} of {record.beside['num_images']} images; finish sample_ddp.py")
    return paths


def check_sizes(paths: Sequence[Path]) -> tuple[int, int]:
    """The size in pixels, (width, height), that all images must have; only their headers are read."""

    def size_of(path: Path) -> tuple[int, int]:
        with blaming(f"{path}: not a readable image"), Image.open(path) as image:
            return size_as_seen(image)

    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(size_of, paths))
    for path, (width, height) in zip(paths, sizes, strict=True):
        if (width, height) != sizes[0]:
            first = f"{paths[0].name} is {sizes[0][0]} x {sizes[0][1]}"
            raise UserError(f"{path}: is {width} x {height}, {first}; all images of a folder must have one size")
    return sizes[0]


def read_images(paths: Sequence[Path]) -> "torch.Tensor":
    """Image files of one size as uint8 RGB (N, 3, H, W), decoded as data is; pytorch_fid reads our PNGs the same."""
    import torch

    images = []
    for path in paths:
        with blaming(f"{path}: not a readable image"), Image.open(path) as image:
            images.append(as_seen(image, 3))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def save_grid(images: "torch.Tensor", path: Path) -> None:
    """Write a nearly square contact sheet of uint8 images (N, C, H, W), magnified to at least 32 pixels."""
    from torchvision.utils import make_grid

    scale = max(1, 32 // images.shape[-1])
    magnified = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    sheet = make_grid(magnified, nrow=math.ceil(math.sqrt(len(images))), padding=2)
    with atomic_file(path) as temporary:
        to_picture(sheet, None).save(temporary, format="PNG")


def load_prompts(source: str | list[str], column: str) -> list[str]:
    """The prompts in a list, in a text file (one a line), or in a column of a table."""
    prompts = source
    if not isinstance(source, list):
        if not os.path.isfile(source):  # Path's own raises where a prompt is too long for a name
            raise UserError("no such file")
        with blaming("cannot be read"):
            rows = read_rows(source, Path(source).read_bytes(), column)
            if any(column not in row for row in rows):
                raise UserError(f"has no column {column}")
        prompts = [row[column] for row in rows]
    for row, prompt in enumerate(prompts):  # JSON can hold half a character, UTF-8 can't
        if not isinstance(prompt, str) or not prompt.strip() or prompt != prompt.encode(errors="ignore").decode():
            raise UserError(f"row {row} holds the prompt {shown(prompt)}")
    if not prompts:
        raise UserError("holds no prompts")
    return prompts


def conditions_of(settings: Sample, takes_text: bool, classes: int) -> list[str] | list[int]:
    """The prompts, or labels of a model with classes, that seeds take in turn; empty where the model takes none."""
    rule = f"sample.model={settings.model} {'needs prompts' if takes_text else 'takes none'}"
    settings.check("prompts", takes_text == (settings.prompts is not None), rule)
    rule = f"sample.model={settings.model} takes no text"
    settings.check("negative_prompt", takes_text or settings.negative_prompt == "", rule)
    known = range(classes)
    knows = f"must be of 0 … {classes - 1}, which the model knows"
    rule = knows if classes else f"sample.model={settings.model} takes none"
    settings.check("labels", settings.labels is None or {*settings.labels} <= {*known}, rule)
    if not takes_text:
        return list(known if settings.labels is None else settings.labels)
    with naming("sample.prompts", settings.prompts):
        return load_prompts(settings.prompts, settings.prompt_column)


def in_turn(conditions: Sequence, seeds: Iterable[int]) -> dict[int, Any]:
    """Seed → prompt or label."""
    return {seed: conditions[seed % len(conditions)] for seed in seeds if conditions}


def claim_prompts(folder: Path, texts: dict[int, str], overwrite: bool) -> None:
    """Write the prompts, by seed, of a sample folder; images of other or unknown prompts are refused, or deleted."""
    prompts = {image_path(folder, seed).name: text for seed, text in texts.items()}
    before = {}
    with suppress(UserError) if overwrite else nullcontext():
        before |= _read_pairs(folder) or ()
    changed = [name for name in prompts if before.get(name) != prompts[name] and (folder / name).exists()]
    if changed and not overwrite:
        others = "other prompts" if changed[0] in before else f"prompts that {PROMPTS} does not tell"
        raise UserError(f"holds {len(changed)} images of {others}, such as {changed[0]}; {REMEDY}")
    for name in changed:
        (folder / name).unlink()
    lines = [json.dumps({"file": name, "prompt": prompt}) for name, prompt in prompts.items()]
    write_text(folder / PROMPTS, "".join(f"{line}\n" for line in lines))


def read_prompts(folder: Path, paths: Sequence[Path]) -> list[str] | None:
    """The prompts of a folder's images, in the order of `paths`; None where it has no prompts.jsonl."""
    pairs = _read_pairs(folder)
    if pairs is None:
        return None
    names = [name for name, _ in pairs]
    for number, (name, expected) in enumerate(zip_longest(names, [path.name for path in paths]), start=1):
        if name != expected:
            raise UserError(f"{PROMPTS}, line {number}: names {name or 'no image'} instead of {expected or 'none'}")
    return [prompt for _, prompt in pairs]


def _read_pairs(folder: Path) -> list[tuple[str, str]] | None:
    """The image's name and the prompt in each line of a folder's prompts.jsonl, if there is one."""
    if not (folder / PROMPTS).exists():
        return None
    with blaming(PROMPTS):
        lines = read_lines((folder / PROMPTS).read_bytes())
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            pairs.append((values["file"], values["prompt"]))
            "".join(pairs[-1]).encode()  # fails for half a character
        except (ValueError, RecursionError, TypeError, KeyError):
            example = '{"file": "000000.png", "prompt": "…"}'
            raise UserError(f"{PROMPTS}, line {number}: not a JSON object of two texts, {example}") from None
    return pairs
