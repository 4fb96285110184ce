"""Networks that are merged, or drawn by the pretrained pipeline: they must be there, and should be made for it."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from deme.config.networks import Network, is_lora
from deme.errors import UserError, naming
from deme.job.files import checked, read_json, sha256
from deme.job.rank import say_once
from deme.job.records import AVERAGE, PRETRAINED_WEIGHTS, RUN, SCHEDULE, SNAPSHOT, read_record
from deme.models.lora_settings import read_header
from deme.models.pipelines import SCHEDULER_CONFIG, read_schedule, schedule_file
from deme.models.schedules import FLOW_SCHEDULERS, SCHEDULERS, prediction_type
from deme.models.weights import WEIGHTS, has_weights


def check_trained(pipeline: Path, networks: Sequence[Network]) -> list[Path]:
    """The folders of networks that are merged or are experts, each with its weights; or the files of LoRAs.

    Reads no weights: what has their hashes calls `tell_other_bases`.
    """
    for network in networks:
        if not has_weights(network.folder):
            file = network.folder if is_lora(network.folder) else network.folder / WEIGHTS
            raise UserError(f"{file}: missing; {network.remedy}")
        if network.folder.is_file() and not is_lora(network.folder):
            raise UserError(
                f"{network.folder}: a file; LoRAs must be .safetensors, and a network is named by its folder"
            )
    check_timesteps(networks)
    return check_predicts(pipeline, [network.folder for network in networks])


def tell_other_bases(base: Path, digest: str, networks: Iterable[Path]) -> None:
    """Tell of networks that were trained from other weights than those in `base`, of this hash, by their records.

    They may be the same in another form, as shards or in half precision. The header of a LoRA names its base.
    """
    unless = "unless they are the same in another form, its task vector holds their difference"
    line = f"trained from other weights than those in {base}; {unless}"
    tell_of_others(PRETRAINED_WEIGHTS, digest, networks, line)


def check_timesteps(networks: Sequence[Network]) -> None:
    """Refuse experts that were trained on none of the timesteps that they are to be experts of."""
    for network in networks:
        low, high = network.timesteps or (0, math.inf)
        ranges = trained_on(network.folder)
        if ranges and all(end <= low or begin >= high for begin, end in ranges):
            rule = f"trained on the timesteps {ranges}, but taken for the expert of {(low, high)}"
            raise UserError(f"{network.folder}: {rule}")


def trained_on(network: Path) -> list[tuple[int, int]]:
    """The ranges of timesteps that a network was trained on by its record, or a LoRA by its header, if that says so."""
    if not is_lora(network):
        found = re.fullmatch(r"(?:self-)?([0-9]+)-([0-9]+)", str(recorded(network)[1].get("finetune.range")))
        return [(int(found[1]), int(found[2]))] if found else []
    with suppress(UserError, LookupError, ValueError):
        return [(low, high) for low, high in checked(json.loads(read_header(network)["timesteps"]), list[list[int]])]
    return []


def check_predicts(pipeline: Path, networks: list[Path]) -> list[Path]:
    """Refuse networks of other pipelines that predict something else than this one's, and return the networks.

    Those that were trained with another file of the noise schedule are told: it may differ in what only sampling reads.
    """
    file, predicts = schedule_file(pipeline), prediction_type(read_schedule(pipeline))
    for network in (path for path in networks if not is_lora(path)):
        for own in (network.parent / "scheduler" / SCHEDULER_CONFIG, network / SCHEDULER_CONFIG):
            if own.is_file() and (other := predicted(own)) not in (None, predicts):
                raise UserError(f"{own}: prediction_type={other}, but {predicts} by {file}")
    line = f"trained with another noise schedule than {file}, or with other settings of sampling in it"
    tell_of_others(SCHEDULE, sha256(file), networks, line)
    return networks


@cache
def recorded(network: Path) -> tuple[Path, dict[str, Any]]:
    """The file of the record that a network was trained with, and what that says; nothing if there is none."""
    for kind in (RUN, SNAPSHOT, AVERAGE):
        with suppress(UserError):  # such as a file of this name by another program
            if (record := read_record(kind, network.parent)) is not None:
                return network.parent / kind.file, record.made_from
    return network, {}


def predicted(schedule: Path) -> str | None:
    """What networks predict by the file of a noise schedule; None if its class has no known default."""
    settings = read_json(schedule)
    if settings.get("_class_name") not in (*SCHEDULERS, *FLOW_SCHEDULERS):
        return settings.get("prediction_type")
    with naming(schedule):
        return prediction_type(settings)


def tell_of_others(key: str, digest: str, networks: Iterable[Path], line: str) -> None:
    """Tell of trainings whose records have another hash, each by the record of its first network."""
    trainings: dict[str, Path] = {}
    for record, made_from in map(recorded, networks):
        if made_from.get(key, digest) != digest:
            trainings.setdefault(str({**made_from, "step": None, "ema_width": None}), record)
    for record in trainings.values():
        say_once(f"{record}: {line}")
