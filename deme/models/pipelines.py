"""diffusers pipelines as folders: where their parts lie, and what makes a folder a pipeline.

A pipeline has `unet/` and `scheduler/`, or is flat, with `config.json`, `scheduler_config.json` and the weights side by
side (google/ddpm-*). Text-to-image pipelines also have `vae/`, `text_encoder/` and `tokenizer/`. Nothing imports torch.
"""

import functools
import inspect
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from deme.config.paths import DENOISER
from deme.config.sections import HUB_ID
from deme.errors import UserError, shown
from deme.job.files import REPOSITORY, read_json
from deme.models.kinds import (
    DENOISERS,
    ENCODERS,
    INDEX,
    NEVER_RUN,
    PIPELINES,
    PROJECTED,
    check_pipeline,
    denoiser_class,
    denoiser_folder,
    read_index,
    schedule_file,
)
from deme.models.weights import download


def find_pipeline(source: str) -> Path:
    """The folder of a pipeline: a local one, or owner/name[@revision] in the Hub's cache, downloaded if necessary."""
    if (folder := find_folder(source)) is not None:
        return check_pipeline(folder)
    if (name := hub_name(source)) is None:
        raise UserError("no such folder")
    return download(name, source.removeprefix(name).removeprefix("@") or None)


def find_folder(source: str) -> Path | None:
    """A folder relative to the working directory, or else to the repository; None if there is none."""
    return next((folder for folder in (Path(source), REPOSITORY / source) if folder.is_dir()), None)


def hub_name(source: str) -> str | None:
    """owner/name of a pipeline, model or data set on the Hub, without its @revision; None for a folder."""
    name, at, revision = source.partition("@")
    fits = re.fullmatch(HUB_ID, name) is not None and (revision != "" or at == "")
    return name if fits and find_folder(source) is None else None


def write_pipeline_files(folder: Path, pretrained: Path) -> None:
    """Make a denoiser's folder a pipeline: add the index, and a pretrained pipeline's noise schedule and encoders.

    The index is written anew: it names only classes that are known, and no safety checker. Weights are hard links if
    possible; settings are not, as other programs write them in place.
    """
    settings = read_json(folder / DENOISER / "config.json")
    kind, schedule, given = denoiser_class(settings), schedule_file(pretrained), read_index(pretrained)
    pipelines = [name for name, denoiser in PIPELINES.items() if denoiser == kind]
    library = "deme.projection" if is_projected(folder / DENOISER) else "diffusers"
    index = {
        "_class_name": given["_class_name"] if given.get("_class_name") in pipelines else pipelines[0],
        "scheduler": ["diffusers", read_json(schedule).get("_class_name", given.get("scheduler"))],
        DENOISER: [library, settings.get("_class_name", kind)],
    }
    if DENOISERS[kind]:
        index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}
        index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "requires_safety_checker": False}
        index |= {part: [None, None] for part in NEVER_RUN}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for name, source in {**encoder_files(pretrained), f"scheduler/{schedule.name}": schedule}.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if source.suffix == ".safetensors":
            with suppress(OSError):  # another file system, or one without hard links
                os.link(source.resolve(), target)
                continue
        shutil.copy(source, target)


def has_full_precision(part: Path) -> bool:
    """True unless a pipeline's part has weights of the variant fp16 alone."""
    names = [path.name for path in part.glob("*.safetensors")]
    return not names or any(".fp16" not in name for name in names)


def encoder_files(pipeline: Path) -> dict[str, Path]:
    """The files that are read of a pipeline's encoders, by name: settings, and one form of the weights, never pickles.

    A name leaves out the variant fp16, except for shards, which an index names. None if the network works on pixels.
    """
    files = {}
    for part in ENCODERS if takes_text(pipeline) else ():
        if not (pipeline / part).is_dir():
            raise UserError(f"{pipeline / part}: missing")
        is_full = has_full_precision(pipeline / part)
        for path in sorted((pipeline / part).iterdir()):
            if path.suffix in (".json", ".txt", ".safetensors", ".model") and not (is_full and ".fp16" in path.name):
                name = path.name if "-of-" in path.name else path.name.replace(".fp16", "")
                files[f"{part}/{name}"] = path
    return files


def common_architecture(folders: Sequence[Path]) -> Path:
    """The denoiser folder with the architecture of all of them, which must agree but for projections.

    If any after the first has projections it is one of these (`with_identity_projections` fills the others' weights).
    """
    first, *others = (folder / "config.json" for folder in folders)
    expected = read_json(first)
    kind = denoiser_class(expected)
    for file in others:
        given = read_json(file)
        if denoiser_class(given) != kind:
            raise UserError(f"{file}: _class_name={denoiser_class(given)}, but {kind} in {first}")
        differing = {key for key in {*given, *expected} if given.get(key, ...) != expected.get(key, ...)}
        for key in sorted(differing - {"dropout"}):  # of training alone
            default = default_settings(kind).get(key, ...)  # diffusers ignores other keys
            values = given.get(key, default), expected.get(key, default)
            if default is not ... and values[0] != values[1]:
                raise UserError(f"{file}: {key}={shown(values[0])}, but {shown(values[1])} in {first}")
    by_preference = [*folders[1:], folders[0]]
    return next(filter(is_projected, by_preference), by_preference[0])


@functools.cache
def default_settings(name: str) -> dict[str, Any]:
    """The default settings of a class of diffusers, as in a config.json."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    values = {parameter.name: parameter.default for parameter in parameters}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def is_projected(folder: Path) -> bool:
    """True if the denoiser in a folder has projections, by the class in its config.json."""
    return str(read_json(folder / "config.json").get("_class_name")).startswith(PROJECTED)


def takes_text(pipeline: Path) -> bool:
    """True if a pipeline is text-to-image: it has a text encoder, or a network that needs one."""
    config = denoiser_folder(pipeline) / "config.json"
    needs_text = config.is_file() and "Condition" in denoiser_class(read_json(config))
    return (pipeline / "text_encoder").is_dir() or needs_text


def latent_factor(pipeline: Path) -> int:
    """Pixels per entry of a latent, along each side; 1 if the network works on pixels."""
    if not takes_text(pipeline):
        return 1
    file = pipeline / "vae" / "config.json"
    blocks = read_json(file).get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise UserError(f"{file}: block_out_channels={blocks}")
    return 2 ** (len(blocks) - 1)
