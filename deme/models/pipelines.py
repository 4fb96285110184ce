"""diffusers pipelines, in folders or on the Hub: where the parts lie, and their weights.

A pipeline has `unet/` or `transformer/`, and `scheduler/`, or is flat, with `config.json`, `scheduler_config.json` and
the weights side by side (google/ddpm-*). Only reading tensors imports torch.
"""

import functools
import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme.config.networks import HUB_ID
from deme.config.paths import SUBFOLDERS, TRANSFORMER, denoiser_in
from deme.config.sections import SINGLE_FILE
from deme.errors import UserError, blaming, naming, one_line, shown
from deme.job.files import checked, read_json, sha256
from deme.job.repository import found_folder
from deme.models.kinds import (
    CLASSES,
    DENOISERS,
    ENCODERS,
    NEVER_RUN,
    OF_NOISE,
    PIPELINES,
    PROJECTED,
    T5_PARTS,
    XL,
    check_shift,
    denoiser_class,
    is_xl,
    look_up,
    num_classes,
    parts_between,
    read_part,
)
from deme.models.schedules import FLOW, prediction_type

STEM = "diffusion_pytorch_model"  # the files' names begin with it
WEIGHTS = f"{STEM}.safetensors"
VARIANTS = ("fp16", "bf16")  # of half precision, in files' names
FORMS = (  # in order of preference, after the stem: a file, or an index of shards and their names
    (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors"),
    *(
        (
            f".{half}.safetensors",
            f".safetensors.index.{half}.json",
            f".{half}-*-of-*.safetensors",
            f"-*-of-*.{half}.safetensors",
        )
        for half in VARIANTS
    ),
    (".bin", ".bin.index.json", "-*-of-*.bin"),
)
TOKENIZER_FILES = ("json", "txt", "model")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
STEMS = {**dict.fromkeys((*SUBFOLDERS, "vae"), STEM), **dict.fromkeys(TEXT_ENCODERS, "model")}  # of parts with weights
ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # up to diffusers 0.15
OLD_ATTENTION_NAME = re.compile(rf"(?<=\.)({'|'.join(ATTENTION_NAMES)})(?=\.(weight|bias)$)")
todays_name = functools.partial(OLD_ATTENTION_NAME.sub, lambda match: ATTENTION_NAMES[match[1]])
INDEX = "model_index.json"
SCHEDULER_CONFIG = "scheduler_config.json"
SETTINGS_FILES = [INDEX, "config.json", SCHEDULER_CONFIG, f"scheduler/{SCHEDULER_CONFIG}"]  # read beside the weights
SETTINGS_FILES += [*(f"{part}/config.json" for part in STEMS), *(f"tokenizer*/*.{end}" for end in TOKENIZER_FILES)]


def hub_name(source: str) -> str | None:
    """owner/name of a pipeline, model or data set on the Hub, without its @revision; None for a folder or file."""
    match = re.fullmatch(rf"({HUB_ID})(@.+)?", source)
    is_local = found_folder(source) is not None or source.endswith(SINGLE_FILE)
    return match[1] if match is not None and not is_local else None


def find_pipeline(source: str) -> Path:
    """The folder of a pipeline: a local one, or owner/name[@revision] in the Hub's cache.

    Only files that are read are downloaded, none without a connection.
    """
    if (folder := found_folder(source)) is not None:
        return check_pipeline(folder)
    if (name := hub_name(source)) is None:
        raise UserError("no such folder")
    from huggingface_hub import snapshot_download

    reasons = []  # why the Hub could not be reached

    def fetch(revision: str | None, patterns: list[str]) -> Path:
        offline = bool(reasons)
        try:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=offline))
        except Exception as error:  # network, name and permission errors have no common class
            reasons.append(one_line(error))
            if not offline:
                return fetch(revision, patterns)  # from the cache
            if not hasattr(error, "snapshot_path"):  # the cache has nothing of it
                raise UserError(f"neither a pipeline folder nor a reachable Hub id: {reasons[0]}") from None
            return Path(error.snapshot_path)

    folder = fetch(source.removeprefix(name).removeprefix("@") or None, SETTINGS_FILES)
    try:
        check_pipeline(folder)
        parts = [part for part in STEMS if (folder / part).is_dir()]
        for part in parts if not {*SUBFOLDERS}.isdisjoint(parts) else [""]:
            stem = STEMS.get(part, STEM)
            for form in FORMS if part in (*SUBFOLDERS, "") else FORMS[:-1]:
                # config.json is asked for too: the Hub's client warns where no file fits
                fetch(folder.name, [str(Path(part, file)) for file in ("config.json", *(stem + end for end in form))])
                if has_weights(folder / part, stem):
                    break
            weights_files(folder / part, stem)
    except UserError as error:
        why = f"; the Hub's cache does not hold all of it, and the rest cannot be had: {reasons[0]}" if reasons else ""
        raise UserError(f"{error}{why}") from None
    return folder


