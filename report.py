"""One page that tells a run's story: what was made of what, how it scores, how the images look, what it cost.

    python report.py
    python report.py --config configs/cifar10_scratch.yaml data.name=FOLDER    # as the other scripts were called

Writes runs/<name>/report.html, one file to send to a colleague, and report.md, the same for GitHub, with its pictures
in plots/. Stages that have not run are named with the command that makes them.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.reading import override
from deme.config.section import without_password
from deme.config.sections import range_name
from deme.errors import UserError
from deme.job.command import run_script
from deme.job.files import atomic_file, make_folder
from deme.job.locks import locked

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from deme.report.story import Picture, Run, Section

SHOWN = 8  # seeds of each strip of samples
LARGEST_PAGE = 10_000_000  # bytes


def plan(config: Config) -> str:
    """What this command would do."""
    return f"tell {config.paths.run} -> {config.paths.report}"


def main(config: Config) -> None:
    """Gather, draw, write."""
    output = config.paths.report
    if not config.paths.run.is_dir():
        raise UserError(f"output_dir: {config.paths.run} is missing; finetune.py makes it")

    from deme.report.page import html_page, markdown_page
    from deme.report.story import Story, missing_stages, read_run
    from deme.report.tables import public

    with locked(output, "output_dir"):
        make_folder(config.paths.plots, "output_dir")
        run = read_run(config, command_line(sys.argv[1:]))
        parts = [results(run), samples(run), training(run), merging(run), search(run), analyses(run), made(run)]
        for section in parts:
            section.parts[:0] = [f"Unreadable: {reason}." for reason in run.unreadable.get(section.title, [])]
        sections = [section for section in parts if section.parts]
        story = Story(config.name, sections, list(missing_stages(run)))
        page = html_page(story)
        for file, text in ((output, page), (output.with_suffix(".md"), markdown_page(story, output.parent))):
            with atomic_file(file) as temporary:
                temporary.write_text(public(text), encoding="utf-8", errors="backslashreplace")
    print(f"wrote {output}: {len(page) / 1e6:.1f} MB; {len(story.missing)} stage(s) not there yet")
    for reason in (reason for reasons in run.unreadable.values() for reason in reasons):
        print(f"unreadable: {reason}")
    if len(page) > LARGEST_PAGE:
        print(f"{output}: larger than {LARGEST_PAGE / 1e6:.0f} MB; fewer or smaller pictures in {config.paths.plots}")


def command_line(arguments: list[str]) -> str:
    """The configuration's file and the overrides, as the shell scripts take them."""
    given = list(arguments)
    file = "configs/digits.yaml"
    for place, argument in enumerate(given):
        if argument == "--config":
            file = given[place + 1]
            del given[place : place + 2]
            break
        if argument.startswith("--config="):
            file = given.pop(place).removeprefix("--config=")
            break
    file = override("base", file).removeprefix("base=")
    for place, argument in enumerate(given):
        key, found, value = argument.partition("=")
        if found and key == "search.storage":
            given[place] = override(key, without_password(value))
    return shlex.join([file, *given])


def picture(run: "Run", name: str, figure: "Figure", caption: str) -> "Picture":
    """Write plots/report-NAME.png."""
    from deme.report.figures import save_figure
    from deme.report.story import Picture

    file = run.config.paths.plots / f"report-{name}.png"
    save_figure(figure, file)
    return Picture(file, caption)


def results(run: "Run") -> "Section":
    """The table, its plot, and what they say."""
    from deme.report import run_plots
    from deme.report.story import RESULTS, Section, Table, score_part, verdict
    from deme.report.tables import NAMES, difference_lines

    section = Section(RESULTS)
    if run.scores:
        distance = NAMES[run.features][0]
        said = verdict(run.scores, run.features)
        section.parts += [said] if said else []
        section.parts.append(score_part(run.scores, run.features))
        titles, rows = difference_lines(run.scores, run.features)
        section.parts += [Table(titles, rows)] if rows else []
        caption = f"{distance} of each model, {run.scores[0].images:,} images of the same seeds each."
        section.parts.append(picture(run, "results", run_plots.results(run.scores, distance), caption))
    return section


def samples(run: "Run") -> "Section":
    """Images of the same seeds side by side."""
    from deme.report import run_plots
    from deme.report.story import Section

    section = Section("Samples at equal seeds")
    names = run_plots.common_images(run.samples)
    strips = run_plots.Strips(run.config.paths.run)
    if names:
        figure = strips.draw(run.samples, names[:SHOWN])
        section.parts.append(picture(run, "samples", figure, "The first seeds: each row starts from the same noise."))
    by_name = {folder.name: folder for folder in run.samples}
    if names and {"pretrained", "merged"} <= by_name.keys():
        looked = names[: run_plots.MOST_COMPARED]
        others = strips.most_different(by_name["pretrained"], by_name["merged"], looked, SHOWN)
        if others:
            caption = f"Of {len(looked):,} seeds those where the pretrained and the merged network differ most."
            section.parts.append(picture(run, "differences", strips.draw(run.samples, others), caption))
    section.parts += [f"Left out: {reason}." for reason in list(strips.left_out)[:SHOWN]]
    more = len(strips.left_out) - SHOWN
    section.parts += [f"Left out: {more:,} more such images."] if more > 0 else []
    return section


