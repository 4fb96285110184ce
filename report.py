"""One page that tells a run's story: what was made of what, how it scores, how the images look, what it cost.

    python report.py
    python report.py --config configs/cifar10_scratch.yaml data.name=FOLDER    # as the other scripts were called

Writes runs/<name>/report.html, one file to send to a colleague, and report.md, the same for GitHub, with its pictures
in plots/. Stages that have not run are named with the command that makes them.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import shlex
import sys
from argparse import ArgumentParser
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.paths import without_schedule
from deme.config.reading import override
from deme.config.section import without_password
from deme.errors import UserError
from deme.job.command import run_script
from deme.job.files import atomic_file, locked, make_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deme.report.run import Run
    from deme.report.tables import Part

SEEDS = 8  # of each strip of samples
LARGEST_PAGE = 10_000_000  # bytes


def plan(config: Config) -> str:
    """What this command would do."""
    return f"tell {config.paths.run_folder} -> {config.paths.report}"


def main(config: Config) -> None:
    """Gather, draw, write."""
    output = config.paths.report
    if not config.paths.run_folder.is_dir():
        raise UserError(f"output_dir: {config.paths.run_folder} is missing; finetune.py makes it")

    from deme.report.run import MERGING, RESULTS, SEARCH, TRAINING, Run, missing_stages
    from deme.report.tables import render

    with locked(output, "output_dir"):
        make_folder(config.paths.plots, "output_dir")
        run = Run(config)
        sections = {
            RESULTS: results(run),
            "Samples at equal seeds": samples(run),
            TRAINING: training(run),
            MERGING: merging(run),
            SEARCH: search(run),
            "Analyses": [picture(run, f"analysis-{name}", name.replace("-", " ")) for name in run.analyses],
            "How it was made": made(run, command_line(sys.argv[1:])),
        }
        for title, reasons in run.unreadable.items():
            sections[title][:0] = [f"Unreadable: {reason}." for reason in reasons]
        sections = {title: parts for title, parts in sections.items() if parts}
        page = {"title": config.name, "sections": sections, "missing": list(missing_stages(run))}
        html, markdown = render("page.html", **page), render("page.md", **page, folder=output.parent)
        for file, text in ((output, html), (output.with_suffix(".md"), markdown)):
            with atomic_file(file) as temporary:
                temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(f"wrote {output}: {len(html) / 1e6:.1f} MB; {len(page['missing'])} stage(s) not there yet")
    for reason in (reason for reasons in run.unreadable.values() for reason in reasons):
        print(f"unreadable: {reason}")
    if len(html) > LARGEST_PAGE:
        print(f"{output}: larger than {LARGEST_PAGE / 1e6:.0f} MB; fewer or smaller pictures in {config.paths.plots}")


def command_line(arguments: list[str]) -> str:
    """The configuration's file and the overrides, as the shell scripts take them; without a password."""
    parser = ArgumentParser()
    parser.add_argument("--config", default="configs/digits.yaml")
    given, overrides = parser.parse_known_args(arguments)
    for place, argument in enumerate(overrides):
        key, equals, value = argument.partition("=")
        if equals and key == "search.storage":
            overrides[place] = override(key, without_password(value))
    return shlex.join([override("base", given.config).removeprefix("base="), *overrides])


def picture(run: "Run", name: str, caption: str, figure: "Figure | None" = None) -> "Part":
    """A picture in plots/, written if a figure is given; or why it is left out."""
    from deme.report.figures import check_own, save_figure
    from deme.report.tables import Picture

    file = run.config.paths.plots / f"{name}.png"
    if figure is not None:
        save_figure(figure, file)
    try:
        check_own(file, run.config.paths.run_folder)
    except UserError as error:
        return f"Left out: {error}."
    return Picture(file, caption)


def results(run: "Run") -> "list[Part]":
    """The scores, what they say, and their picture."""
    from deme.report import figures, steps, tables
    from deme.report.run import verdict

    parts, points = [], []
    for features, scores in run.spaces.items():
        caption = f"{tables.distances(features)[0]} of each model, {scores[0].images:,} images of the same seeds each."
        parts += [verdict(scores, features, run.schedule), tables.score_table(scores, features)]
        parts += [tables.difference_table(scores, features)]
        name = "report-results" + f"-{features}" * (features != run.features)
        parts += [picture(run, name, caption, figures.score_bars(scores, features, "merged"))]
        points += steps.points_of(scores, features)
    if points:
        caption = "Distance against number of sampling steps, on the same seeds."
        parts.append(picture(run, "report-steps", caption, steps.distance_by_steps(points)))
    return [part for part in parts if part]


