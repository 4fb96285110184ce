"""diffusers pipelines, in folders or on the Hub: where the parts lie, and their weights.

A pipeline has `unet/` or `transformer/`, and `scheduler/`, or is flat, with `config.json`, `scheduler_config.json` and
the weights side by side (google/ddpm-*). Only reading tensors imports torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deme.config.networks import HUB_ID
from deme.config.paths import SUBFOLDERS, TRANSFORMER, denoiser_in
from deme.config.section import is_finite
from deme.config.sections import SINGLE_FILE
from deme.errors import UserError, naming, one_line, shown
from deme.job.files import read_json
from deme.job.repository import found_folder, found_path
from deme.models.kinds import (
    CLASSES,
    DENOISERS,
    ENCODERS,
    NEVER_RUN,
    OF_NOISE,
    PIPELINES,
    PROJECTED,
    SECOND,
    T5_PARTS,
    WAN,
    XL,
    check_shift,
    denoiser_class,
    is_xl,
    look_up,
    num_classes,
    parts_between,
    read_part,
    vae_factor,
)
from deme.models.schedules import ENFORCED, FLOW, of_sampling, prediction_type
from deme.models.weights import FORMS, STEM, VARIANTS, has_weights, weights_files

TOKENIZER_FILES = ("json", "txt", "model")
ZEROS = "force_zeros_for_empty_prompt"  # key of INDEX
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
STEMS = {**dict.fromkeys((*SUBFOLDERS, "vae"), STEM), **dict.fromkeys(TEXT_ENCODERS, "model")}  # of parts with weights
INDEX = "model_index.json"
RATIO = "boundary_ratio"  # in it: from which share of all timesteps on the first of two experts predicts
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
    if found_path(source).is_file():
        raise UserError("a file; name its pipeline's folder: diffusers' from_single_file and save_pretrained write one")
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
        check_has_one_network(check_pipeline(folder))
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


def names_of_classes(pipeline: Path) -> dict[str, str] | None:
    """`id2label` of model_index.json, number → name of the classes that a network knows; None if it has none."""
    names = read_json(pipeline / INDEX).get("id2label") if (pipeline / INDEX).is_file() else None
    is_right = isinstance(names, dict) and all(key.isdecimal() and isinstance(names[key], str) for key in names)
    if names is not None and not is_right:
        raise UserError(f"{pipeline / INDEX}: id2label={shown(names)[:100]}: must map numbers of classes to names")
    return names


def has_two_experts(pipeline: Path) -> bool:
    """True if a pipeline has a second network for low timesteps, as Wan 2.2."""
    return SECOND in read_index(pipeline)


def experts_in(pipeline: Path) -> list[tuple[Path, tuple[int, int]]]:
    """The denoisers of a pipeline with two experts, each with its range [low, high) of timesteps; none of others."""
    if not has_two_experts(pipeline):
        return []
    ratio, total = read_json(pipeline / INDEX).get(RATIO), read_schedule(pipeline).get("num_train_timesteps", 1000)
    boundary = round(ratio * total) if is_finite(ratio) and 0 < ratio < 1 else 0
    if not 0 < boundary < total or abs(boundary - ratio * total) > 1e-6:
        rule = f"must be in (0, 1), and a whole number of {total} timesteps"
        raise UserError(f"{pipeline / INDEX}: {RATIO}={shown(ratio)}: {rule}")
    return [(pipeline / SECOND, (0, boundary)), (denoiser_folder(pipeline), (boundary, total))]


def check_has_one_network(pipeline: Path) -> Path:
    """Refuse a pipeline with two experts where one network is wanted."""
    if has_two_experts(pipeline):
        rule = "merge.experts and sample.model take them, but they are no pretrained network"
        raise UserError(f"{pipeline / INDEX}: {SECOND} makes it two experts: {rule}")
    return pipeline


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
        present = (present | index.keys()) & {"vqvae", SECOND, *STEMS}
    if kind == WAN:
        expanded = read_json(file).get("expand_timesteps", False) if index else False
        look_up(f"{file}: expand_timesteps", expanded, (False,))
        between |= {SECOND: kind} if has_two_experts(pipeline) else {}
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


def latent_sampling(pipeline: Path) -> dict[str, Any]:
    """The settings of ENFORCED with which latents are sampled, as by diffusers' pipeline; none of pixels and flows."""
    settings = read_schedule(pipeline)
    if not has_latents(pipeline) or prediction_type(settings) == FLOW:
        return {}
    return ENFORCED if is_stable_diffusion(pipeline) else of_sampling(settings)


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


def zeros_for_empty_prompt(pipeline: Path) -> bool:
    """True if an empty negative prompt of Stable Diffusion XL is zeros, as by the pipeline's default."""
    index = pipeline / INDEX
    return not index.is_file() or bool(read_json(index).get(ZEROS, True))


def is_projected(folder: Path) -> bool:
    """True if the denoiser in a folder has projections, by the class in its config.json."""
    return str(read_json(folder / "config.json").get("_class_name")).startswith(PROJECTED)


def is_stable_diffusion(pipeline: Path) -> bool:
    """True if StableDiffusionPipeline draws, that of versions 1 and 2."""
    config = denoiser_folder(pipeline) / "config.json"
    return takes_text(pipeline) and (not config.is_file() or parts_between(read_json(config)) is ENCODERS)


def masks_text(pipeline: Path) -> bool:
    """True if the text encoder does not see what fills up a text; only StableDiffusionPipeline has a choice."""
    file = pipeline / "text_encoder" / "config.json"
    return is_stable_diffusion(pipeline) and file.is_file() and bool(read_json(file).get("use_attention_mask"))


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
    with naming(file):
        return vae_factor(read_json(file))