def training(run: "Run") -> "Section":
    """The curves of all ranges on one axis."""
    from deme.report import run_plots
    from deme.report.story import TRAINING, Section

    section = Section(TRAINING)
    curves = [(curve.name, curve.steps, curve.losses) for curve in run.curves if curve.steps]
    if curves:
        caption = "Training loss as logged; at low timesteps most of the noise can't be told from the image."
        section.parts.append(picture(run, "training", run_plots.training_curves(curves), caption))
    return section


def merging(run: "Run") -> "Section":
    """The coefficients."""
    import numpy as np

    from deme.report import search_plots
    from deme.report.story import MERGING, Section, coefficient_table

    section = Section(MERGING)
    if run.coefficients is not None:
        if len(run.coefficients) <= search_plots.SHOWN_CELLS:
            section.parts.append(coefficient_table(run))
        ranges = list(map(range_name, run.config.timesteps.ranges))
        values = np.array(list(run.coefficients.values()))
        figure = search_plots.coefficient_map(values, list(run.coefficients), ranges)
        caption = "Coefficient of each expert's task vector, per group of tensors."
        section.parts.append(picture(run, "coefficients", figure, caption))
    return section


def search(run: "Run") -> "Section":
    """How the coefficients were found, and what they are worth on fresh seeds."""
    from deme.report.story import SEARCH, Section, score_part

    captions = {
        "cost": "Objective of each candidate against the UNet passes spent.",
        "importance": "How much of the objective's variance each coefficient explains.",
        "pairs": "The objective over pairs of coefficients; the best candidate is ringed.",
        "fresh": "The search's result and its rivals on seeds that no candidate was drawn from.",
    }
    section = Section(SEARCH)
    found = run.search
    if found is not None and None not in (found.objective, found.value, found.value_of_pretrained):
        said = f"Objective {found.objective}: {found.value:.4f}, the pretrained network's "
        passes = "" if found.passes is None else f"; {found.passes:,} UNet passes"
        section.parts.append(f"{said}{found.value_of_pretrained:.4f}, where it was searched{passes}.")
    if found is not None:
        files = {run.config.paths.search_picture(name): caption for name, caption in captions.items()}
        section.parts += [shown(run, file, caption) for file, caption in files.items() if file.is_file()]
        if run.search_scores:
            section.parts.append(score_part(run.search_scores, run.search_features))
    return section


def analyses(run: "Run") -> "Section":
    """The pictures of analyze.py."""
    from deme.report.story import Section

    pictures = {file: file.stem.removeprefix("analysis-").replace("-", " ") for file in run.analyses}
    return Section("Analyses", [shown(run, file, caption) for file, caption in pictures.items()])


def shown(run: "Run", file: Path, caption: str) -> "Picture | str":
    """A picture that stands in plots/, or why it is left out."""
    from deme.report.figures import check_own
    from deme.report.story import Picture

    try:
        check_own(file, run.config.paths.run)
    except UserError as error:
        return f"Left out: {error}."
    return Picture(file, caption)


def made(run: "Run") -> "Section":
    """What was made of what, by which commands, at which cost."""
    from deme.report.story import Commands, Section, Table, passes_of

    config = run.config
    facts = [
        ["pretrained model", config.paths.pretrained],
        ["data", f"{config.data.name}, split {config.data.split}, {config.data.resolution} pixels"],
        ["timestep ranges", ", ".join(map(range_name, config.timesteps.ranges))],
        ["finetuning, per range", f"{config.finetune.max_steps:,} steps of {config.finetune.batch_size} images"],
        ["sampling", f"{config.sample.scheduler}, {config.sample.num_inference_steps} steps"],
        ["processor", run.provenance.processor or "not recorded"],
        ["git commit", run.provenance.git_commit or "not recorded"],
    ]
    versions = run.provenance.versions or {}
    facts += [["versions", ", ".join(f"{name} {version}" for name, version in versions.items())]] if versions else []
    parts = [Table(["", ""], facts), "This makes it again, from the pretrained pipeline to this page:"]
    parts += [Commands([f"python compare.py base={run.options}"])]
    cost = passes_of(run)
    return Section("How it was made", [*parts, cost] if cost.rows else parts)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
