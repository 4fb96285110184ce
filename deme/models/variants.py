"""The models of a run that can be sampled (sample.model), what identifies and makes them, and searched coefficients."""

import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.networks import is_lora
from deme.config.paths import LORA, Paths, denoiser_in, lora_in, sampler_and_steps, without_schedule
from deme.config.section import Section
from deme.config.sections import DDIM, SINGLE_FILE, Sample
from deme.config.trainings import BASELINES, CONTINUED, DISTILLED, NAMED_TRAININGS, NEON
from deme.errors import UserError, naming, shown
from deme.job.files import Watched, read_json, sha256
from deme.job.records import ARCHITECTURE, BASE, ENCODER, LORA_CONFIGS, SCHEDULE
from deme.models import kinds, pipelines
from deme.models.lora_settings import config_beside, is_read_anew, read_names
from deme.models.pipelines import denoiser_folder, encoder_files, find_pipeline, schedule_file
from deme.models.schedules import ENFORCED, prediction_type
from deme.models.trained import check_predicts
from deme.models.weights import WEIGHTS, weights_files, weights_hash

# the models of a table's rows, in this order; others follow by name
ORDER = ("pretrained", CONTINUED, *BASELINES, "ensemble", "merged", DISTILLED, NEON)
MAKERS = {name: f"finetune.py finetune.range={name}" for name in NAMED_TRAININGS}  # model of a run → its command
MAKERS |= {"ensemble": "finetune.py", "merged": "merge.py"}
MAKERS[NEON] = "merge.py merge.experts=[self] merge.coefficients=null merge.output=$(python merge.py --path neon)"
ITS_PATH = "_name_or_path"  # key of config.json: a path of the machine that trained the network
UNCOMPARED = {"_class_name", "_diffusers_version", ITS_PATH, "dropout"}  # the last one is of training alone


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, examined before anything is loaded."""

    pipeline: Path  # its noise schedule and encoders are used; it is the base of LoRAs
    denoisers: list[Path]  # folders or the files of LoRAs: one, or one per timestep range
    ranges: Sequence[tuple[int, int]] = ()  # of the denoisers, if the pipeline says so itself

    @property
    def folders(self) -> list[Path]:
        """The folders of the denoisers; that of a LoRA is its base's."""
        base = denoiser_folder(self.pipeline)
        return list(dict.fromkeys(base if is_lora(path) else path for path in self.denoisers))

    @property
    def lora_configs(self) -> list[Path]:
        """PEFT's configurations that are read from beside the files of LoRAs."""
        found = [config_beside(file, *read_names(file)) for file in self.denoisers if is_lora(file)]
        return [config for config in found if config is not None]

    def check_fits(self, config: Config) -> None:
        """Compare resolution and number of timesteps with the configuration."""
        factor, schedule = pipelines.latent_factor(self.pipeline), schedule_file(self.pipeline)
        data, timesteps = config.data, config.timesteps
        for folder in self.folders:
            settings = read_json(folder / "config.json")
            with naming(folder / "config.json"):
                size = kinds.sample_size(settings)
                multiple = kinds.least_size(settings) * factor if size is None else 0
            if size is None:
                data.check("resolution", data.resolution % multiple == 0, f"must be a multiple of {multiple}")
            else:
                rule = f"must be {size * factor}, as the network in {folder} has sample_size={size}"
                data.check("resolution", data.resolution == size * factor, rule)
        total = read_json(schedule).get("num_train_timesteps", 1000)  # diffusers' default
        fits = total == timesteps.num_train_timesteps
        timesteps.check("num_train_timesteps", fits, f"the scheduler in {schedule} has {total}")
        are_pixels = not pipelines.has_latents(self.pipeline)
        config.sample.check("clip", are_pixels or not config.sample.clip, "latents have no bounds, only pixels have")
        if config.sample.prediction_scale is not None:
            self.check_noise_is_predicted(config.sample, "prediction_scale")

    def check_noise_is_predicted(self, section: Section, key: str) -> None:
        """Refuse a setting that scales predicted noise where networks predict x₀ or v."""
        schedule = schedule_file(self.pipeline)
        predicts = prediction_type(pipelines.read_schedule(self.pipeline))
        section.check(
            key, predicts == "epsilon", f"scales predicted noise, but {schedule} has prediction_type={predicts}"
        )

    def watched(self) -> Watched:
        """The files whose hash and content are read."""
        weights = [file for path in {*self.denoisers, *self.folders} for file in weights_files(path)]
        settings = [folder / "config.json" for folder in self.folders]
        schedule, encoders = schedule_file(self.pipeline), encoder_files(self.pipeline).values()
        return Watched([*weights, *settings, *self.lora_configs, schedule, *encoders])

    def hashes(self) -> dict[str, str]:
        """SHA-256 of what is read beside the denoisers' weights, as records say: the noise schedule, encoders, …"""
        hashes = {SCHEDULE: sha256(schedule_file(self.pipeline))}
        for base in set(self.folders) - set(self.denoisers):
            hashes[BASE] = weights_hash(base)
        anew = [file for file in self.denoisers if is_lora(file) and is_read_anew(file)]
        said = [*map(sha256, self.lora_configs), *["header"] * len(anew)]  # the weights' hash has the header itself
        if said:
            hashes[LORA_CONFIGS] = hashlib.sha256("".join(said).encode()).hexdigest()
        if files := encoder_files(self.pipeline):
            lines = "\n".join(f"{name} {sha256(path)}" for name, path in files.items())
            lines += "" if pipelines.zeros_for_empty_prompt(self.pipeline) else f"\n{pipelines.ZEROS} false"
            lines += "\nuse_attention_mask true" if pipelines.masks_text(self.pipeline) else ""
            hashes[ENCODER] = hashlib.sha256(lines.encode()).hexdigest()
        return hashes

    def architecture(self) -> dict[str, str]:
        """SHA-256 of the settings of the denoisers that count, for records. Imports diffusers."""
        settings = dict.fromkeys(
            json.dumps(counted(read_json(folder / "config.json")), sort_keys=True) for folder in self.folders
        )
        return {ARCHITECTURE: hashlib.sha256("\n".join(settings).encode()).hexdigest()}

    def spacing(self, settings: Sample) -> dict[str, str]:
        """The timestep spacing for the record of samples; nothing where it is the sampler's default."""
        given = settings.timestep_spacing
        if settings.scheduler in DDIM:
            given = given or read_json(schedule_file(self.pipeline)).get("timestep_spacing", "leading")
            given = None if given == "leading" else given
        return {} if given is None else {"sample.timestep_spacing": given}

    def sampling(self) -> dict[str, Any]:
        """The settings of ENFORCED for the record of samples, where the images of older versions had others."""
        given = pipelines.read_schedule(self.pipeline)
        before = ENFORCED if pipelines.takes_text(self.pipeline) else {"clip_sample": True} | given
        now = pipelines.latent_sampling(self.pipeline)
        return {f"scheduler.{key}": value for key, value in now.items() if value != before.get(key, value)}