def read_index(pipeline: Path) -> dict[str, Any]:
    """The classes in model_index.json: `_class_name`, the pipeline's, and its parts'; empty where there is no file."""
    index = read_json(pipeline / INDEX) if (pipeline / INDEX).is_file() else {}
    return {
        part: entry[-1] if isinstance(entry, list) and entry else entry  # a library and a class
        for part, entry in index.items()
        if (part in CLASSES or isinstance(entry, list)) and entry != [None, None] and part not in NEVER_RUN
    }


def denoiser_folder(pipeline: Path) -> Path:
    """The folder of a pipeline's denoiser: its sub-folder, or the pipeline itself if that is flat."""
    found = denoiser_in(pipeline)
    return found if found.is_dir() else pipeline


def schedule_file(pipeline: Path) -> Path:
    """The file of a pipeline's noise schedule: in scheduler/, or in the pipeline itself if that is flat."""
    has_parts = any((pipeline / part).is_dir() for part in (*SUBFOLDERS, "scheduler"))
    return (pipeline / "scheduler" if has_parts else pipeline) / SCHEDULER_CONFIG


def check_pipeline(pipeline: Path, is_whole: bool = True) -> Path:
    """Check that a folder is a pipeline of known classes and settings, and return it.

    Without `is_whole` only its encoders are wanted: it may lack the denoiser.
    """
    file, index = pipeline / INDEX, read_index(pipeline)
    for part, name in ({"_class_name": None} | index if index else {}).items():
        look_up(f"{file}: the part", part, CLASSES)
        look_up(f"{file}: {part}", without_fast(name), CLASSES[part])
    denoiser, vae = denoiser_folder(pipeline) / "config.json", pipeline / "vae" / "config.json"
    subfolder = denoiser_in(pipeline).name
    files = {subfolder: denoiser, "scheduler": schedule_file(pipeline), "vae": vae}
    settings = {part: read_part(part, path, index.get(part)) for part, path in files.items() if path.is_file()}
    for part in (subfolder, "scheduler") if is_whole else ():
        if part not in settings:
            raise UserError(f"not a pipeline folder: {files[part]} is missing")
    if "vae" in settings:
        with naming(vae):
            check_shift(settings.get(subfolder, {}), settings["vae"])
    if subfolder not in settings:
        return pipeline
    given = settings[subfolder]
    kind = denoiser_class(given)
    if PIPELINES.get(index.get("_class_name"), kind) != kind:
        raise UserError(f"{file}: _class_name={index['_class_name']}: its network is a {kind}")
    if index and (index.get("_class_name") == XL) != is_xl(given):
        added = shown(given.get("addition_embed_type"))
        raise UserError(f"{file}: _class_name={index['_class_name']}: its network has addition_embed_type={added}")
    between = parts_of(pipeline, given)
    present = {path.parent.name for path in pipeline.glob("*/config.json")}
    if index:  # says which folders count; but for these, which would be passed over
        present = (present | index.keys()) & {"vqvae", *STEMS}
    for part in sorted(present - {subfolder, "scheduler", *NEVER_RUN, *between}):
        why = f"{file.name} does not name it" if part in parts_between(given) else f"a {kind} is supported without one"
        raise UserError(f"{pipeline / part}: {why}")
    if "vae" in settings:
        look_up(f"{vae}: _class_name", settings["vae"]["_class_name"], (between["vae"],))
    predicts = prediction_type(settings["scheduler"]) if "scheduler" in settings else None
    if predicts == FLOW and index.get("_class_name") in OF_NOISE:
        raise UserError(f"{file}: _class_name={index['_class_name']}: replaces the scheduler, one of flow matching")
    if predicts is not None and subfolder == TRANSFORMER and "text_encoder" in between:
        look_up(f"{files['scheduler']}: what networks predict", predicts, (FLOW,))
    return pipeline


def without_fast(name: Any) -> Any:
    """A class's name without the ending that tokenizers have had in older versions of transformers."""
    return name.removesuffix("Fast") if isinstance(name, str) else name


