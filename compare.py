"""Compare models: train what is missing, draw, score, and print one table of all rows.

    python compare.py                                             # configs/comparison/models.yaml on the digits
    python compare.py --config configs/comparison/baselines.yaml "seeds=[0, 1, 2]"
    python compare.py --config configs/comparison/ablations.yaml base=configs/cifar10_16.yaml data.name=FOLDER

A comparison lists runs, as overrides of one base configuration, and their models. `base=FILE`, `seeds=[…]` and
`reference=FILE` (the experiment whose images FID compares with) replace the comparison's own; all other overrides go to
every run. Independent jobs run side by side, one per GPU or per CPU core. Environment variables: NUM_PROCESSES, GPUs or
cores per job; JOBS_PER_GPU, jobs that share a GPU; BLOCKS, jobs that draw from each model. The same command resumes.
Writes runs/<name>/comparison/<comparison>/ with table.md, rows.json and, with sample.schedules, the picture steps.png;
the page runs/<name>/report.html, and logs in runs/<name>/jobs/logs/.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from deme.compare.comparison import LAST, ComparedRun, Stages, load_comparison
from deme.compare.jobs import MADE, Job, Jobs, Ledger, places
from deme.config.paths import Paths
from deme.errors import RunError, UserError
from deme.job.command import ended_in_one_line
from deme.job.files import locked, make_folder, write_text
from deme.job.repository import REPOSITORY


def number_given(name: str) -> int:
    """The whole number in an environment variable; default: 1."""
    given = os.environ.get(name) or "1"
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"{name}={given}: must be a whole number above 0")
    return int(given)


def check_merge_settings(runs: list[ComparedRun]) -> None:
    """Check merge.settings before the first job: a typo would show only when the trainings are over."""
    from deme.method.task_vectors import merge_method

    for run in runs:
        merge_method(run.config.merge.method, run.config.merge.settings)


def main(file: str, runs: list[ComparedRun], jobs: list[Job], processes: int, table_alone: bool) -> None:
    """Run the jobs, then make the table of the runs that have scores."""
    # --- where jobs can run
    base = runs[0]
    paths = base.config.paths
    ledger, logs = Ledger(paths.jobs / "done"), paths.jobs / "logs"
    where = places(processes, number_given("JOBS_PER_GPU"))
    if not where:
        raise UserError(f"NUM_PROCESSES={processes}: more than there are GPUs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # whose python the launcher starts
    where = [place | {"PATH": path} for place in where]
    with locked(paths.jobs, "output_dir"):
        if table_alone:
            done = ledger.done(jobs)
            for job in jobs:
                if job.stage not in LAST:
                    job.state = "unchanged" if job in done else "dropped"

        # --- run
        print(f"{len(jobs)} jobs, {len(where)} at a time; logs in {logs}", flush=True)
        Jobs(jobs, ledger, logs, where, processes).run()

        # --- the table
        evaluations = {job.run: job for job in jobs if job.stage == "evaluate"}
        scored = [run for run in runs if evaluations[run.config.name].state in MADE]
        if base in scored:
            write_table(scored, paths.comparison(file))
            print(f"page: {paths.report}\npictures:", *pictures(paths), sep="\n")

    # --- what failed
    failed = [f"{job.name}: {job.error}" for job in jobs if job.state == "failed"]
    dropped = [job.name for job in jobs if job.state == "dropped"]
    if failed or dropped:
        unmade = [f"not made: {', '.join(dropped)}"] if dropped else []
        raise RunError("; ".join([*failed, *unmade]))


def write_table(runs: list[ComparedRun], output: Path) -> None:
    """Print the base's scores and the table of the runs, the base first, per judge; write the tables to a folder."""
    from deme.compare.table import compared_rows, comparison_table, points_of_rows
    from deme.measure.scores import load_spaces
    from deme.report.figures import save_figure
    from deme.report.steps import distance_by_steps
    from deme.report.tables import score_table

    results = runs[0].config.paths.results
    spaces = load_spaces(results)
    print("", *(score_table(scores, features) for features, scores in spaces.items()), results, sep="\n")
    by_space = {features: compared_rows(runs, features) for features in spaces}
    table = "\n\n".join(comparison_table(rows, features) for features, rows in by_space.items())
    make_folder(output, "output_dir")
    for place, (features, rows) in enumerate(by_space.items()):
        file = output / f"rows{f'-{features}' * (place > 0)}.json"
        write_text(file, json.dumps([asdict(row) for row in rows], indent=1))
    write_text(output / "table.md", table + "\n")
    print(f"\n{table}\n{output / 'table.md'}")
    drawn = {features: rows for features, rows in by_space.items() if rows and rows[0].schedule}
    if drawn:
        points = [point for features, rows in drawn.items() for point in points_of_rows(rows, features)]
        save_figure(distance_by_steps(points), output / "steps.png")
        print(output / "steps.png")


def pictures(paths: Paths) -> list[Path]:
    """Grids of samples, and previews of the trainings."""
    patterns = ("samples/**/grid-*.png", "finetuned/**/previews/*.png")
    return sorted(picture for pattern in patterns for picture in paths.run_folder.glob(pattern))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs/comparison/models.yaml"), metavar="FILE")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs, do nothing")
    parser.add_argument("--table", action="store_true", help="make only the table, from what is complete")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    with ended_in_one_line(parser.prog) as run_folder:
        arguments = parser.parse_intermixed_args()
        comparison, runs = load_comparison(arguments.config, arguments.overrides)
        run_folder.append(runs[0].config.paths.run_folder)
        processes = number_given("NUM_PROCESSES")
        jobs = Stages(comparison, runs, number_given("BLOCKS")).jobs
        check_merge_settings(runs)
        if arguments.dry_run:
            print("\n".join(job.name for job in jobs))
        else:
            main(arguments.config, runs, jobs, processes, arguments.table)
