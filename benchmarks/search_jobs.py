"""How a whole search fills the cores: one process with all of them, a process per core, or a job per core.

    python benchmarks/search_jobs.py --config configs/digits.yaml
    python benchmarks/search_jobs.py --quick

Takes the experts of a run that is trained (finetune.py with the same configuration and overrides). --quick makes the
search small, to see that it runs.
"""

import os
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, ratios, spread
from benchmarks.report import save
from benchmarks.scaling import finish, start
from deme.config.reading import load_config
from deme.report.tables import markdown_table

QUICK = ["search.trials=2", "search.num_images=16", "search.control_images=64", "search.num_inference_steps=2"]
QUICK += ["search.finalists=1", "search.finalist_images=32", "search.report_images=0"]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    cores, on_gpu = len(os.sched_getaffinity(0)), arguments.device == "cuda"
    forms = {  # (jobs, processes of each, threads of each)
        f"1 process of {cores} threads": (1, 1, cores),
        f"{cores} processes of 1 thread, which share each candidate's images": (1, cores, 1),
        f"{cores} jobs of 1 thread, which share the candidates": (cores, 1, 1),
    }
    if on_gpu:
        forms = {"1 job": (1, 1, cores), "2 jobs on this GPU": (2, 1, cores // 2)}
    options = ["--config", arguments.config, *arguments.overrides, *QUICK * arguments.quick]

    def search(jobs: int, processes: int, threads: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            here = [*options, f"search.output={folder}/search"]
            started = [start("search.py", here, processes, threads, on_gpu) for _ in range(jobs)]
            for job in started:
                finish(job)

    contenders = {name: lambda form=form: search(*form) for name, form in forms.items()}
    taken = alternate(contenders, 1 if arguments.quick else 3, arguments.device)
    first = next(iter(taken.values()))
    rows = [{"form": name, "seconds": values, "times": ratios(first, values)} for name, values in taken.items()]
    lines = [[row["form"], spread(row["seconds"]), spread(row["times"])] for row in rows]
    titles = [f"{config.name}, {config.search.trials} candidates", "s", "× the first"]
    save(f"search-jobs-{config.name}", arguments.device, rows, markdown_table(titles, lines))


if __name__ == "__main__":
    main()