def table_order(folder: str) -> tuple[str, int, int, str]:
    """The place of a sample folder's row by its name: by schedule, with fewer steps first, then by ORDER."""
    model, schedule = without_schedule(folder)
    return *sampler_and_steps(schedule), ORDER.index(model) if model in ORDER else len(ORDER), model


def find_model(model: str, paths: Paths) -> ModelFiles:
    """The model of this name or folder: a pipeline, or a denoiser that takes the pretrained noise schedule."""
    if model == "pretrained":
        pipeline = find_pretrained(paths)
        return ModelFiles(pipeline, [denoiser_folder(pipeline)])
    if model in MAKERS:
        denoisers = made_denoisers(model, paths)
        for path in denoisers:
            if not path.exists():
                raise UserError(f"{path} is missing; {MAKERS[model]} makes it")
        merged = None if is_lora(denoisers[0]) else merged_pipeline(model, paths)
        if merged is not None:
            return ModelFiles(find_pipeline(str(merged)), denoisers)
        pretrained = find_pretrained(paths)
        return ModelFiles(pretrained, check_predicts(pretrained, denoisers))
    folder, denoiser = Path(model), denoiser_in(Path(model))
    lora = folder if is_lora(folder) and folder.is_file() else lora_in(folder)
    found = [] if lora is None else [lora]
    if not found and denoiser.is_dir() and (folder / "scheduler").is_dir():
        pipeline = find_pipeline(model)
        experts = pipelines.experts_in(pipeline)
        return ModelFiles(pipeline, [folder for folder, _ in experts] or [denoiser], [edges for _, edges in experts])
    found += [denoiser] if denoiser.is_dir() else []
    found += [folder] if (folder / "config.json").is_file() else []
    found += [paths.trained(model)] if "/" not in model and paths.trained(model).exists() else []
    if not found:
        names = f"{', '.join(ORDER)}, a training's folder in finetuned/"
        raise UserError(f"not {names}, a folder that holds a network, or the file of a LoRA")
    pretrained = find_pretrained(paths)
    return ModelFiles(pretrained, check_predicts(pretrained, found[:1]))