def samples(run: "Run") -> "list[Part]":
    """Images of the same seeds side by side."""
    from deme.report import figures

    names = figures.common_images(run.samples)
    if not names:
        return []
    strips = figures.Strips(run.config.paths.run_folder)
    caption = "The first seeds: each row starts from the same noise."
    parts = [picture(run, "report-samples", caption, strips.draw(run.samples, names[:SEEDS]))]
    by_name = {without_schedule(folder.name)[0]: folder for folder in run.samples}
    if {"pretrained", "merged"} <= by_name.keys():
        compared = names[: figures.MOST_COMPARED]
        different = strips.most_different(by_name["pretrained"], by_name["merged"], compared, SEEDS)
        if different:
            caption = f"Of {len(compared):,} seeds those where the pretrained and the merged network differ most."
            parts.append(picture(run, "report-differences", caption, strips.draw(run.samples, different)))
    parts += [f"Left out: {reason}." for reason in list(strips.left_out)[:SEEDS]]
    more = len(strips.left_out) - SEEDS
    return parts + ([f"Left out: {more:,} more such images."] if more > 0 else [])


def training(run: "Run") -> "list[Part]":
    """The losses of all ranges on one axis."""
    from deme.report.figures import training_curves

    logs = [log for log in run.logs if log.steps]
    caption = "Training loss as logged; at low timesteps most of the noise can't be told from the image."
    return [picture(run, "report-training", caption, training_curves(logs))] if logs else []


def merging(run: "Run") -> "list[Part]":
    """The coefficients, and which network moved what."""
    from deme.report.figures import MOST_GROUPS, coefficient_map
    from deme.report.tables import Table

    if run.coefficients is None:
        return []
    caption = "Coefficient of each expert's task vector by group of tensors."
    drawn = picture(run, "report-coefficients", caption, coefficient_map(run.coefficients, run.config))
    rows = [[pattern, *(f"{w:.4g}" for w in values)] for pattern, values in run.coefficients.items()]
    table = Table(["tensors", *run.config.merged_names], rows)
    parts = [table, drawn] if len(rows) <= MOST_GROUPS else [drawn]
    if run.moved:
        label = "± norm of coefficient × task vector"
        caption = "How far each network moves each block: the norm of its coefficient × task vector."
        figure = coefficient_map(run.moved, run.config, label=label, form=".3g")
        parts.append(picture(run, "report-moved", caption, figure))
    return parts


def search(run: "Run") -> "list[Part]":
    """How the coefficients were found, and what they are worth on fresh seeds."""
    from deme.report.tables import score_table

    captions = {
        "cost": "Objective of each candidate against the UNet passes spent.",
        "importance": "How much of the objective's variance each coefficient explains.",
        "pairs": "The objective over pairs of coefficients; the best candidate is ringed.",
        "fresh": "The search's result and its rivals on seeds that no candidate was drawn from.",
    }
    best, parts = run.search, []
    if best is None:
        return []
    if None not in (best.objective, best.value, best.value_of_pretrained):
        values = f"{best.value:.4f}, the pretrained network's {best.value_of_pretrained:.4f}"
        passes = "" if best.passes is None else f"; {best.passes:,} UNet passes"
        parts.append(f"Objective {best.objective}: {values}, where it was searched{passes}.")
    files = {run.config.paths.search_picture(name): caption for name, caption in captions.items()}
    parts += [picture(run, file.stem, caption) for file, caption in files.items() if file.is_file()]
    return parts + ([score_table(run.search_scores, run.search_features)] if run.search_scores else [])


def made(run: "Run", options: str) -> "list[Part]":
    """What was made of what, by which commands, at which cost."""
    from deme.report.run import cost_table
    from deme.report.tables import Commands, Table

    config = run.config
    drawn, scale = config.schedules_of(config.sample), config.sample.prediction_scale
    versions = run.provenance.versions or {}
    facts = {
        "pretrained model": config.paths.pretrained,
        "data": f"{config.data.name}, split {config.data.split}, {config.data.resolution} pixels",
        "timestep ranges": ", ".join(config.timesteps.names),
        "finetuning, per range": f"{config.finetune.max_steps:,} steps of {config.finetune.batch_size} images",
        "sampling": "; ".join(f"{one.scheduler}, {one.num_inference_steps} steps" for one in drawn)
        + (f"; predicted noise divided by {scale}" if scale is not None else ""),
        "processor": run.provenance.processor or "not recorded",
        "git commit": run.provenance.git_commit or "not recorded",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or "not recorded",
    }
    again = "This makes it again, from the pretrained pipeline to this page:"
    parts = [Table(["", ""], list(facts.items())), again, Commands([f"python compare.py base={options}"])]
    cost = cost_table(run)
    return [*parts, cost] if cost.rows else parts


if __name__ == "__main__":
    run_script(__doc__, plan, main)
