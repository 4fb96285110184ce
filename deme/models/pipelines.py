"""diffusers pipelines as folders: where their parts lie, and what makes a folder a pipeline.

A pipeline has `unet/` and `scheduler/`, or is flat, with `config.json`, `scheduler_config.json` and the weights side by
side (google/ddpm-*). Text-to-image pipelines also have `vae/`, `text_encoder/` and `tokenizer/`. Nothing imports torch.
"""

import functools
import hashlib
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
from deme.job.files import REPOSITORY, read_json, sha256
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
    index_class,
    read_index,
    schedule_file,
)
from deme.models.weights import download, weights_files


def find_pipeline(source: str) -> Path:
    """The folder of a pipeline: a local one, or owner/name[@revision] in the Hub's cache, downloaded if necessary."""
    if (folder := find_folder(source)) is not None:
        return check_pipeline(folder)
    if (name := hub_name(source)) is None:
        raise UserError("no such folder")
    return download(name, source.removeprefix(name).removeprefix("@") or None, check_pipeline)


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

    The index is written anew: it names only classes that are known, and no safety checker.
    """
    settings = read_json(folder / DENOISER / "config.json")
    denoiser = denoiser_class(settings)
    schedule = schedule_file(pretrained)
    given = read_index(pretrained)
    kinds = [kind for kind, network in PIPELINES.items() if network == denoiser]
    library = "deme.projection" if is_projected(folder / DENOISER) else "diffusers"
    index = {
        "_class_name": given["_class_name"] if given.get("_class_name") in kinds else kinds[0],
        "scheduler": ["diffusers", read_json(schedule).get("_class_name", index_class(given, "scheduler"))],
        DENOISER: [library, settings.get("_class_name", denoiser)],
    }
    if DENOISERS[denoiser]:
        index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}
        index |= {"tokenizer": ["transformers", "CLIPTokenizer"], "requires_safety_checker": False}
        index |= {part: [None, None] for part in NEVER_RUN}
    for part in DENOISERS[denoiser]:
        _link_part(pretrained / part, folder / part)
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "scheduler").mkdir()
    shutil.copy(schedule, folder / "scheduler")


def has_full_precision(part: Path) -> bool:
    """True unless a pipeline's part has weights of the variant fp16 alone."""
    names = [path.name for path in part.glob("*.safetensors")]
    return not names or any(".fp16" not in name for name in names)


def part_files(part: Path) -> dict[str, Path]:
    """What is read of a pipeline's part, by name: settings, and one form of the weights, never pickles.

    A name leaves out the variant fp16, except for shards, which an index names.
    """
    full = has_full_precision(part)
    return {
        path.name if "-of-" in path.name else path.name.replace(".fp16", ""): path
        for path in sorted(part.iterdir())
        if path.suffix in (".json", ".txt", ".safetensors", ".model") and not (full and ".fp16" in path.name)
    }


def _link_part(source: Path, target: Path) -> None:
    """Copy a part; weights are hard links if possible, settings are not, as other programs write them in place."""
    target.mkdir()
    for name, path in part_files(source).items():
        if path.suffix == ".safetensors":
            with suppress(OSError):  # another file system, or one without hard links
                os.link(path.resolve(), target / name)
                continue
        shutil.copy(path, target / name)


def common_architecture(folders: Sequence[Path]) -> Path:
    """The denoiser folder with the architecture of all of them, which must agree but for projections.

    If any after the first has projections it is one of these (`with_identity_projections` fills the others' weights).
    """
    first, *others = (folder / "config.json" for folder in folders)
    settings = read_json(first)
    kind = denoiser_class(settings)
    for file in others:
        given = read_json(file)
        if denoiser_class(given) != kind:
            raise UserError(f"{file}: _class_name={denoiser_class(given)}, but {kind} in {first}")
        for key in sorted({*given, *settings} - {"dropout"}):  # of training alone
            if key.startswith("_") or (key in given and key in settings and given[key] == settings[key]):
                continue
            defaults = {} if key in given and key in settings else _defaults(kind)
            value, expected = given.get(key, defaults.get(key)), settings.get(key, defaults.get(key))
            if value != expected and (key in defaults or not defaults):  # diffusers ignores unknown keys
                raise UserError(f"{file}: {key}={shown(value)}, but {shown(expected)} in {first}")
    by_preference = [*folders[1:], folders[0]]
    return next(filter(is_projected, by_preference), by_preference[0])


@functools.cache
def _defaults(name: str) -> dict[str, Any]:
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
    needs_text = config.is_file() and "Condition" in str(read_json(config).get("_class_name"))
    return (pipeline / "text_encoder").is_dir() or needs_text


def sample_size(folder: Path, pipeline: Path) -> int | None:
    """The resolution in pixels of the denoiser in a folder, which works with the encoders of a pipeline."""
    weights_files(folder)
    size = read_json(folder / "config.json").get("sample_size")
    return size * latent_factor(pipeline) if isinstance(size, int) else size


def latent_factor(pipeline: Path) -> int:
    """Pixels per entry of a latent, along each side; 1 if the network works on pixels."""
    if not takes_text(pipeline):
        return 1
    file = pipeline / "vae" / "config.json"
    blocks = read_json(file).get("block_out_channels")
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise UserError(f"{file}: block_out_channels={blocks}")
    return 2 ** (len(blocks) - 1)


def encoder_files(pipeline: Path) -> dict[str, Path]:
    """The files that are read of a pipeline's encoders, by name; none if the network works on pixels."""
    parts = ENCODERS if takes_text(pipeline) else ()
    for part in parts:
        if not (pipeline / part).is_dir():
            raise UserError(f"{pipeline / part}: missing")
    return {f"{part}/{name}": path for part in parts for name, path in part_files(pipeline / part).items()}


def encoders_hash(pipeline: Path) -> str:
    """SHA-256 of a pipeline's encoders: of the names and SHA-256 of their files."""
    hashes = [f"{name} {sha256(path)}" for name, path in encoder_files(pipeline).items()]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def num_train_timesteps(pipeline: Path) -> int:
    """T of a pipeline's noise schedule."""
    return read_json(schedule_file(pipeline)).get("num_train_timesteps", 1000)  # diffusers' default
