"""Score folders of samples against the configured data: Fréchet distance, KID, precision and recall.

    accelerate launch evaluate.py
    accelerate launch evaluate.py "evaluate.samples=[runs/digits/samples/merged]" evaluate.features=inception
    accelerate launch evaluate.py "evaluate.samples=[]"      # only the reference statistics
    accelerate launch evaluate.py "evaluate.features=[classifier,torchvision:resnet18=FILE.safetensors]"   # two judges

evaluate.features=inception gives FID, as `python -m pytorch_fid SAMPLES STATISTICS` does; classifier gives the
classifier FD, in the features of a small network trained on the data's labels. The reference statistics, in
pytorch_fid's npz format, and the classifier are made once and kept in runs/<name>/stats/. Folders of text-to-image
samples, which hold prompts.jsonl, also get a CLIP score. Prints a table, writes results.json.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.sections import Evaluate
from deme.errors import UserError, naming
from deme.job.command import run_script
from deme.job.files import Watched, read_json
from deme.job.records import SAMPLES, provenance, read_record
from deme.models.variants import table_order

if TYPE_CHECKING:
    from accelerate import Accelerator

    from deme.measure.features import ClipScores
    from deme.measure.scores import FeatureSpace, Score


@dataclass(frozen=True)
class Samples:
    """A folder to score."""

    folder: Path
    files: list[Path]  # its images, in seed order
    seeds: list[str]  # the files' names, equal in folders of the same seeds
    size: tuple[int, int]  # width and height of the images
    prompts: list[str] | None  # of the images; None: no CLIP score


def sample_folders(config: Config) -> list[Path]:
    """The folders to score, in the order of the table's rows."""
    if config.evaluate.samples is not None:
        return [Path(folder) for folder in config.evaluate.samples]
    folders = [folder for folder in config.paths.all_samples.glob("[!.]*") if folder.is_dir()]
    return sorted(folders, key=lambda folder: table_order(folder.name))


def check_replaceable(output: Path) -> None:
    """Make sure that nothing but results of this script is replaced."""
    if os.path.lexists(output) and not output.is_file():
        raise UserError("is not a file")
    if output.exists() and not {"features", "rows"} <= read_json(output).keys():
        raise UserError("is not a file of this script, so it is not replaced")


def reference_files(config: Config) -> list[Path]:
    """The files of evaluate.reference, one a judge, or its images; none where the data is the reference."""
    from deme.data.samples import list_images

    given = config.evaluate.reference
    if given is None:
        return []
    files = [config.paths.reference_in(judge.name) for judge in config.evaluate.judges]
    with naming("evaluate.reference", given):
        if not files[0].exists():
            raise UserError("no such file or folder")
        for file in files[1:]:
            if not file.exists():
                raise UserError(f"of these statistics in the other features of evaluate.features, there is no {file}")
        return list_images(files[0]) if files[0].is_dir() else files


def open_samples(folder: Path, settings: Evaluate) -> Samples:
    """Check that a folder can be scored."""
    from deme.data.samples import check_sizes, list_images, read_prompts
    from deme.measure.features import check_classified

    with naming("evaluate.samples", folder):
        files = list_images(folder)
    if len(files) % settings.blocks or len(files) < 2 * settings.blocks:
        least = f"which is not {settings.blocks} equal block(s) of at least 2"
        raise UserError(f"evaluate.blocks={settings.blocks}: {folder} holds {len(files)} image(s), {least}")
    size = check_sizes(files)
    with naming("evaluate.samples", folder):
        for judge in settings.judges:
            check_classified(judge.name, *size)
        prompts = read_prompts(folder, files) if settings.clip_model is not None else None
    return Samples(folder, files, [file.name for file in files], size, prompts)