def made_denoisers(model: str, paths: Paths) -> list[Path]:
    """The denoiser folders of a model in MAKERS, or the files of its LoRAs, whether they exist or not."""
    if model == "ensemble":
        return paths.experts
    merged = merged_pipeline(model, paths)
    if merged is None:
        return [paths.trained(model)]
    return [merged / LORA if (merged / LORA).is_file() else denoiser_in(merged)]


def merged_pipeline(model: str, paths: Paths) -> Path | None:
    """The folder that merge.py writes a model to; None for other models."""
    return {"merged": paths.merged, NEON: paths.neon}.get(model)


def find_pretrained(paths: Paths) -> Path:
    """The folder of the pipeline that finetuning starts from."""
    if paths.pretrained == str(paths.pretrained_here) and not paths.pretrained_here.is_dir():
        raise UserError(f"model.pretrained=null: {paths.pretrained} is missing; pretrain.py makes it")
    with naming("model.pretrained", paths.pretrained):
        if not paths.pretrained.endswith(SINGLE_FILE):
            return pipelines.check_has_one_network(find_pipeline(paths.pretrained))
        from deme.models.single_file import open_single_file

        return open_single_file(Path(paths.pretrained), paths.pretrained_config, paths.single_files)


@functools.cache
def default_settings(name: str) -> dict[str, Any]:
    """The default settings of a class of diffusers, as in a config.json."""
    import diffusers

    values = {key: given.default for key, given in inspect.signature(getattr(diffusers, name)).parameters.items()}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def counted(settings: dict[str, Any]) -> dict[str, Any]:
    """The class of a denoiser, and in what it computes otherwise than by the class's defaults."""
    kind = kinds.denoiser_class(settings)
    defaults = default_settings(kind)
    counting = (settings.keys() & defaults.keys()) - UNCOMPARED
    return {"_class_name": kind} | {key: settings[key] for key in counting if settings[key] != defaults[key]}


def common_architecture(folders: Sequence[Path]) -> Path:
    """The denoiser folder with the architecture of all of them, which must agree but for projections.

    If any after the first has projections it is one of these (`with_identity_projections` fills the others' weights).
    """
    first, *others = (folder / "config.json" for folder in folders)
    expected = read_json(first)
    kind = kinds.denoiser_class(expected)
    for file in others:
        given = read_json(file)
        if kinds.denoiser_class(given) != kind:
            raise UserError(f"{file}: _class_name={kinds.denoiser_class(given)}, but {kind} in {first}")
        differing = {key for key in {*given, *expected} if given.get(key, ...) != expected.get(key, ...)}
        for key in sorted(differing - UNCOMPARED):
            default = default_settings(kind).get(key, ...)  # diffusers ignores other keys
            values = given.get(key, default), expected.get(key, default)
            if default is not ... and values[0] != values[1]:
                raise UserError(f"{file}: {key}={shown(values[0])}, but {shown(values[1])} in {first}")
    by_preference = [*folders[1:], folders[0]]
    return next(filter(pipelines.is_projected, by_preference), by_preference[0])