def parts_of(pipeline: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The parts between images and a pipeline's denoiser, by its settings, with their classes.

    T5 may be missing, and the VAE of a network that takes labels.
    """
    index = read_index(pipeline)
    optional = {"vae"} if num_classes(settings) else T5_PARTS
    has = {part: part in index if index else (pipeline / part).is_dir() for part in optional}
    if len(set(has.values())) > 1:
        raise UserError(f"{pipeline}: has {' but no '.join(sorted(has, key=has.get, reverse=True))}")
    found = {part: kind for part, kind in parts_between(settings).items() if has.get(part, True)}
    for part, name in found.items():
        look_up(f"{pipeline / INDEX}: {part}", without_fast(index.get(part, name)), (name,))
    return found


def read_schedule(pipeline: Path) -> dict[str, Any]:
    """The settings of a pipeline's noise schedule, looked up."""
    return read_part("scheduler", schedule_file(pipeline), read_index(pipeline).get("scheduler"))


def variant_of(file: Path) -> str | None:
    """The variant of a file of an encoder's weights, fp16 or bf16, None for others; it must be safetensors."""
    if file.suffix != ".safetensors":
        rule = (
            "weights that are pickles are read of unet or transformer alone; diffusers' save_pretrained writes others"
        )
        raise UserError(f"{file}: {rule}")
    return next((variant for variant in VARIANTS if f".{variant}" in file.name), None)


def encoder_files(pipeline: Path) -> dict[str, Path]:
    """The files that are read of a pipeline's encoders, by name: settings, and one form of the weights, never pickles.

    A name leaves out the variant, except for shards, which an index names. Empty if the network works on pixels.
    """
    files = {}
    config = denoiser_folder(pipeline) / "config.json"
    parts = parts_of(pipeline, read_json(config)) if config.is_file() else ENCODERS
    for part in parts if has_latents(pipeline) else ():
        if not (pipeline / part).is_dir():
            raise UserError(f"{pipeline / part}: missing")
        weights = weights_files(pipeline / part, STEMS[part]) if part in STEMS else []
        variant = variant_of(weights[0]) if weights else None
        for path in sorted((pipeline / part).iterdir()):
            is_other = any(f".{other}" in path.name for other in VARIANTS if other != variant)
            if path in weights or (path.suffix in (".json", ".txt", ".model") and not is_other):
                name = path.name if "-of-" in path.name else path.name.replace(f".{variant}", "")
                files[f"{part}/{name}"] = path
    return files


def is_projected(folder: Path) -> bool:
    """True if the denoiser in a folder has projections, by the class in its config.json."""
    return str(read_json(folder / "config.json").get("_class_name")).startswith(PROJECTED)


def takes_text(pipeline: Path) -> bool:
    """True if a pipeline is text-to-image: it has a text encoder, or a network that needs one."""
    config = denoiser_folder(pipeline) / "config.json"
    denoiser = DENOISERS.get(denoiser_class(read_json(config))) if config.is_file() else None
    return (pipeline / "text_encoder").is_dir() or (denoiser is not None and "text_encoder" in denoiser.encoders)


def labels_of(pipeline: Path) -> int:
    """How many labels a pipeline's network takes; 0 if it takes none."""
    config = denoiser_folder(pipeline) / "config.json"
    return num_classes(read_json(config)) if config.is_file() else 0


def has_latents(pipeline: Path) -> bool:
    """True if a pipeline's network works on latents, not on pixels."""
    return takes_text(pipeline) or (pipeline / "vae").is_dir()


def latent_factor(pipeline: Path) -> int:
    """Pixels per entry of a latent, along each side; 1 if the network works on pixels."""
    if not has_latents(pipeline):
        return 1
    file = pipeline / "vae" / "config.json"
    settings = read_json(file)
    key = "encoder_block_out_channels" if "encoder_block_out_channels" in settings else "block_out_channels"
    blocks = settings.get(key)
    if not isinstance(blocks, list) or not 1 <= len(blocks) <= 16:
        raise UserError(f"{file}: {key}={blocks}")
    return 2 ** (len(blocks) - 1)


# --- weights, in every form that the Hub has them, read without running code


def weights_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The files of the weights in a network's folder: one, or the shards that an index names; or a file itself."""
    if folder.is_file():
        return [folder]
    for name, index_name, *_ in FORMS:
        file, index = folder / f"{stem}{name}", folder / f"{stem}{index_name}"
        if index.is_file():
            if file.is_file():
                raise UserError(f"{index}: stands beside {file.name}; delete the one that does not count")
            shards = checked(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
            files = [folder / Path(shard).name for shard in sorted(set(shards.values()))]
            if missing := [file for file in files if not file.is_file()]:
                raise UserError(f"{missing[0]}: missing; {index.name} names it")
            return files
        if file.is_file():
            return [file]
    raise UserError(f"{folder / stem}.safetensors: missing")


def has_weights(folder: Path, stem: str = STEM) -> bool:
    """True if a network's folder has weights in any form, also damaged or incomplete ones, or if a file is there."""
    return folder.is_file() or any((folder / f"{stem}{name}").is_file() for form in FORMS for name in form[:2])


def weights_hash(folder: Path) -> str:
    """SHA-256 of the weights in a network's folder: of the file, or of its shards' SHA-256."""
    hashes = [sha256(file) for file in weights_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def load_tensors(folder: Path, stem: str = STEM) -> dict[str, Any]:
    """The tensors of a network's folder under today's names, memory-mapped."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in weights_files(folder, stem):
        with blaming(f"{file}: cannot be read"):
            if file.suffix == ".safetensors":
                content = load_file(file)
            else:
                content = torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
            tensors |= {todays_name(name): tensor for name, tensor in content.items()}
    return tensors
