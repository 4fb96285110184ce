"""Which networks a merge adds: the items of merge.experts, each with its name, its folder and what makes it."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme.config.paths import DENOISER, snapshot_path
from deme.config.trainings import BASELINES, CONTINUED, NAMED_TRAININGS, NEON, SELF, SOUP

RANGES, TRAJECTORY, RANDOM = "ranges", "trajectory", "random"
WORDS = (RANGES, SELF, SOUP, TRAJECTORY, RANDOM, CONTINUED, *BASELINES)  # of merge.experts; its other items: folders
RANDOM_DIRECTIONS = "scripts/random_directions.py"
TRAIN = "train it with finetune.py finetune.range"
MODELS = ("pretrained", "ensemble", "merged", NEON, *NAMED_TRAININGS)  # other networks that tables name
TELLING_NOTHING = (DENOISER, "finetuned", "/")  # parts of a folder's path


@dataclass(frozen=True)
class Network:
    """A network whose task vector is added, with a coefficient of its own."""

    name: str  # in tables and pictures
    folder: Path  # of the UNet
    word: str | None = None  # of WORDS; None: a folder that was given
    remedy: str = "merge.experts must name the folder of a UNet"  # where it is missing
    training: Path | None = None  # the folder of the training whose cost is this network's, if it is known
    timesteps: tuple[int, int] | None = None  # its range if it is the expert of one


def networks_of(config: Any) -> list[Network]:
    """The networks that a configuration's merge adds, in the order of their coefficients."""
    of_words = {word: list(of_word(config, word)) for word in config.merge.experts if word in WORDS}
    folders = [path_of(item) for item in config.merge.experts if item not in WORDS]
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


def of_word(config: Any, word: str) -> Iterator[Network]:
    """The networks that a word of WORDS stands for; their folders lie in merge.finetuned."""
    run = Path(config.output_dir) / config.name / "finetuned"
    trainings = run if config.merge.finetuned is None else Path(config.merge.finetuned)
    ranges = list(zip(config.timesteps.names, config.timesteps.ranges, strict=True))
    if word == RANGES:
        for number, (name, edges) in enumerate(ranges):
            folder = trainings / name
            yield Network(name, folder / DENOISER, word, f"{TRAIN}={number}", folder, edges)
    elif word == RANDOM:
        for name, _ in ranges:
            folder = trainings / f"{RANDOM}-{name}" / DENOISER
            yield Network(f"{RANDOM}-{name}", folder, word, f"make it with {RANDOM_DIRECTIONS}", trainings / name)
    elif word == TRAJECTORY:
        every = config.finetune.snapshot_every
        training = trainings / CONTINUED
        remedy = f"{TRAIN}={CONTINUED} finetune.snapshot_every={every}; delete {training} if that has no snapshots"
        for step in range(every, config.steps_of(CONTINUED) + 1, every):
            folder = snapshot_path(training, step) / DENOISER
            yield Network(f"{CONTINUED}-{step}", folder, word, remedy, training)
    else:
        for name in {SELF: config.self_trained_names, SOUP: config.soup_names}.get(word, [word]):
            folder = trainings / name
            yield Network(name, folder / DENOISER, word, f"{TRAIN}={word}", folder)


def path_of(item: str | dict[str, Any]) -> Path:
    """The folder that an item of merge.experts names."""
    return Path(os.path.expanduser(item["path"] if isinstance(item, dict) else item))


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
