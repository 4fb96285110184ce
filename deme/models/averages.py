"""Trained networks at any EMA width: averages of their weights, combined from the snapshots of their trainings."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.paths import SNAPSHOTS, average_name, denoiser_in, snapshot_path
from deme.config.reading import override
from deme.config.trainings import LARGEST_WIDTH, LEAST_WIDTH
from deme.errors import UserError, naming
from deme.job.files import Watched, atomic_folder, checked, locked, read_json
from deme.job.records import AVERAGE, RUN, SNAPSHOT, Record, changes, read_record
from deme.models.trained import check_trained
from deme.models.variants import write_denoiser
from deme.models.weights import has_weights, load_tensors, weights_files, weights_hash

Kept = dict[tuple[int, float], Path]  # (step, width) → the network's folder of an average
LARGEST_ERROR = 0.1  # of a combined power function, relative to its norm


def merged_folders(config: Config, pretrained: Path, width: float | None) -> list[Path]:
    """The folders of the networks that are merged, each with its weights, or the files of LoRAs.

    Networks of an EMA width are made first; None: their training's EMA.
    """
    folders = check_trained(pretrained, config.merged_networks)
    key = "merge.ema_width" if config.merge.ema_width is not None else "search.ema_widths"
    return folders if width is None else [write_average(folder.parent, width, key) for folder in folders]


def write_average(training: Path, width: float, key: str) -> Path:
    """Make the network of a width at a training's last snapshot, unless it is there, and return its folder."""
    output = training / average_name(width)
    with naming(key, width):
        kept, made_from = find_averages(training)
        wanted = Record(AVERAGE, made_from | {"step": max(kept)[0], "ema_width": width})
        with locked(output, "output_dir", wait=True):
            record = read_record(AVERAGE, output)
            if record is None or not record.fits(wanted, output):
                _write(kept, wanted, output)
                print(f"wrote {output}")
    return denoiser_in(output)


def recorded_average(network: Path) -> dict[str, Any]:
    """Width, step and SHA-256 of the snapshots of a network that `write_average` made, for records; else nothing."""
    record = read_record(AVERAGE, network.parent)
    return {} if record is None else {key: record.made_from.get(key) for key in ("ema_width", "step")} | record.beside


def find_averages(training: Path) -> tuple[Kept, dict[str, Any]]:
    """All averages in a training's snapshots, in the order of their steps, and the record of the training."""
    run = read_record(RUN, training)
    if run is None:
        raise UserError(f"{training / RUN.file}: missing, so this is no training of finetune.py, which keeps averages")
    with naming(training / RUN.file):
        widths = checked(run.made_from.get("finetune.ema_profiles", []), list[float], "finetune.ema_profiles")
        last = run.made_from.get("finetune.max_steps", run.made_from.get("distill.max_steps"))
        last = checked(last, int, "finetune.max_steps")
    steps = [int(path.name) for path in (training / SNAPSHOTS).glob("*") if path.name.isdecimal()]
    every, chosen = min(filter(None, steps), default=last + 1), training.name.partition("-")[0]
    command = "finetune.py" if chosen.isdecimal() else f"finetune.py finetune.range={chosen}"
    profiles = override("finetune.ema_profiles", widths or [0.05, 0.1])
    usual = every if every <= last else max(1, last // 16)
    remedy = f"delete {training} and train again: {command} finetune.snapshot_every={usual} '{profiles}'"
    kept = {
        (step, width): denoiser_in(snapshot_path(training, step) / average_name(width))
        for step in range(every, last + 1, every)
        for width in widths
    }
    if not kept:
        raise UserError(f"{training / SNAPSHOTS}: holds no averages of finetune.ema_profiles; {remedy}")
    for (step, _), folder in kept.items():
        snapshot = snapshot_path(training, step)
        if not has_weights(folder):
            raise UserError(f"{folder}: missing; {remedy}")
        record = read_record(SNAPSHOT, snapshot)
        if record is None:
            raise UserError(f"{snapshot / SNAPSHOT.file}: missing; {remedy}")
        if changed := changes(record.made_from, run.made_from | {"step": step}, RUN.later):
            raise UserError(f"{snapshot}: of another run: {', '.join(changed)}; {remedy}")
    return kept, run.made_from


def possible_widths(profiles: Iterable[tuple[int, float]]) -> str:
    """The widths that averages can be combined to at the last of their steps, in words."""
    from deme.method.posthoc_ema import combination

    profiles, thousandths = list(profiles), range(round(1000 * LEAST_WIDTH), round(1000 * LARGEST_WIDTH) + 1)
    errors = {n: combination(profiles, (max(profiles)[0], n / 1000))[1] for n in thousandths}
    fit = [n for n in thousandths if errors[n] <= LARGEST_ERROR]
    lows, highs = [n for n in fit if n - 1 not in fit], [n for n in fit if n + 1 not in fit]
    return ", ".join(f"{low / 1000:.3f} … {high / 1000:.3f}" for low, high in zip(lows, highs, strict=True))


def _write(kept: Kept, record: Record, output: Path) -> None:
    from deme.method.posthoc_ema import combination, combine
    from deme.method.task_vectors import check_compatible

    coefficients, error = combination(list(kept), (record.made_from["step"], record.made_from["ema_width"]))
    if error > LARGEST_ERROR:
        raise UserError(f"the snapshots in {output.parent} can give {possible_widths(kept)}; more of them give more")
    used = {folder: weight for folder, weight in zip(kept.values(), coefficients, strict=True) if weight != 0}
    watched = Watched(file for folder in used for file in weights_files(folder))
    hashes = {str(folder.relative_to(output.parent)): weights_hash(folder) for folder in used}
    first, *others = snapshots = [load_tensors(folder) for folder in used]
    for folder, tensors in zip(list(used)[1:], others, strict=True):
        check_compatible(first, tensors, str(folder))
    with atomic_folder(output) as temporary:
        settings = read_json(next(iter(used)) / "config.json")
        write_denoiser(temporary, combine(snapshots, list(used.values())), settings)
        watched.check()
        Record(AVERAGE, record.made_from, {"snapshots": hashes}).write(temporary)
