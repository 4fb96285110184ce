"""The settings of a merge, and the networks that it adds: merge.experts, each with its name and folder."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme.config.paths import LORAS, SECOND, SUBFOLDERS, denoiser_in, lora_in, product_of, snapshot_path, usual_denoiser
from deme.config.section import Section, is_one_line, one_of, setting
from deme.config.trainings import BASELINES, CONTINUED, NAMED_TRAININGS, NEON, SELF, SOUP, WIDTH_RULE, is_width

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # owner/name
MERGE_METHODS = tuple(sorted(file.stem for file in Path(__file__).parents[1].glob("method/merging/[!_]*.py")))
RANGES, TRAJECTORY, RANDOM = "ranges", "trajectory", "random"
WORDS = (RANGES, SELF, SOUP, TRAJECTORY, RANDOM, CONTINUED, *BASELINES)  # of merge.experts; its other items: folders
RANDOM_DIRECTIONS, MERGE_STATISTICS = "scripts/random_directions.py", "scripts/merge_statistics.py"
SUM, SLERP = "task_arithmetic", "slerp"  # merge methods: the paper's; one whose coefficients are 1 − t and t
WITH_STATISTICS = ("fisher", "regmean")  # merge methods that need MERGE_STATISTICS
TRAIN = "train it with finetune.py finetune.range"
MODELS = ("pretrained", "ensemble", "merged", NEON, *NAMED_TRAININGS)  # other networks that tables name
TELLING_NOTHING = (*SUBFOLDERS, *LORAS, "finetuned", "/")  # parts of a folder's path


@dataclass(frozen=True)
class Merge(Section):
    """What is merged, how, and into what."""

    # whose task vectors: WORDS, folders of networks, pipelines or LoRAs, or LoRAs' .safetensors files; {path: …,
    # timesteps: [low, high]} is the expert of a range
    experts: list[Any] = setting(["ranges"], "merged path")
    method: str = setting(SUM, "merged", choices=MERGE_METHODS)
    settings: dict[str, Any] = setting({}, "merged")  # of the method: the fields of its class
    # w, one per network, the ranges' lowest first; null: 1/N of a word's N networks, −1/N of self-trained ones;
    # {"down_blocks.*": [...], "*": [...]}: for the first name pattern that matches a tensor; a file that search.py
    # wrote; search: the file of this run
    coefficients: Any = setting(None, "merged path")
    finetuned: str | None = setting(None, "merged one_run path")  # folder of 0000-0250/ …; null: this run's
    into: str = setting("lora", "merged omit_default", choices=("lora", "model"))  # of LoRAs: one LoRA, or a pipeline
    lora_rank: int | None = setting(None, "merged", above=0)  # of the merged LoRA; null: the sum of all ranks
    lora_format: str = setting("diffusers", "merged omit_default", choices=("diffusers", "kohya"))  # kohya: ComfyUI, …
    ema_width: float | None = setting(None, "merged")  # of the networks that are merged; null: their training's EMA
    single_file: bool = setting(False, "free omit_default")  # also write the whole pipeline in one, for ComfyUI, …
    output: str | None = setting(None, "place one_run path")  # null: merged/ of this run
    push_to_hub: str | None = setting(None, "free")  # also upload the merged folder to this Hub id, owner/name
    push_private: bool = setting(False, "free")  # make the Hub's repository private; a public one is refused

    def check_together(self) -> None:
        self.check("ema_width", self.ema_width is None or is_width(self.ema_width), WIDTH_RULE)
        for item in self.experts:
            self._check_item(item)
        items = [item if item in WORDS else os.path.realpath(path_of(item)) for item in self.experts]
        self.check("experts", len(items) == len(set(items)) > 0, "must be a list of different networks")
        named = self.push_to_hub is None or re.fullmatch(HUB_ID, self.push_to_hub) is not None
        self.check("push_to_hub", named, "must be a Hub id, owner/name")

    def _check_item(self, item: Any) -> None:
        """An item of `experts`: a word, or a folder, whose name must not look like one."""
        if isinstance(item, str) and "/" not in item and not is_lora(item):
            self.check("experts", item in WORDS, f"{item!r}: {one_of(WORDS, item)}; a folder is written ./NAME")
            return
        path, edges = (item.get("path"), item.get("timesteps", [0, 1])) if isinstance(item, dict) else (item, [0, 1])
        known = isinstance(item, str) or (isinstance(item, dict) and item.keys() <= {"path", "timesteps"})
        is_path = known and isinstance(path, str) and path != "" and is_one_line(path)
        rule = "must be a word, a folder, a LoRA's file, or {path: FOLDER, timesteps: [low, high]}"
        self.check("experts", is_path, f"{item!r}: {rule}")
        pair = isinstance(edges, list) and list(map(type, edges)) == [int, int] and 0 <= edges[0] < edges[1]
        self.check("experts", pair, f"timesteps={edges!r}: must be [low, high) with 0 <= low < high")


@dataclass(frozen=True)
class Network:
    """A network whose task vector is added, with a coefficient of its own."""

    name: str  # in tables and pictures
    folder: Path  # of the network; or the file of a LoRA
    word: str | None = None  # of WORDS; None: a folder that was given
    remedy: str = "merge.experts must name a network's folder, as …/unet, …/transformer or …/transformer_2, or a LoRA"
    training: Path | None = None  # the folder of the training whose cost is this network's, if it is known
    timesteps: tuple[int, int] | None = None  # its range if it is the expert of one


def networks_of(config: Any) -> list[Network]:
    """The networks that a configuration's merge adds, in the order of their coefficients."""
    of_words = {word: list(of_word(config, word)) for word in config.merge.experts if word in WORDS}
    folders = [given_path(item) for item in config.merge.experts if item not in WORDS]
    taken = {network.name for networks in of_words.values() for network in networks}
    names = iter(short_names(folders, {*taken, *config.timesteps.names, *MODELS}))
    found = []
    for item in config.merge.experts:
        if item in WORDS:
            found += of_words[item]
        else:
            edges = item.get("timesteps") if isinstance(item, dict) else None
            found.append(Network(next(names), path_of(item), timesteps=None if edges is None else tuple(edges)))
    return found


