"""Find the merging coefficients: candidates are formed in memory, scored, and the best is checked on fresh seeds.

    accelerate launch search.py                                  # by the distance itself, from few images to many
    accelerate launch search.py search.method=closed_form search.output=runs/digits/search-match    # in seconds
    accelerate launch search.py search.method=gradient search.groups=tensor search.output=runs/digits/search-tensor
    accelerate launch search.py search.method=optuna search.objective=fd search.sampler=tpe search.trials=100 \
        search.output=runs/digits/search-tpe
    python merge.py merge.coefficients=search

Writes runs/<name>/search/best.yaml, which merge.coefficients takes, report.json, curves for TensorBoard, and pictures
in runs/<name>/plots/, called as the search's folder. The same command again resumes; started on several machines, they
share the candidates.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deme.config.experiment import Config
from deme.config.trainings import EMA_WIDTH
from deme.errors import naming
from deme.job.command import run_script
from deme.job.files import make_folder, write_yaml
from deme.job.records import IMAGE_COLUMN, SEARCH, Record, digest_of, provenance, read_record
from deme.models.averages import merged_folders
from deme.models.pipelines import denoiser_folder, labels_of, takes_text
from deme.models.trained import tell_other_bases
from deme.models.weights import weights_hash
from deme.models.variants import ModelFiles, find_pretrained, timed
from deme.models.searched import MERGED_BY, OF_PRETRAINED, prediction_scales, read_searched

if TYPE_CHECKING:
    from deme.search.problem import Problem
    from deme.search.ways import Result


def plan(config: Config) -> str:
    """What this command would do."""
    config.check_search()
    settings = config.search
    objective = "fd" if settings.method == "multi_fidelity" else settings.objective
    found = f"search {settings.groups} coefficients of {', '.join(map(str, config.paths.finetuned))}"
    if config.searches_scales:
        found = f"search the scales of the noise that {config.paths.pretrained} predicts"
    return f"{found}\nby {settings.method}, objective {objective} -> {config.paths.best_coefficients}"


def main(config: Config) -> None:
    """Search, write the best, check it on fresh seeds."""
    # --- inputs
    output = config.paths.search
    model = check_inputs(config)
    watched = model.watched()

    # --- torch is imported after what can be answered without it
    from deme.data.opening import data_hashes, open_source
    from deme.job.processes import in_main_process, locked_by_all, make_accelerator
    from deme.report.tables import score_table
    from deme.search.problem import Problem
    from deme.search.ways import find, score_fresh

    # --- what is searched
    source = open_source(config.data)
    made_of = (
        data_hashes(source, config.paths.image_cache, labels_of(model.pipeline) > 0, with_captions=True)
        | model.hashes()
    )
    column = {IMAGE_COLUMN: source.data.image_column}
    pretrained, *finetuned = map(weights_hash, model.denoisers)
    tell_other_bases(model.denoisers[0], pretrained, model.denoisers[1:])
    weights = {"pretrained": pretrained, "finetuned": finetuned}
    made_from = searched(config) | column | model.spacing(config.sample) | model.sampling() | weights | made_of
    accelerator = make_accelerator(config.sample.mixed_precision, "sample.mixed_precision")
    problem = Problem(config, accelerator, model.pipeline, source, made_of)
    watched.check()  # what was hashed was read
    if problem.method is not None:
        made_from[MERGED_BY] = problem.method.describe()
    wanted = Record(SEARCH, made_from | model.architecture(), provenance(config))
    with locked_by_all(accelerator, output / "claim", "search.output", wait=True):
        in_main_process(accelerator, lambda: claim(config, wanted))

    # --- search
    if draws_images(config):
        _ = problem.plain_distance, problem.reported  # weights, labels or samplers that can't be had are told now
    with timed(config.paths.search_seconds) if accelerator.is_main_process else nullcontext():
        result = find(problem, output, digest_of(made_from))
    answer = answer_of(problem, result, finetuned) | {"pretrained": pretrained}
    with locked_by_all(accelerator, output / "best", "search.output", wait=True):
        in_main_process(accelerator, lambda: write_yaml(config.paths.best_coefficients, answer))
        accelerator.print(f"wrote {config.paths.best_coefficients}")

        # --- is it any good?
        beside = {"coefficients": answer["coefficients"]} | provenance(config)
        identity = digest_of({**made_from, **answer, **reported(config)})
        scores, words = score_fresh(problem, result, output / "report.json", identity, beside)
        if accelerator.is_main_process:
            if scores:
                print(score_table(scores, config.evaluate.judges[0].name))
            print(*words, sep="\n")
            from deme.report.figures import save_search_plots  # imports matplotlib and TensorBoard

            make_folder(config.paths.plots, "output_dir")
            print("pictures:", *save_search_plots(config, answer["coefficients"], result, scores), sep="\n")


def answer_of(problem: "Problem", result: "Result", finetuned: list[str]) -> dict[str, Any]:
    """What best.yaml holds, beside the hash of the pretrained network; `finetuned` has those of the others."""
    config = problem.config
    coefficients, width = problem.by_width(result.coefficients)
    answer = {
        "coefficients": dict(zip(problem.patterns, coefficients.tolist(), strict=True)),
        "finetuned": np.array_split(finetuned, 1 + len(config.search.ema_widths))[width].tolist(),
        "objective": result.objective,
        "value": result.value,
        OF_PRETRAINED: result.pretrained,
        "passes": result.evaluated[-1].passes,
    }
    if config.searches_scales:
        answer |= {"over": config.search.over, "timesteps": list(map(list, config.timesteps.ranges))}
    if problem.method is not None:
        answer[MERGED_BY] = problem.method.describe()
    if config.search.schedules:
        answer["schedules"] = [one.schedule for one in config.schedules_of(config.search)]
    if width > 0:
        answer[EMA_WIDTH] = config.search.ema_widths[width - 1]
    if config.search.grow_bounds:
        answer["bounds"] = {name: list(pair) for name, pair in result.bounds.items()}
    return answer


def check_inputs(config: Config) -> ModelFiles:
    """The files of pretrained network and experts, once all that can be checked without torch is in order."""
    config.check_search()
    for file in config.search.start:
        with naming("search.start", file):
            read_searched(Path(file))
    pretrained = find_pretrained(config.paths)
    widths = [] if config.searches_scales else [config.merge.ema_width, *config.search.ema_widths]
    merged = [folder for width in widths for folder in merged_folders(config, pretrained, width)]
    model = ModelFiles(pretrained, [denoiser_folder(pretrained), *merged])
    model.check_fits(config)
    if config.searches_scales:
        model.check_noise_is_predicted(config.search, "over")
    judge = config.evaluate.judges[0]  # the search never sees the others
    config.check_classified([judge])
    if draws_images(config):
        has_prompts = config.sample.prompts is not None or not takes_text(pretrained)
        config.sample.check("prompts", has_prompts, "images are drawn for the search: needs some")
        has_labels = config.data.label_column is not None or judge.name != "classifier"
        config.data.check("label_column", has_labels, "evaluate.features=classifier needs labels")
    return model


def draws_images(config: Config) -> bool:
    """True if images are drawn, to tell candidates apart or for the report."""
    return config.search.by_images or config.search.report_images > 0


def reported(config: Config) -> dict[str, Any]:
    """What the report's scores depend on, beside what is found."""
    images, blocks, steps = config.search.report_images, config.report_blocks, config.sample.num_inference_steps
    return {"images": images, "blocks": blocks, "steps": steps}


