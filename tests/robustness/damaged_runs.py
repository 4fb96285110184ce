"""What fuzz.py tries of a run's own files: those that report.py tells of, and a search's storage."""

import io
import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from robustness.mutations import as_json, changed, damaged

from deme.config.experiment import Config

Readers = Iterator[Callable[[], Any]]


def make_run(folder: Path) -> Config:
    """A small run of two ranges, with all files that report.py reads."""
    from deme.job.records import MERGED, Record
    from deme.measure.scores import Score, compared, save_scores

    config = Config(name="run", output_dir=str(folder))
    paths = config.paths
    for made in (paths.plots, paths.merged, paths.search, paths.finetuning("0000-0250")):
        made.mkdir(parents=True)
    base = Score("a/pretrained", ["b"], 4, 1.0, [1.0, 2.0], 1.5, 0.5, kid=0.1, kid_standard_error=0.01)
    rows = [base, compared(replace(base, samples="a/merged", blocks=[0.5, 1.0]), [base])]
    for file in (paths.results, paths.search / "report.json"):
        save_scores(file, "classifier", rows, {"processor": "x", "git_commit": None, "versions": {"torch": "2"}})
    coefficients = {"coefficients": {"up.*": [0.5, 0.25, 0.0, 1.0], "*": [0.25] * 4}}
    Record(MERGED, coefficients | {"method": "x"}, {"processor": "x", "versions": {"torch": "2"}}).write(paths.merged)
    best = coefficients | {"objective": "fd", "value": 0.5, "value of the pretrained network": 1.0, "passes": 10}
    best |= {"pretrained": "ab", "finetuned": ["cd"] * 4}
    paths.best_coefficients.write_text(yaml.safe_dump(best))
    (paths.search / "seconds.txt").write_text("1.5\n2.0\n")
    lines = [{"step": step, "loss": 1 / step, "images_per_second": 5.0} for step in (1, 2, 4)]
    log = paths.finetuning("0000-0250") / "log.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for model in ("pretrained", "merged"):
        (paths.all_samples / model).mkdir(parents=True)
        Image.fromarray(pixels).save(paths.all_samples / model / "000000.png")
    for name in ("analysis-a", "search-cost"):
        Image.fromarray(pixels).save(paths.plots / f"{name}.png")
    return config


def damage(choose: random.Random, file: Path) -> None:
    """Change one value in a file that is JSON or YAML, or some of its bytes."""
    content = file.read_bytes()
    if choose.random() < 0.3 or file.suffix in (".png", ".txt"):
        file.write_bytes(damaged(choose, content))
    elif file.suffix == ".yaml":
        file.write_bytes(yaml.safe_dump(changed(choose, yaml.safe_load(content))).encode(errors="replace"))
    else:
        lines = content.splitlines() if file.suffix == ".jsonl" else [content]
        file.write_bytes(b"\n".join(as_json(choose, changed(choose, json.loads(line))) for line in lines))


def run_files(choose: random.Random, folder: Path) -> Readers:
    """A file that report.py tells of: the page is made all the same."""
    import report
    from deme.report import figures

    config = make_run(folder)
    files = [path for path in sorted(config.paths.run_folder.rglob("*")) if path.is_file()]
    for file in choose.sample(files, choose.randint(1, 2)):
        damage(choose, file)
    figures.DPI = 10
    yield lambda: report.main(config)


def storage(choose: random.Random, folder: Path) -> Readers:
    """A search's study.db: damaged, or another program's."""
    from noisy_images import problem_of

    from deme.search.study import Study, open_storage

    file = folder / "study.db"
    url = f"sqlite:///{file}"

    def search(count: int) -> None:
        study = Study(problem_of(["a", "b"]), open_storage(url), "s", "match", 0, 0, "random", count=count)
        study.run()

    with redirect_stdout(io.StringIO()):
        search(2)
    if choose.random() < 0.4:
        file.write_bytes(damaged(choose, file.read_bytes()))
    else:
        with sqlite3.connect(file) as database:
            names = [row[0] for row in database.execute("select name from sqlite_master where type = 'table'")]
            table = choose.choice(sorted(names))
            columns = [row[1] for row in database.execute(f"pragma table_info({table})")]
            value = choose.choice(["x", "", None, -1, 1.5, 2**62, float("inf"), b"\xff", "[1", "{}"])
            if choose.random() < 0.3:
                database.execute(choose.choice([f"drop table {table}", f"delete from {table}"]))
            elif choose.random() < 0.2:
                database.execute(f"alter table {table} rename column {choose.choice(columns)} to other")
            else:
                with suppress(sqlite3.Error):  # the table's own rules
                    database.execute(f"update {table} set {choose.choice(columns)} = ?", [value])
        database.close()
    yield lambda: search(3)