def experts_of(config: Any) -> list[Network]:
    """The experts of the ranges: those with timesteps among the networks that are merged, or else the trained ones."""
    given = [network for network in networks_of(config) if network.timesteps is not None]
    given.sort(key=lambda network: network.timesteps)
    if [network.timesteps for network in given] == config.timesteps.ranges:
        return given
    rule = f"their timesteps are not those of timesteps.ranges, {config.timesteps.ranges}"
    config.merge.check("experts", not given or RANGES in config.merge.experts, rule)
    return list(of_word(config, RANGES))


def of_word(config: Any, word: str) -> Iterator[Network]:
    """The networks that a word of WORDS stands for; their folders lie in merge.finetuned."""
    run = Path(config.output_dir) / config.name / "finetuned"
    trainings = run if config.merge.finetuned is None else Path(config.merge.finetuned)
    ranges = list(zip(config.timesteps.names, config.timesteps.ranges, strict=True))
    usual = usual_denoiser(config)
    if word == RANGES:
        for number, (name, edges) in enumerate(ranges):
            folder = trainings / name
            yield Network(name, product_of(config, folder), word, f"{TRAIN}={number}", folder, edges)
    elif word == RANDOM:
        for name, _ in ranges:
            folder = denoiser_in(trainings / f"{RANDOM}-{name}", usual)
            yield Network(f"{RANDOM}-{name}", folder, word, f"make it with {RANDOM_DIRECTIONS}", trainings / name)
    elif word == TRAJECTORY:
        every = config.finetune.snapshot_every
        training = trainings / CONTINUED
        remedy = f"{TRAIN}={CONTINUED} finetune.snapshot_every={every}; delete {training} if that has no snapshots"
        for step in range(every, config.steps_of(CONTINUED) + 1, every):
            folder = denoiser_in(snapshot_path(training, step), usual)
            yield Network(f"{CONTINUED}-{step}", folder, word, remedy, training)
    else:
        for name in {SELF: config.self_trained_names, SOUP: config.soup_names}.get(word, [word]):
            folder = trainings / name
            yield Network(name, product_of(config, folder), word, f"{TRAIN}={word}", folder)


def given_path(item: str | dict[str, Any]) -> Path:
    """The path that an item of merge.experts names."""
    return Path(os.path.expanduser(item["path"] if isinstance(item, dict) else item))