def score_samples(
    samples: Samples, config: Config, accelerator: "Accelerator", space: "FeatureSpace", clip: "ClipScores | None"
) -> "Score | None":
    """The scores of all images together and of each block, in seed order; None in all but the main process."""
    from deme.data.decoding import available_threads
    from deme.data.samples import drawn_by, read_images
    from deme.measure.features import extract
    from deme.measure.scores import score

    settings, files = config.evaluate, samples.files
    share, scores = (range(len(files)), settings.batch_size, available_threads()), None
    with naming("evaluate.samples", samples.folder):
        features = extract(accelerator, space.network, lambda part: read_images(files[part]), *share)
    if clip is not None and samples.prompts is not None:
        with naming("evaluate.clip_model", settings.clip_model):
            scores = extract(accelerator, clip, partial(clip.read, files, samples.prompts), *share)[:, 0]
    if not accelerator.is_main_process:
        return None
    record = read_record(SAMPLES, samples.folder)
    made_from = {} if record is None else record.made_from
    row = score(samples.folder, made_from.get("weights"), features, space, settings.blocks, scores)
    return replace(row, drawn_by=drawn_by(samples.folder, made_from))


def with_differences(rows: list["Score"], samples: list[Samples]) -> list["Score"]:
    """The scores with their differences to baselines of the same seeds, and for the CLIP score of the same prompts."""
    from deme.measure.scores import compared

    differing = []
    for row, own in zip(rows, samples, strict=True):
        same_seeds = [(other, its) for other, its in zip(rows, samples, strict=True) if its.seeds == own.seeds]
        prompted = [other for other, its in same_seeds if row.clip is not None and its.prompts == own.prompts]
        differing.append(compared(row, [other for other, _ in same_seeds], prompted))
    return differing


def plan(config: Config) -> str:
    """What this command would do."""
    nothing = "no sample folders yet" if config.evaluate.samples is None else "nothing: make the statistics alone"
    folders = "\n  ".join(map(str, sample_folders(config))) or nothing
    judges = ", ".join(judge.name for judge in config.evaluate.judges)
    return f"score in {judges} features -> {config.paths.results}\n  {folders}"


def main(config: Config) -> None:
    """Score all folders."""
    from deme.data.samples import PROMPTS

    # --- what is scored
    output = config.paths.results
    config.check_classified(config.evaluate.judges)
    with naming("evaluate.output", output):
        check_replaceable(output)
    given = reference_files(config)
    samples = [open_samples(folder, config.evaluate) for folder in sample_folders(config)]
    if not samples and config.evaluate.samples is None:
        raise UserError(f"evaluate.samples=null: no sample folders in {config.paths.all_samples}")
    beside_images = [one.folder / name for one in samples for name in (SAMPLES.file, PROMPTS)]
    weights = [file for judge in config.evaluate.judges for file in judge.files]
    watched = Watched([*given, *weights, *beside_images, *(file for one in samples for file in one.files)])

    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.measure.features import ClipScores
    from deme.measure.reference import load_feature_space
    from deme.measure.scores import save_spaces
    from deme.report.tables import difference_table, score_table

    accelerator = make_accelerator("no", "evaluate")
    key = "output_dir" if config.evaluate.output is None else "evaluate.output"
    with locked_by_all(accelerator, output, key):
        # --- the feature networks, the reference statistics, and the CLIP model if there are prompts
        clip = None
        if any(one.prompts is not None for one in samples):
            with accelerator.main_process_first(), naming("evaluate.clip_model", config.evaluate.clip_model):
                clip = ClipScores(config.evaluate.clip_model).to(accelerator.device)  # one process downloads it
        spaces = [load_feature_space(config, accelerator, judge) for judge in config.evaluate.judges]
        for one in samples:
            with naming("evaluate.samples", one.folder):
                for space in spaces:
                    space.reference.check_size(*one.size)
        if not samples:
            return

        # --- scores, and differences where the seeds agree; tables and results.json
        scores = {}
        for space in spaces:  # the CLIP score stands beside the first judge's
            scores[space.name] = [score_samples(one, config, accelerator, space, clip) for one in samples]
            clip = None

        def finish() -> None:
            watched.check()
            rows = {name: with_differences(own, samples) for name, own in scores.items()}
            made_with = provenance(config)
            accuracies = [("held_out_accuracy", space.accuracy) for space in spaces if space.accuracy is not None]
            save_spaces(output, rows, dict(accuracies) | made_with)
            tables = (table(own, name) for name, own in rows.items() for table in (score_table, difference_table))
            print(*filter(None, tables), sep="\n\n")
            print(f"on {made_with['processor']}", output, sep="\n")

        in_main_process(accelerator, finish)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
