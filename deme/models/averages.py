"""Trained networks at any EMA width: averages of their weights, combined from the snapshots of their trainings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.paths import DENOISER, SNAPSHOTS, average_name, snapshot_path
from deme.config.trainings import LARGEST_WIDTH, LEAST_WIDTH
from deme.errors import UserError, naming
from deme.job.files import Watched, atomic_folder, checked, locked, read_json
from deme.job.records import AVERAGE, RUN, SNAPSHOT, Record, changes, read_record
from deme.models.pipelines import has_weights, load_tensors, weights_files, weights_hash
from deme.models.variants import check_trained, write_denoiser

LARGEST_ERROR = 0.1  # of a combined power function, relative to its norm


@dataclass(frozen=True)
class Averages:
    """The averages that the snapshots of a training hold."""

    training: Path
    made_from: dict[str, Any]  # the training's record
    profiles: list[tuple[int, float]]  # (step, width), in the order of the steps

    @property
    def last_step(self) -> int:
        """Of the last snapshot."""
        return self.profiles[-1][0]

    def folder(self, step: int, width: float) -> Path:
        """The network's folder of an average."""
        return snapshot_path(self.training, step) / average_name(width) / DENOISER


def merged_folders(config: Config) -> list[Path]:
    """The folders of the networks that are merged, each with its weights; those of merge.ema_width are made first."""
    width = config.merge.ema_width
    folders = check_trained(config.merged_networks)
    return folders if width is None else [write_average(folder.parent, width) for folder in folders]


def write_average(training: Path, width: float) -> Path:
    """Make the network of a width at a training's last snapshot, unless it is there, and return its folder."""
    output = training / average_name(width)
    with naming("merge.ema_width", width):
        averages = find_averages(training)
        wanted = Record(AVERAGE, averages.made_from | {"step": averages.last_step, "ema_width": width})
        with locked(output, "output_dir", wait=True):
            record = read_record(AVERAGE, output)
            if record is None or not record.fits(wanted, output):
                _write(averages, width, wanted, output)
    return output / DENOISER


def recorded_average(network: Path) -> dict[str, Any]:
    """Width, step and SHA-256 of the snapshots of a network that `write_average` made, for records; else nothing."""
    record = read_record(AVERAGE, network.parent)
    return {} if record is None else {key: record.made_from.get(key) for key in ("ema_width", "step")} | record.beside


def find_averages(training: Path) -> Averages:
    """The averages of finetune.ema_profiles in a training's snapshots: all of them, and of this run."""
    record = read_record(RUN, training)
    if record is None:
        raise UserError(f"{training / RUN.file}: missing, so this is no training of finetune.py, which keeps averages")
    made_from = record.made_from
    steps = [int(path.name) for path in (training / SNAPSHOTS).glob("*") if path.name.isdecimal()]
    every, chosen = min(filter(None, steps), default=None), training.name.partition("-")[0]
    remedy = (
        f"delete {training} and train again: finetune.py{'' if chosen.isdecimal() else f' finetune.range={chosen}'} "
    )
    remedy += f"finetune.snapshot_every={every or 'N'} 'finetune.ema_profiles=[0.05,0.1]'"
    if every is None or "finetune.ema_profiles" not in made_from:
        raise UserError(f"{training / SNAPSHOTS}: holds no averages of finetune.ema_profiles; {remedy}")
    with naming(training / RUN.file):
        widths = checked(made_from["finetune.ema_profiles"], list[float], "finetune.ema_profiles")
        last = checked(made_from.get("finetune.max_steps", made_from.get("distill.max_steps")), int, "max_steps")
    averages = Averages(training, made_from, [(n, width) for n in range(every, last + 1, every) for width in widths])
    for step, width in averages.profiles:
        folder, snapshot = averages.folder(step, width), snapshot_path(training, step)
        if not has_weights(folder):
            raise UserError(f"{folder}: missing; {remedy}")
        record = read_record(SNAPSHOT, snapshot)
        if changed := changes({} if record is None else record.made_from, made_from | {"step": step}, RUN.later):
            raise UserError(f"{snapshot}: of another run: {', '.join(changed)}; {remedy}")
    return averages


def possible_widths(averages: Averages) -> str:
    """The widths that the snapshots can give, in words."""
    from deme.method.posthoc_ema import combination

    thousandths = range(round(1000 * LEAST_WIDTH), round(1000 * LARGEST_WIDTH) + 1)
    errors = {n: combination(averages.profiles, (averages.last_step, n / 1000))[1] for n in thousandths}
    fit = [n for n in thousandths if errors[n] <= LARGEST_ERROR]
    lows, highs = [n for n in fit if n - 1 not in fit], [n for n in fit if n + 1 not in fit]
    return ", ".join(f"{low / 1000:.3f} … {high / 1000:.3f}" for low, high in zip(lows, highs, strict=True))


def _write(averages: Averages, width: float, record: Record, output: Path) -> None:
    from deme.method.posthoc_ema import combination, combine
    from deme.method.task_vectors import check_compatible

    coefficients, error = combination(averages.profiles, (averages.last_step, width))
    if error > LARGEST_ERROR:
        raise UserError(
            f"the snapshots in {averages.training} can give {possible_widths(averages)}; more of them give more"
        )
    used = {averages.folder(*profile): w for profile, w in zip(averages.profiles, coefficients, strict=True) if w}
    watched = Watched(file for folder in used for file in weights_files(folder))
    hashes = {str(folder.relative_to(averages.training)): weights_hash(folder) for folder in used}
    snapshots = {folder: load_tensors(folder) for folder in used}
    first, *others = snapshots
    for folder in others:
        check_compatible(snapshots[first], snapshots[folder], str(folder))
    with atomic_folder(output) as temporary:
        tensors = combine(list(snapshots.values()), list(used.values()))
        write_denoiser(temporary / DENOISER, tensors, read_json(first / "config.json"))
        watched.check()
        Record(AVERAGE, record.made_from, {"snapshots": hashes}).write(temporary)
    print(f"wrote {output}")
