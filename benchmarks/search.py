"""Methods to search coefficients: the distance on fresh seeds, and the UNet passes spent.

    python benchmarks/search.py forming                                       # a candidate in place, Church's network
    python benchmarks/search.py ranks --config configs/digits.yaml            # match and loss against the distance
    python benchmarks/search.py ways --config configs/digits.yaml             # all ways, three seeds
    python benchmarks/search.py stopping --config configs/digits.yaml         # candidates that cannot win

All but the first take the experts of a run that is trained (finetune.py with the same configuration and overrides) and
write to its folder search-benchmark/, from which they resume. --quick makes each small, to see that it runs, in
search-benchmark-quick/.
"""

import json
import statistics
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import alternate, ratios, spread
from benchmarks.report import save
from benchmarks.unets import CHURCH, SMALL
from deme.config.experiment import Config
from deme.config.paths import denoiser_in
from deme.config.reading import load_config
from deme.data.opening import open_source
from deme.job.files import read_json, write_text
from deme.job.processes import make_accelerator
from deme.measure.scores import paired_difference
from deme.method.sampling import NetworkAt
from deme.method.task_vectors import PUBLISHED, Candidates
from deme.models.denoisers import freeze, load_denoiser
from deme.models.variants import find_pretrained, write_denoiser
from deme.models.weights import load_tensors
from deme.report.tables import markdown_table, number
from deme.search.problem import Problem
from deme.search.ways import find

SEEDS = 3  # of the search
RANKED = 30  # random candidates
FRESH_BLOCKS = 6
FRESH_SEED = 500_000_000
GRID_VALUES = 4  # of each coefficient, in the whole grid
STOPS = (0.25, 0.5, 0.75)  # of a candidate's images


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["forming", "ranks", "ways", "stopping"])
    parser.add_argument("--config", default="configs/digits.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small, to see that it runs")
    parser.add_argument("--fresh-images", type=int, default=5_400, help="that each answer is scored on")
    parser.add_argument("--other-seeds", type=int, default=SEEDS, help="searches by samplers that are not the default")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.part == "forming":
        forming(arguments)
        return
    config = load_config(arguments.config, arguments.overrides)
    if arguments.quick:
        arguments.fresh_images = 12 * FRESH_BLOCKS
    bench = Bench(config, arguments)
    {"ranks": bench.ranks, "ways": bench.ways, "stopping": bench.stopping}[arguments.part]()


def forming(arguments: Namespace) -> None:
    """Time to form a candidate of four experts in place, over that of reading all their weights once."""
    settings = SMALL if arguments.quick else CHURCH
    with tempfile.TemporaryDirectory() as name:
        from diffusers import UNet2DModel

        folder = Path(name)
        unet = UNet2DModel.from_config(settings | {"sample_size": 32}).eval()
        models = []
        for number_ in range(5):
            place = folder / str(number_)
            noise = {key: tensor + 1e-3 * torch.randn_like(tensor) for key, tensor in unet.state_dict().items()}
            write_denoiser(place, noise, {})
            models.append(load_tensors(denoiser_in(place)))
        device = torch.device(arguments.device)
        experts = {str(k): tensors for k, tensors in enumerate(models[1:])}
        candidates = Candidates(models[0], experts, dict.fromkeys(models[0], 0), device)
        network = unet.to(device)
        held = [candidates.pretrained, *candidates.finetuned]
        contenders = {
            "reading the weights once": lambda: [t.sum() for tensors in held for t in tensors.values()],
            "forming a candidate": lambda: candidates.form(network, [PUBLISHED]),
        }
        taken = alternate(contenders, 2 if arguments.quick else 7, arguments.device)
    first = taken["reading the weights once"]
    rows = [{"what": what, "seconds": values, "times": ratios(values, first)} for what, values in taken.items()]
    lines = [[row["what"], spread(row["seconds"]), spread(row["times"])] for row in rows]
    save("search-forming", arguments.device, rows, markdown_table(["4 experts", "s", "× reading"], lines))