def write_denoiser(parent: Path, tensors: dict[str, Any], config: dict, subfolder: str | None = None) -> None:
    """Write a denoiser's folder into a pipeline's or a training's: weights and config.json."""
    from safetensors.torch import save_file

    folder = parent / (subfolder or kinds.subfolder_of(config))
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = {key: value for key, value in config.items() if key != ITS_PATH}
    (folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def write_index(folder: Path, pretrained: Path) -> None:
    """Write model_index.json beside a denoiser: it names only classes that are known, and no safety checker."""
    denoiser, given = denoiser_in(folder), pipelines.read_index(pretrained)
    settings = read_json(denoiser / "config.json")
    kind, schedule = kinds.denoiser_class(settings), schedule_file(pretrained)
    fitting = [name for name, denoiser in kinds.PIPELINES.items() if denoiser == kind]
    fitting = [name for name in fitting if (name == kinds.XL) == kinds.is_xl(settings)]
    library = "deme.projection" if pipelines.is_projected(denoiser) else "diffusers"
    index = {
        "_class_name": given["_class_name"] if given.get("_class_name") in fitting else fitting[0],
        "scheduler": ["diffusers", read_json(schedule).get("_class_name", given.get("scheduler"))],
        denoiser.name: [library, settings.get("_class_name", kind)],
    }
    for part, name in pipelines.parts_of(pretrained, settings).items():
        index[part] = ["diffusers" if part == "vae" else "transformers", given.get(part, name)]
    index |= {part: [None, None] for part in kinds.parts_between(settings) if part not in index}
    index |= {kinds.SECOND: [None, None]} if kind == kinds.WAN else {}
    if kinds.is_xl(settings):
        index |= {pipelines.ZEROS: pipelines.zeros_for_empty_prompt(pretrained)}
        index |= {part: [None, None] for part in ("feature_extractor", "image_encoder")}
    elif index["_class_name"] == "StableDiffusionPipeline":
        index |= {"requires_safety_checker": False, **{part: [None, None] for part in kinds.NEVER_RUN}}
    if kinds.num_classes(settings) and (names := pipelines.names_of_classes(pretrained)) is not None:
        index |= {"id2label": names}
    (folder / pipelines.INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_pipeline_files(folder: Path, pretrained: Path) -> None:
    """Make a denoiser's folder a pipeline: add the index, and a pretrained pipeline's noise schedule and encoders.

    Weights are hard links if possible; settings are not, as other programs write them in place.
    """
    write_index(folder, pretrained)
    schedule = schedule_file(pretrained)
    for name, source in {**encoder_files(pretrained), f"scheduler/{schedule.name}": schedule}.items():
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        if source.suffix == ".safetensors":
            with suppress(OSError):  # another file system, or one without hard links
                os.link(source.resolve(), target)
                continue
        shutil.copy(source, target)


@contextmanager
def timed(notes: Path) -> Iterator[None]:
    """Add the block's seconds to a file, if there is one, however the block ends."""
    begin = time.monotonic()
    try:
        yield
    finally:
        if notes.exists():
            with notes.open("a", encoding="utf-8") as file:
                file.write(f"{time.monotonic() - begin:.1f}\n")


def seconds_in(notes: Path) -> float | None:
    """The seconds of all commands that a file of `timed` tells of; None if they are not known."""
    try:
        taken = [float(line) for line in notes.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return None
    return sum(taken) if all(0 <= seconds < math.inf for seconds in taken) else None
