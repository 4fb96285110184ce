"""Score folders of samples against the configured data: Fréchet distance, KID, precision and recall.

    accelerate launch evaluate.py
    accelerate launch evaluate.py "evaluate.samples=[runs/digits/samples/merged]" evaluate.features=inception
    accelerate launch evaluate.py "evaluate.samples=[]"      # only the reference statistics

evaluate.features=inception gives FID, as `python -m pytorch_fid SAMPLES STATISTICS` does; classifier gives the
classifier FD, in the features of a small network trained on the data's labels. The reference statistics, in
pytorch_fid's npz format, and the classifier are made once and kept in runs/<name>/stats/. Prints a table, writes
results.json.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.errors import UserError, naming
from deme.job.command import run_script
from deme.job.files import Watched, make_folder, read_json
from deme.job.records import SAMPLES, provenance
from deme.models.variants import ORDER

if TYPE_CHECKING:
    import torch

LEAST_CLASSIFIED = 8  # pixels: the classifier halves an image three times


def sample_folders(config: Config) -> list[Path]:
    """The folders to score, in the order of the table's rows."""
    if config.evaluate.samples is not None:
        return [Path(folder) for folder in config.evaluate.samples]
    folders = [folder for folder in config.paths.all_samples.glob("[!.]*") if folder.is_dir()]
    return sorted(folders, key=lambda f: (ORDER.index(f.name) if f.name in ORDER else len(ORDER), f.name))


def check_replaceable(output: Path) -> None:
    """Make sure that nothing but results of this script is replaced.

    Raises:
        UserError: something else stands there.
    """
    if output.is_dir():
        raise UserError("is a folder; results are a JSON file")
    if os.path.lexists(output):
        if not output.is_file():
            raise UserError("is not a file")
        content = read_json(output)
        if not {"features", "rows"} <= content.keys():
            raise UserError("is not a file of this script, so it is not replaced")


def read_part(paths: list[Path], part: slice) -> "torch.Tensor":
    """The images of a part of the files: uint8 RGB (B, 3, H, W)."""
    from deme.data.samples import read_images

    return read_images(paths[part])


def plan(config: Config) -> str:
    """What this command would do."""
    nothing = "no sample folders yet" if config.evaluate.samples is None else "nothing: make the statistics alone"
    folders = "\n  ".join(map(str, sample_folders(config))) or nothing
    return f"score in {config.evaluate.features} features -> {config.paths.results}\n  {folders}"


def main(config: Config) -> None:
    """Score all folders."""
    from deme.data.samples import check_sizes, drawn_from, list_images

    settings = config.evaluate
    output = config.paths.results

    # --- what is scored
    seen = settings.features != "classifier" or config.data.resolution >= LEAST_CLASSIFIED
    least_pixels = f"evaluate.features=classifier needs at least {LEAST_CLASSIFIED} pixels"
    config.data.check("resolution", seen, least_pixels)
    with naming("evaluate.output", output):
        check_replaceable(output)
    if settings.reference is not None and not config.paths.reference.is_file():
        raise UserError(f"evaluate.reference={settings.reference}: no such file")
    folders = sample_folders(config)
    if not folders and settings.samples is None:
        raise UserError(f"evaluate.samples=null: no sample folders in {config.paths.all_samples}")
    files: dict[Path, list[Path]] = {}
    for folder in folders:
        with naming("evaluate.samples", folder):
            files[folder] = list_images(folder)
        block, rest = divmod(len(files[folder]), settings.blocks)
        if rest or block < 2:
            least = f"which is not {settings.blocks} equal block(s) of at least 2"
            raise UserError(f"evaluate.blocks={settings.blocks}: {folder} holds {len(files[folder])} image(s), {least}")
        size = check_sizes(files[folder])
        if settings.features == "classifier" and min(size) < LEAST_CLASSIFIED:
            raise UserError(f"evaluate.samples={folder}: images of {size[0]} x {size[1]} pixels, {least_pixels}")
    watched = Watched(path for folder, paths in files.items() for path in (folder / SAMPLES.file, *paths))

    # --- torch is imported after what can be answered without it
    from deme.data.ahead import available_threads
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.measure.classifier import trained_classifier
    from deme.measure.features import extract, load_inception
    from deme.measure.reference import reference_statistics
    from deme.measure.scores import paired, save_scores, score
    from deme.report.tables import score_table

    accelerator = make_accelerator("no", "evaluate")
    with locked_by_all(accelerator, output, "output_dir" if settings.output is None else "evaluate.output"):
        # --- the feature network and the data's statistics
        beside = {}
        made_by = {}
        with locked_by_all(accelerator, config.paths.stats, "output_dir"):
            make_folder(config.paths.stats, "output_dir")
            if settings.features == "inception":
                with accelerator.main_process_first(), naming("evaluate.features", settings.features):
                    network = load_inception().to(accelerator.device)  # one process downloads the weights
            else:
                network, accuracy, made_by = trained_classifier(config, accelerator)
                accelerator.print(f"classifier: held-out accuracy {accuracy:.1%}")
                beside["held_out_accuracy"] = accuracy
            reference = reference_statistics(config, accelerator, network, made_by)
        if not folders:
            return

        # --- scores of all images together and of each block, in seed order
        scores = []
        for folder, paths in files.items():
            read = partial(read_part, paths)
            with naming("evaluate.samples", folder):
                features = extract(accelerator, network, read, len(paths), settings.batch_size, available_threads())
            if features.shape[1] != len(reference.mu):
                size = f"{len(reference.mu)} features, {settings.features} has {features.shape[1]}"
                raise UserError(f"evaluate.reference={settings.reference}: holds statistics of {size}")
            if accelerator.is_main_process:
                scores.append(
                    score(folder, drawn_from(folder), features, reference, settings.features, settings.blocks)
                )

        # --- differences to the pretrained model, where the seeds agree; table and results.json
        def finish() -> None:
            watched.check()
            names = {str(folder): [path.name for path in paths] for folder, paths in files.items()}
            baseline = next((row for row in scores if Path(row.samples).name == "pretrained"), None)
            rows = [
                paired(row, baseline)
                if baseline not in (None, row) and names[row.samples] == names[baseline.samples]
                else row
                for row in scores
            ]
            made_with = provenance(config)
            save_scores(output, settings.features, rows, beside | made_with)
            print(score_table(rows, settings.features), f"on {made_with['processor']}", output, sep="\n")

        in_main_process(accelerator, finish)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
