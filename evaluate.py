"""Score folders of samples against the configured data: Fréchet distance, KID, precision and recall.

    accelerate launch evaluate.py
    accelerate launch evaluate.py "evaluate.samples=[runs/digits/samples/merged]" evaluate.features=inception
    accelerate launch evaluate.py "evaluate.samples=[]"      # only the reference statistics

evaluate.features=inception gives FID, as `python -m pytorch_fid SAMPLES STATISTICS` does; classifier gives the
classifier FD, in the features of a small network trained on the data's labels. The reference statistics, in
pytorch_fid's npz format, and the classifier are made once and kept in runs/<name>/stats/. Folders of text-to-image
samples, which hold prompts.jsonl, also get a CLIP score. Prints a table, writes results.json.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.sections import LEAST_CLASSIFIED
from deme.errors import UserError, naming
from deme.job.command import run_script
from deme.job.files import Watched, read_json
from deme.job.records import SAMPLES, provenance
from deme.models.variants import ORDER

if TYPE_CHECKING:
    from deme.measure.scores import Score


def sample_folders(config: Config) -> list[Path]:
    """The folders to score, in the order of the table's rows."""
    if config.evaluate.samples is not None:
        return [Path(folder) for folder in config.evaluate.samples]
    folders = [folder for folder in config.paths.all_samples.glob("[!.]*") if folder.is_dir()]
    return sorted(folders, key=lambda f: (ORDER.index(f.name) if f.name in ORDER else len(ORDER), f.name))


def check_replaceable(output: Path) -> None:
    """Make sure that nothing but results of this script is replaced."""
    if output.is_dir():
        raise UserError("is a folder; results are a JSON file")
    if os.path.lexists(output):
        if not output.is_file():
            raise UserError("is not a file")
        content = read_json(output)
        if not {"features", "rows"} <= content.keys():
            raise UserError("is not a file of this script, so it is not replaced")


def reference_files(config: Config) -> list[Path]:
    """The file evaluate.reference, or the images in that folder; none where the data is the reference."""
    from deme.data.samples import list_images

    given = config.evaluate.reference
    if given is None:
        return []
    with naming("evaluate.reference", given):
        if not config.paths.reference.exists():
            raise UserError("no such file or folder")
        return list_images(config.paths.reference) if config.paths.reference.is_dir() else [config.paths.reference]


def with_differences(
    scores: list["Score"], files: dict[Path, list[Path]], prompts: dict[Path, list[str] | None]
) -> list["Score"]:
    """The scores, each with its differences to those of pretrained, continued and ensemble, of the same seeds.

    That of the CLIP score is had to `pretrained` alone, where the prompts agree, too.
    """
    from deme.measure.scores import compared, paired, paired_clip

    baseline = next((row for row in scores if Path(row.samples).name == "pretrained"), None)
    seeds = {row.samples: [path.name for path in files[Path(row.samples)]] for row in scores}
    rows = []
    for row in scores:
        same_seeds = [other for other in scores if seeds[other.samples] == seeds[row.samples]]
        found = compared(row, same_seeds)
        if baseline is not row and baseline in same_seeds:
            found = paired(found, baseline)
            folder, other = Path(row.samples), Path(baseline.samples)
            if prompts[folder] is not None and prompts[folder] == prompts[other]:
                found = paired_clip(found, baseline)
        rows.append(found)
    return rows


def plan(config: Config) -> str:
    """What this command would do."""
    nothing = "no sample folders yet" if config.evaluate.samples is None else "nothing: make the statistics alone"
    folders = "\n  ".join(map(str, sample_folders(config))) or nothing
    return f"score in {config.evaluate.features} features -> {config.paths.results}\n  {folders}"