def searched(config: Config) -> dict[str, Any]:
    """The settings that determine what is found."""
    from deme.measure.reference import content_hash

    parts = {part.section: part.tagged("search") for part in (config.search, config.sample, config.evaluate)}
    parts |= {part.section: part.tagged("examples") for part in (config.data, config.finetune)}
    if config.search.by_images:
        parts["search"]["num_inference_steps"] = config.search_steps
    else:
        del parts["search"]["num_inference_steps"]
    if config.search.schedules:
        parts["search"]["schedules"] = [one.schedule for one in config.schedules_of(config.search)]
    for section, key in (("sample", "prompts"), ("evaluate", "reference")):  # files or folders: what they hold counts
        given = parts[section][key]
        if isinstance(given, str) and os.path.exists(given):
            with naming(f"{section}.{key}", given):
                parts[section][key] = f"SHA-256 {content_hash(Path(given))}"
    if config.search.start:
        parts["search"]["start"] = [f"SHA-256 {content_hash(Path(file))}" for file in config.search.start]
    if parts["sample"].pop("prediction_scale", None) is not None and not config.searches_scales:
        parts["sample"]["prediction_scale"] = list(map(list, prediction_scales(config)))
    parts["evaluate"]["features"] = config.evaluate.judges[0].name
    values = {f"{section}.{key}": value for section, part in parts.items() for key, value in part.items()}
    return {"seed": config.seed, "timesteps": [list(edges) for edges in config.timesteps.ranges], **values}


def claim(config: Config, wanted: Record) -> None:
    """Create the search's folder, or make sure that what stands there is the same search."""
    output = config.paths.search
    make_folder(output, "search.output")
    found = read_record(SEARCH, output)
    has_begun = any(output.glob("*.npz")) or (output / "study.db").exists()
    if found is None or not has_begun:  # such as after running out of memory
        wanted.write(output)
        config.paths.search_seconds.write_text("")
        return
    with naming("search.output", output):
        found.fits(wanted, output, "set them back, name another folder, or delete this one")
    if found.made_from.keys() != wanted.made_from.keys():  # an older version knew less
        wanted.write(output)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
