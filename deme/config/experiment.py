"""The whole configuration of an experiment, and what has to hold between its sections."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from deme.config.paths import Paths
from deme.config.section import LONGEST_NAME, Section, is_finite, is_folder_name, one_of, setting, without_password
from deme.config.sections import (
    LEAST_CLASSIFIED,
    REPORT_BLOCKS,
    Analyze,
    Data,
    Evaluate,
    Merge,
    Model,
    Sample,
    Search,
    Timesteps,
)
from deme.config.trainings import (
    ANT_UW,
    DISTILLED,
    NAMED_TRAININGS,
    SELF,
    Distill,
    Finetune,
    Pretrain,
    SelfTraining,
    Training,
)

PRETRAIN, CACHE, FINETUNE, SAMPLE = "pretrain.py", "scripts/cache.py", "finetune.py", "sample_ddp.py"


def part(kind: type[Section], *unread_by: str) -> Any:
    """A section of the configuration.

    Args:
        unread_by: scripts that do not read it, so that it is no reason to run them again.
    """
    return field(default_factory=kind, metadata={"unread_by": unread_by})


@dataclass(frozen=True)
class Config(Section):
    """One experiment."""

    section: ClassVar[str] = ""
    name: str = setting("digits", "place all_runs")
    output_dir: str = setting("runs", "place path")
    seed: int = setting(0, "weights search all_runs", least=0, below=2**63)
    model: Model = part(Model)
    data: Data = part(Data)
    timesteps: Timesteps = part(Timesteps)
    pretrain: Pretrain = part(Pretrain, SAMPLE)
    finetune: Finetune = part(Finetune, PRETRAIN, SAMPLE)
    self_training: SelfTraining = part(SelfTraining, PRETRAIN, CACHE, SAMPLE)
    search: Search = part(Search, PRETRAIN, CACHE, FINETUNE, SAMPLE)
    merge: Merge = part(Merge, PRETRAIN, CACHE, FINETUNE, SAMPLE)
    distill: Distill = part(Distill, PRETRAIN, CACHE, SAMPLE)
    sample: Sample = part(Sample, PRETRAIN, CACHE, FINETUNE)
    evaluate: Evaluate = part(Evaluate, PRETRAIN, CACHE, FINETUNE, SAMPLE)
    analyze: Analyze = part(Analyze, PRETRAIN, CACHE, FINETUNE, SAMPLE)

    def check_together(self) -> None:
        rule = f"must be a plain folder name: no control characters, at most {LONGEST_NAME} bytes"
        self.check("name", is_folder_name(self.name), rule)
        count = len(self.timesteps.ranges)
        chosen = self.finetune.range
        is_range = isinstance(chosen, int) and 0 <= chosen < count
        named = chosen is None or chosen in (*NAMED_TRAININGS, SELF)
        words = ("null", f"0 … {count - 1}", *NAMED_TRAININGS, SELF)
        self.finetune.check("range", named or is_range, one_of(words, chosen))
        part = "batch_size" if self.finetune.micro_batch_size is None else "micro_batch_size"
        enough = chosen not in (DISTILLED, ANT_UW) or getattr(self.finetune, part) >= count
        self.finetune.check(part, enough, f"finetune.range={chosen} spreads it over {count} timestep ranges")
        measured = self.pretrain.patience is None or self.data.held_out_images > 0
        self.pretrain.check("patience", measured, "needs data.held_out_images above 0")
        total = self.timesteps.num_train_timesteps
        few = self.sample.num_inference_steps <= total
        self.sample.check("num_inference_steps", few, f"must be at most timesteps.num_train_timesteps={total}")
        rule = "must be a list of finite numbers, a mapping from name patterns to such lists, or a file of search.py"
        for pattern, numbers in self.coefficient_groups.items():
            fits = isinstance(pattern, str) and isinstance(numbers, list) and all(map(is_finite, numbers))
            self.merge.check("coefficients", fits, rule)
            lacks = f"{len(numbers)} coefficients for {len(self.merged_names)} networks"
            self.merge.check("coefficients", len(numbers) == len(self.merged_names), lacks)
        self.merge.check("coefficients", self.merge.coefficients != {}, rule)

    @property
    def paths(self) -> Paths:
        """Where everything of it lies."""
        return Paths(self)

    @property
    def needs_search(self) -> bool:
        """True if the merging coefficients are those that this run's search finds."""
        return self.merge.coefficients == "search"

    @property
    def recorded(self) -> dict[str, Any]:
        """All settings as they are shown and written beside outputs: without the password in `search.storage`."""
        values = asdict(self)
        values["search"]["storage"] = without_password(self.search.storage)
        return values

    @property
    def sections(self) -> list[Section]:
        """The configuration itself, whose own settings are in no section, then its sections."""
        return [self, *(getattr(self, part.name) for part in fields(self) if is_dataclass(part.type))]

    def read_by(self, script: str) -> dict[str, Any]:
        """The settings that a script reads."""
        unread = {part.name for part in fields(self) if script in part.metadata.get("unread_by", ())}
        return {name: values for name, values in self.recorded.items() if name not in unread}

    @property
    def coefficient_groups(self) -> dict[str, list[float]]:
        """Name pattern → merging coefficients, one of each of `merged_names`; a plain list holds for all tensors.

        Empty where they are in a file: `merge.py` reads it.
        """
        coefficients = self.merge.coefficients
        if isinstance(coefficients, str):
            return {}
        if isinstance(coefficients, dict):
            return coefficients
        return {"*": self.usual_coefficients if coefficients is None else coefficients}

    @property
    def usual_coefficients(self) -> list[float]:
        """1/N for the experts of N ranges, and −1 in sum for self-trained networks, one of each of `merged_names`."""
        ranges, own = len(self.timesteps.ranges), len(self.self_trained_names)
        usual = {"ranges": [1 / ranges] * ranges, SELF: [-1 / own] * own}
        return [number for group in self.merge.experts for number in usual[group]]

    @property
    def self_trained_names(self) -> list[str]:
        """The names of the networks that finetune.range=self trains."""
        return [f"{SELF}-{name}" for name in self.timesteps.names] if self.self_training.ranges else [SELF]

    @property
    def merged_names(self) -> list[str]:
        """The names of the networks that are merged, in the order of their coefficients."""
        names = {"ranges": self.timesteps.names, SELF: self.self_trained_names}
        return [name for group in self.merge.experts for name in names[group]]

    @property
    def report_blocks(self) -> int:
        """Into how many blocks of seeds the final report of a search is split."""
        return self.evaluate.blocks if self.evaluate.blocks > 1 else REPORT_BLOCKS

    @property
    def search_steps(self) -> int:
        """Of the images that a search draws."""
        given = self.search.num_inference_steps
        return self.sample.num_inference_steps if given is None else given

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """The bounds of the searched coefficients, one of each of `merged_names`."""
        search = self.search
        own = self.self_trained_names
        return [search.self_interval if name in own else search.interval for name in self.merged_names]

    @property
    def searches_by_images(self) -> bool:
        """True if a search tells candidates apart by images that are drawn from them."""
        return self.search.method == "multi_fidelity" or self.search.objective == "fd"

    def check_search(self) -> None:
        """What has to hold between the sections where a search is made."""
        rule = "match and loss need merge.experts=[ranges]; with self use multi_fidelity, or optuna with fd"
        self.search.check("method", self.searches_by_images or self.merge.experts == ["ranges"], rule)
        total = self.timesteps.num_train_timesteps
        few = self.search_steps <= total
        self.search.check("num_inference_steps", few, f"must be at most timesteps.num_train_timesteps={total}")
        first, last = self.search.seed_offset, self.search.seed_offset + self.search.control_images
        drawn = range(self.sample.seed_offset, self.sample.seed_offset + self.sample.num_images)
        apart = last + self.search.report_images <= drawn.start or first >= drawn.stop
        self.search.check("seed_offset", apart, f"sample_ddp.py draws the seeds {drawn.start} … {drawn.stop - 1}")
        few = 0 < self.search.report_images < 2 * self.report_blocks
        rule = f"must be 0, or at least 2 for each of {self.report_blocks} blocks"
        self.search.check("report_images", not few, rule)

    def check_self_training(self) -> None:
        """Make sure that the own samples fill a batch, and are no images that are scored."""
        own, drawn = self.self_training, self.sample.seeds
        rule = f"must be at least finetune.batch_size={self.finetune.batch_size}"
        own.check("num_images", own.num_images >= self.finetune.batch_size, rule)
        apart = own.seed_offset + own.num_images <= drawn.start or own.seed_offset >= drawn.stop
        own.check("seed_offset", apart, f"sample_ddp.py draws the seeds {drawn.start} … {drawn.stop - 1}")

    def check_classified(self) -> None:
        """Make sure that the data's images are large enough for the features that are configured."""
        seen = self.evaluate.features != "classifier" or self.data.resolution >= LEAST_CLASSIFIED
        self.data.check("resolution", seen, f"evaluate.features=classifier needs at least {LEAST_CLASSIFIED} pixels")

    def check_analyzed(self) -> None:
        """Make sure that the timesteps of the analyses, and the two experts of the landscape, are there."""
        total = self.timesteps.num_train_timesteps
        self.analyze.check("timesteps", self.analyze.timesteps <= total, f"there are only {total}")
        points = self.analyzed_timesteps
        for low, high in self.timesteps.ranges:
            there = any(low <= point < high for point in points)
            self.analyze.check("timesteps", there, f"none of them falls into the range [{low}, {high})")
        last = len(self.timesteps.ranges) - 1
        enough = self.analyze.landscape_images > last
        self.analyze.check("landscape_images", enough, f"are spread over {last + 1} timestep ranges")
        inside = all(0 <= number <= last for number in self.analyze.landscape_ranges or [])
        self.analyze.check("landscape_ranges", inside, f"the ranges have the numbers 0 … {last}")

    @property
    def analyzed_timesteps(self) -> list[int]:
        """The middles of `analyze.timesteps` equal parts of [0, T)."""
        count = self.analyze.timesteps
        return [(2 * i + 1) * self.timesteps.num_train_timesteps // (2 * count) for i in range(count)]

    def check_fits(self, sample_sizes: dict[Path, int | None], schedule: Path, num_train_timesteps: int) -> None:
        """Compare networks and a noise schedule with what is configured.

        Args:
            sample_sizes: UNet folder → the resolution that it is made for.
            schedule: the file of the noise schedule.
            num_train_timesteps: its T.
        """
        for folder, size in sample_sizes.items():
            fits = size == self.data.resolution
            self.data.check("resolution", fits, f"the UNet in {folder} has sample_size={size}")
        fits = num_train_timesteps == self.timesteps.num_train_timesteps
        self.timesteps.check("num_train_timesteps", fits, f"the scheduler in {schedule} has {num_train_timesteps}")


def check_shares(settings: Training, processes: int) -> None:
    """Check that this many processes can share the micro-batches of a training step equally."""
    size = settings.micro_batch_size or settings.batch_size
    micro_batches = settings.batch_size // size
    share, rest = divmod(settings.batch_size, processes)
    remedy = f"a batch_size that is a multiple of {processes}" if rest else f"micro_batch_size={share} or a divisor"
    rule = f"{settings.section}.batch_size={settings.batch_size} makes {micro_batches} micro-batches of {size}, which "
    rule += f"{processes} processes can't share equally: set {remedy}"
    settings.check("micro_batch_size", micro_batches % processes == 0, rule)