def main(config: Config) -> None:
    """Score all folders."""
    from deme.data.prompts import PROMPTS, read_prompts
    from deme.data.samples import check_sizes, drawn_from, list_images, read_images

    settings = config.evaluate
    output = config.paths.results

    # --- what is scored
    config.check_classified()
    with naming("evaluate.output", output):
        check_replaceable(output)
    given = reference_files(config)
    folders = sample_folders(config)
    if not folders and settings.samples is None:
        raise UserError(f"evaluate.samples=null: no sample folders in {config.paths.all_samples}")
    files: dict[Path, list[Path]] = {}
    sizes: dict[Path, tuple[int, int]] = {}  # width and height of the images
    for folder in folders:
        with naming("evaluate.samples", folder):
            files[folder] = list_images(folder)
        block, rest = divmod(len(files[folder]), settings.blocks)
        if rest or block < 2:
            least = f"which is not {settings.blocks} equal block(s) of at least 2"
            raise UserError(f"evaluate.blocks={settings.blocks}: {folder} holds {len(files[folder])} image(s), {least}")
        size = sizes[folder] = check_sizes(files[folder])
        if settings.features == "classifier" and min(size) < LEAST_CLASSIFIED:
            rule = f"evaluate.features=classifier needs at least {LEAST_CLASSIFIED} pixels"
            raise UserError(f"evaluate.samples={folder}: images of {size[0]} x {size[1]} pixels, {rule}")
    beside_images = [folder / name for folder in files for name in (SAMPLES.file, PROMPTS)]
    watched = Watched([*given, *beside_images, *(path for paths in files.values() for path in paths)])
    prompts: dict[Path, list[str] | None] = dict.fromkeys(files)
    if settings.clip_model is not None:
        for folder, paths in files.items():
            with naming("evaluate.samples", folder):
                prompts[folder] = read_prompts(folder, paths)

    # --- torch is imported after what can be answered without it
    from deme.data.decoding import available_threads
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.measure.feature_space import load_feature_space
    from deme.measure.features import extract
    from deme.measure.scores import save_scores, score, with_clip
    from deme.report.tables import difference_table, score_table

    accelerator = make_accelerator("no", "evaluate")
    with locked_by_all(accelerator, output, "output_dir" if settings.output is None else "evaluate.output"):
        # --- the CLIP model, where there are prompts: transformers is imported for it alone
        clip = None
        if any(of_folder is not None for of_folder in prompts.values()):
            with accelerator.main_process_first(), naming("evaluate.clip_model", settings.clip_model):
                from deme.measure.clip import load_clip

                clip = load_clip(settings.clip_model).to(accelerator.device)  # one process downloads the weights

        # --- the feature network and the data's statistics
        space = load_feature_space(config, accelerator)
        reference = space.reference
        beside = {} if space.accuracy is None else {"held_out_accuracy": space.accuracy}
        for folder in folders:
            with naming("evaluate.samples", folder):
                reference.check_size(*sizes[folder])
        if not folders:
            return

        # --- scores of all images together and of each block, in seed order
        scores = []
        for folder, paths in files.items():
            share = (len(paths), settings.batch_size, available_threads())
            with naming("evaluate.samples", folder):
                features = extract(accelerator, space.network, lambda part, of=paths: read_images(of[part]), *share)
            fit = None  # of each image to its prompt
            if prompts[folder] is not None:
                read = partial(clip.read, paths, prompts[folder])
                with naming("evaluate.clip_model", settings.clip_model):
                    fit = extract(accelerator, clip, read, *share)[:, 0]
            if accelerator.is_main_process:
                found = score(folder, drawn_from(folder), features, reference, settings.features, settings.blocks)
                scores.append(found if fit is None else with_clip(found, fit))

        # --- differences to the pretrained model, where the seeds agree; table and results.json
        def finish() -> None:
            watched.check()
            rows = with_differences(scores, files, prompts)
            made_with = provenance(config)
            save_scores(output, settings.features, rows, beside | made_with)
            tables = [table(rows, settings.features) for table in (score_table, difference_table)]
            print("\n\n".join(map(str, filter(None, tables))), f"on {made_with['processor']}", output, sep="\n")

        in_main_process(accelerator, finish)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
