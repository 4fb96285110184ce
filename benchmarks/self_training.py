"""Pretrained + w (self − pretrained) over w, samplers and steps: distance, KID, precision, recall, nearest neighbours.

    python benchmarks/self_training.py name=s{seed} seed={seed} --config configs/digits.yaml --seeds 0 1 2

Takes trained runs (`finetune.py finetune.range=self` with the same configuration and overrides, in which {seed} stands
for each of --seeds) and keeps each run's rows in its folder, self-training-benchmark.json, from which it resumes.
Images of one sampler have the same seeds for every w. --quick makes it small, to see that it runs.

Nearest neighbours are those in feature space, as medians relative to the median distance of a real image to its nearest
other real image: the nearest real image (far below 1: copies of the data) and the nearest other sample of as many
samples as there are real images (below 1: less diverse than the data).
"""

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import save
from deme.config.experiment import Config
from deme.config.reading import load_config
from deme.data.opening import open_source
from deme.job.files import read_json
from deme.job.processes import make_accelerator
from deme.measure.scores import paired_difference, score
from deme.models.variants import find_pretrained
from deme.report.tables import markdown_table
from deme.search.problem import Problem

COEFFICIENTS = (0.0, -0.5, -1.0, -1.5, -2.0, -3.0)
SAMPLERS = ("ddim", "dpmsolver++")
STEPS = (10, 20, 50, 100)
BLOCKS = 6
FRESH_SEED = 600_000_000


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1_800, help="per cell")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.quick:
        arguments.images, arguments.steps = 12 * BLOCKS, [2]
    runs = []
    for seed in arguments.seeds:
        overrides = [override.replace("{seed}", str(seed)) for override in arguments.overrides]
        config = load_config(arguments.config, [*overrides, "merge.experts=[self]", "merge.coefficients=null"])
        runs.append(sweep(config, arguments))
    save(
        f"self-training-{Path(arguments.config).stem}", "cpu", [row for rows in runs for row in rows], tables(runs), {}
    )


def sweep(config: Config, arguments: Namespace) -> list[dict]:
    """The rows of one run: a sampler, a number of steps and a coefficient each."""
    folder, processes = config.paths.run_folder, make_accelerator("no", "search")
    file = folder / f"self-training-benchmark{'-quick' * arguments.quick}.json"
    known = read_json(file) if file.exists() else {}
    source = open_source(config.data)
    problem = Problem(config, processes, find_pretrained(config.paths), source, {})
    plain = problem.plain_distance
    seeds = range(FRESH_SEED, FRESH_SEED + arguments.images // BLOCKS * BLOCKS)
    rows = []
    for steps in arguments.steps:
        for sampler in arguments.samplers:
            settings = replace(plain.drawing.settings, scheduler=sampler, num_inference_steps=steps)
            distance = plain.by(settings)
            for coefficient in COEFFICIENTS:
                key = f"{sampler}, {steps} steps, {coefficient:g}, {len(seeds)} images"
                if key not in known:
                    features = distance.features(problem.merged(np.full(problem.shape, coefficient)), seeds)
                    row = score(folder, None, features, plain.space, BLOCKS)
                    known[key] = {name: getattr(row, name) for name in ("blocks", "kid", "precision", "recall")}
                    known[key] |= {"distance": row.pooled, **neighbors(features, plain.space.reference.features)}
                    file.write_text(json.dumps(known, indent=1), encoding="utf-8")
                cell = {"run": config.name, "sampler": sampler, "steps": steps, "coefficient": coefficient}
                rows.append(cell | known[key])
                print(key, f"{known[key]['distance']:.4f}", flush=True)
    return rows


def neighbors(features: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Medians of the distances to the nearest real image and to the nearest other sample, relative to real images'."""
    samples, reals = torch.from_numpy(features[: len(real)]), torch.from_numpy(real)
    own = torch.cdist(reals, reals).fill_diagonal_(torch.inf).amin(1).median()
    among = torch.cdist(samples, samples).fill_diagonal_(torch.inf).amin(1).median()
    nearest = torch.cdist(samples, reals).amin(1).median()
    return {"nearest_real": float(nearest / own), "nearest_sample": float(among / own)}


def tables(runs: list[list[dict]]) -> str:
    """A table per sampler: means over the runs; the difference has the standard error of blocks and trainings."""
    titles = ["steps", "w", "classifier FD", "difference to w = 0 ± s.e.", "KID × 10³", "precision", "recall"]
    titles += ["nearest real", "nearest sample"]
    parts = []
    for sampler in dict.fromkeys(row["sampler"] for row in runs[0]):
        lines = []
        for place, first in enumerate(runs[0]):
            if first["sampler"] != sampler:
                continue
            cells = [run[place] for run in runs]
            bases = [run[place - COEFFICIENTS.index(first["coefficient"])] for run in runs]
            mean = {key: np.mean([cell[key] for cell in cells]) for key in first if isinstance(first[key], float)}
            difference = "-"
            if first["coefficient"]:
                pairs = [paired_difference(a["blocks"], b["blocks"]) for a, b in zip(cells, bases, strict=True)]
                variance = np.mean([pair.standard_error**2 for pair in pairs])
                if len(runs) > 1:
                    variance += np.var([pair.mean for pair in pairs], ddof=1) / len(runs)
                difference = f"{np.mean([pair.mean for pair in pairs]):+.3f} ± {variance**0.5:.3f}"
            line = [str(first["steps"]), f"{first['coefficient']:g}", f"{mean['distance']:.3f}", difference]
            line += [f"{1000 * mean['kid']:.1f}", f"{mean['precision']:.3f}", f"{mean['recall']:.3f}"]
            lines.append([*line, f"{mean['nearest_real']:.2f}", f"{mean['nearest_sample']:.2f}"])
        parts.append(f"{sampler}, {len(runs)} training(s):\n\n{markdown_table(titles, lines)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