class Bench:
    """One trained run, and what every way is compared on."""

    def __init__(self, config: Config, arguments: Namespace):
        self.config = config
        self.arguments = arguments
        self.accelerator = make_accelerator("no", "search")
        self.pretrained = find_pretrained(config.paths)
        self.folder = config.paths.run_folder / ("search-benchmark-quick" if arguments.quick else "search-benchmark")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seeds = range(FRESH_SEED, FRESH_SEED + arguments.fresh_images // FRESH_BLOCKS * FRESH_BLOCKS)
        self.problem = self.problem_of({}, 0)
        self.baseline = self.blocks("pretrained", lambda: self.problem.merged(np.zeros(self.problem.shape)))

    def problem_of(self, changed: dict, seed: int) -> Problem:
        """The search under other settings; one of another seed has images, noise and proposals of its own."""
        settings = self.config.search
        if self.arguments.quick:
            settings = replace(settings, images=32, num_images=16, finalist_images=32, num_inference_steps=2)
            settings = replace(settings, control_images=64)
        settings = replace(settings, **changed, seed_offset=settings.seed_offset + 1_000_000 * seed)
        source = open_source(self.config.data)
        return Problem(replace(self.config, search=settings), self.accelerator, self.pretrained, source, {})

    def blocks(self, name: str, network_at: "NetworkAt") -> list[float]:
        """The distance of each block of the fresh seeds; kept in a file.

        Args:
            network_at: makes the network.
        """
        file = self.folder / "fresh.json"
        known = read_json(file) if file.exists() else {}
        key = f"{name}, {len(self.seeds)} images"
        if key not in known:
            plain = self.problem.plain_distance
            steps = 2 if self.arguments.quick else self.config.sample.num_inference_steps
            sample = replace(plain.drawing.settings, num_inference_steps=steps)
            features = plain.by(sample).features(network_at(), self.seeds)
            known[key] = [plain.space.distance(part) for part in np.split(features, FRESH_BLOCKS)]
            write_text(file, json.dumps(known, indent=1))
        return known[key]

    def difference(self, blocks: list[float], others: list[float] | None = None) -> tuple[float, float]:
        """To the pretrained network, or to another's blocks, with its standard error."""
        difference = paired_difference(blocks, self.baseline if others is None else others)
        return difference.mean, difference.standard_error

    def mean_blocks(self, row: dict) -> list[float]:
        """Of the searches of a row, block by block."""
        return np.mean([found["blocks"] for found in row["seeds"]], axis=0).tolist()

    # --- do the cheap objectives rank candidates as the distance does?

    def ranks(self) -> None:
        """Spearman's rank correlation with the distance of many images, over random candidates."""
        settings = self.problem.settings
        random = np.random.default_rng(0)
        candidates = [random.uniform(*settings.interval, self.problem.shape) for _ in range(RANKED)]
        few, many = (self.problem.seeds(count) for count in (settings.num_images, settings.control_images))
        file = self.folder / "ranks.json"
        rows = read_json(file)["rows"] if file.exists() and not self.arguments.quick else []
        for candidate in candidates[len(rows) :]:
            row = {name: self.problem.value(name, candidate)[0] for name in ("match", "loss")}
            features = self.problem.distances[0].features(self.problem.merged(candidate), many)
            row |= {"few": self.problem.distances[0].of_features(features[: len(few)])}
            row |= {"plain": self.problem.plain_distance.of_features(features[: len(few)])}
            row |= {"many": self.problem.plain_distance.of_features(features)}
            rows.append({"coefficients": candidate.tolist(), **row})
            file.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
        plain = f"fd of {len(few):,} of these images"
        names = {"match": "match", "loss": "loss", "plain": f"{plain} alone", "few": f"{plain}, with the control"}
        drawn = len(few) * self.problem.distances[0].drawing.passes
        cost = {"match": settings.images, "loss": settings.images, "plain": drawn, "few": drawn}
        lines = []
        for key, name in names.items():
            found = spearmanr([row[key] for row in rows], [row["many"] for row in rows])
            lines.append([name, f"{cost[key]:,}", f"{found.statistic:+.2f}", f"{found.pvalue:.2g}"])
        title = f"rank correlation with fd of {len(many):,} images"
        table = markdown_table([f"{self.config.name}, {RANKED} candidates", "UNet passes", title, "p"], lines)
        save(f"search-ranks-{self.config.name}", self.arguments.device, rows, table, {})

    # --- would it pay to stop a candidate as soon as it is clearly worse than the best?

    def stopping(self) -> None:
        """The images that a search would have saved, by the paired jackknife of the first images of each candidate."""
        settings = self.problem.settings
        folder = self.folder / "stopping"
        folder.mkdir(exist_ok=True)
        [distance], count = self.problem.distances, settings.num_images
        shares = [share for share in STOPS if share * count > 2 * distance.control.shape[1]]
        tried = find(self.problem, folder, "stopping").study.rows()
        best, values_of_best, rows = None, {}, []
        for row in tried:
            features = distance.control
            if shares and row.coefficients.any():
                seeds = self.problem.seeds(round(max(shares) * count))
                features = distance.features(self.problem.merged(row.coefficients), seeds)
            values = {share: distance.pseudovalues(features[: round(share * count)]) for share in shares}
            worse = {share: paired_difference(values[share], other) for share, other in values_of_best.items()}
            drawn = next((share for share, found in worse.items() if found.is_clear and found.mean > 0), 1)
            is_best = best is None or row.value < best
            rows.append({"value": row.value, "drawn": drawn, "a new best": is_best})
            if is_best:
                best, values_of_best = row.value, values
        at = ", ".join(f"{round(share * count):,}" for share in shares)
        saved = f"{1 - statistics.mean(row['drawn'] for row in rows):.1%}"
        lost = str(sum(row["a new best"] and row["drawn"] < 1 for row in rows))
        titles = [f"{self.config.name}, {len(rows)} candidates", "images saved", "new bests stopped"]
        table = markdown_table(titles, [[f"stopped after {at} of {count:,} images, if clearly worse", saved, lost]])
        save(f"search-stopping-{self.config.name}", self.arguments.device, rows, table, {})

    # --- what does each way find, and what does it cost?

    def ways(self) -> None:
        """Every way and control, with several seeds of the search; then the models that a result has to beat."""
        settings = self.problem.settings
        many = 2**4 if self.arguments.quick else GRID_VALUES ** self.problem.shape[1]
        trials = 10 if self.arguments.quick else settings.trials
        images = trials * settings.num_images + settings.finalists * settings.finalist_images
        images += settings.control_images
        equal = max(2**4, images // settings.num_images)  # candidates that cost as much as the default way
        fd = {"method": "optuna", "objective": "fd", "trials": trials}
        ways = {
            "match, closed form, per range": {"method": "closed_form"},
            "match, closed form, per block": {"method": "closed_form", "groups": "block"},
            "match, gradient, per tensor": {"method": "gradient", "groups": "tensor"},
            "loss, closed form, per range": {"method": "closed_form", "objective": "loss"},
            "multi_fidelity, per range": {"method": "multi_fidelity", "trials": trials},
            "multi_fidelity, per block": {"method": "multi_fidelity", "trials": trials, "groups": "block"},
            "fd, tpe, per range": {**fd, "sampler": "tpe"},
            "random search of equal cost": {**fd, "sampler": "random", "trials": equal},
            "grid of equal cost": {**fd, "sampler": "grid", "trials": equal},
            "grid of all": {**fd, "sampler": "grid", "trials": many},
        }
        rows = []
        for name, changed in ways.items():
            count = 1 if name == "grid of all" else self.arguments.other_seeds if "sampler" in changed else SEEDS
            found = [self.search(name, changed, seed) for seed in range(count)]
            rows.append({"way": name, "seeds": found})
            print(self.line(rows[-1], []), flush=True)
        shape = self.problem.shape
        for value in (1 / shape[1], 0.5, 1.0):
            rows.append(self.fixed(f"uniform {value:g}", np.full(shape, value)))
        if len(PUBLISHED) == shape[1]:
            rows.append(self.fixed("published coefficients", np.broadcast_to(PUBLISHED, shape)))
        rows.append(self.row("ensemble", self.blocks("ensemble", self.problem.experts)))
        if self.config.paths.continued.is_dir():
            rows.append(self.row("continued", self.blocks("continued", self.continued)))
        fixed = {row["way"]: self.mean_blocks(row) for row in rows if "passes" not in row["seeds"][0]}
        uniform = min((name for name in fixed if name.startswith("uniform")), key=lambda name: np.mean(fixed[name]))
        rivals = [name for name in (uniform, "published coefficients", "ensemble", "continued") if name in fixed]
        titles = [self.config.name, "UNet passes", "fresh seeds: difference to pretrained, of each search"]
        titles += ["their mean ± s.e.", *(f"to {name}" for name in rivals), "where it was searched"]
        lines = [self.line(row, [fixed[name] for name in rivals]) for row in rows]
        table = markdown_table(titles, lines)
        save(f"search-ways-{self.config.name}", self.arguments.device, rows, table, {})

    def search(self, name: str, changed: dict, seed: int) -> dict:
        """One search, in a folder of its own, and its score on the fresh seeds."""
        problem = self.problem_of(changed, seed)
        folder = self.folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
        folder.mkdir(exist_ok=True)
        found = find(problem, folder, name)
        blocks = self.blocks(f"{name}, seed {seed}", lambda: problem.merged(found.coefficients))
        difference, error = self.difference(blocks)
        return {
            "coefficients": found.coefficients.tolist(),
            "passes": found.evaluated[-1].passes,
            "searched_difference": found.value - found.pretrained,
            "difference": difference,
            "standard_error": error,
            "blocks": blocks,
        }

    def fixed(self, name: str, coefficients: np.ndarray) -> dict:
        """A row of coefficients without a search."""
        return self.row(name, self.blocks(name, lambda: self.problem.merged(coefficients)))

    def row(self, name: str, blocks: list[float]) -> dict:
        """A model without a search."""
        difference, error = self.difference(blocks)
        return {"way": name, "seeds": [{"difference": difference, "standard_error": error, "blocks": blocks}]}

    def continued(self) -> NetworkAt:
        """The control."""
        unet = freeze(load_denoiser(self.config.paths.continued), self.accelerator.device, "no")
        return lambda _: unet

    def line(self, row: dict, rivals: list[list[float]]) -> list[str]:
        """A row of the table.

        Args:
            rivals: blocks of models that a search has to beat.
        """
        seeds = row["seeds"]
        passes = [found["passes"] for found in seeds if "passes" in found]
        each = ", ".join(number(found["difference"], form="+.3f") for found in seeds)
        blocks = self.mean_blocks(row)
        differences = [number(*self.difference(blocks, other), "+.3f") for other in (None, *rivals)]
        searched = [found["searched_difference"] for found in seeds if "searched_difference" in found]
        cost = f"{round(statistics.mean(passes)):,}" if passes else "-"
        where = f"{statistics.mean(searched):+.3f}" if searched else "-"
        return [row["way"], cost, each if passes else "-", *differences, where]


if __name__ == "__main__":
    main()