def path_of(item: str | dict[str, Any]) -> Path:
    """The same, or what is in it if it is a folder without a network: the file of a LoRA, or a pipeline's network."""
    path = given_path(item)
    inner = denoiser_in(path)
    is_pipeline = inner.is_dir() and not (path / "config.json").is_file() and not (path / SECOND).is_dir()
    return lora_in(path) or (inner if is_pipeline else path)


def is_lora(path: str | Path) -> bool:
    """True if a path is that of a LoRA's file."""
    return str(path).endswith(".safetensors")


def merges_loras(config: Any) -> bool:
    """True if what is merged are LoRAs: those of trainings with finetune.lora_rank, or given by their files."""
    return any(is_lora(network.folder) for network in config.merged_networks)


def makes_lora(config: Any) -> bool:
    """True if they are merged into one LoRA, which is no pipeline."""
    return merges_loras(config) and config.merge.into == "lora"


def of_loras(config: Any) -> dict[str, Any]:
    """The settings of LoRAs, for the record of a merge of them."""
    keys = ("into", "lora_rank", "lora_format") if merges_loras(config) else ()
    return {key: getattr(config.merge, key) for key in keys}


def check_searched_method(config: Any) -> None:
    """Check what a search of another merge method than the sum can do."""
    search, method = config.search, config.merge.method
    config.merge.check("method", method != SLERP, "can't be searched: its coefficients are 1 − t and t")
    of_networks = not merges_loras(config)
    config.merge.check("method", of_networks, f"can't be searched for LoRAs, only {SUM}")
    search.check("ema_widths", not search.ema_widths, f"can't be used with merge.method={method}, only {SUM}")
    if method in WITH_STATISTICS:
        rule = f"can't be searched with merge.method={method}, whose coefficients must not be negative"
        config.merge.check("experts", all(network.word != SELF for network in config.merged_networks), rule)
        search.check("bounds", search.interval[0] >= 0, f"must not begin below 0 with merge.method={method}")
        search.check("grow_bounds", not search.grow_bounds, f"can't be used with merge.method={method}")


def check_loras(config: Any) -> None:
    """Check what has to hold where LoRAs are trained or merged, and where they are not."""
    rule = "projections need all weights to be trained: set model.projection=false"
    config.finetune.check("lora_rank", config.finetune.lora_rank is None or not config.model.projection, rule)
    merge, are_loras, into_one = config.merge, merges_loras(config), makes_lora(config)
    folders = [network.folder for network in config.merged_networks if network.word is None]
    missing = "".join(f"; {folder} is missing" for folder in folders if not (is_lora(folder) or folder.exists()))
    rule = "LoRAs and whole networks can't be merged together; merge.into=model makes a network of a LoRA"
    merge.check("experts", len({is_lora(network.folder) for network in config.merged_networks}) == 1, rule + missing)
    rule = "only for LoRAs: those of finetune.lora_rank, or LoRAs' files or folders in merge.experts"
    merge.check("into", are_loras or merge.into == "lora", rule + missing)
    for key, usual in (("lora_rank", None), ("lora_format", "diffusers")):
        rule = "only for LoRAs that are merged into one: merge.experts=[FILE or FOLDER, …] merge.into=lora"
        merge.check(key, into_one or getattr(merge, key) == usual, rule + missing)
    rule = "uploads pipelines, not LoRAs: set merge.into=model"
    merge.check("push_to_hub", not into_one or merge.push_to_hub is None, rule)
    rule = "holds a pipeline, not a LoRA: set merge.into=model"
    merge.check("single_file", not (into_one and merge.single_file), rule)
    rule = "LoRAs have no snapshots"
    merge.check("ema_width", not are_loras or merge.ema_width is None, rule)
    config.search.check("ema_widths", not are_loras or not config.search.ema_widths, rule)


def short_names(folders: Sequence[Path], taken: set[str]) -> list[str]:
    """Names of folders: as few of the last parts of their paths as tell all of them, and names that are taken, apart.

    Folders whose paths are equal have equal names.
    """
    parts = [[part for part in folder.parts if part not in TELLING_NOTHING] or [str(folder)] for folder in folders]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(part[-count:]) for part in parts]
        if len({*names, *taken}) == len(names) + len(taken):
            return names
    return [str(folder).replace("/", "-") for folder in folders]
