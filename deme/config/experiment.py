"""The whole configuration of an experiment, and what has to hold between its sections."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from deme.config import networks, sections, trainings
from deme.config.judges import Judge
from deme.config.networks import RANDOM_DIRECTIONS, TRAJECTORY, Merge, Network, networks_of
from deme.config.paths import Paths, denoiser_in, snapshot_path, usual_denoiser, with_schedule
from deme.config.section import LONGEST_NAME, Section, is_finite, is_folder_name, one_of, setting, without_password
from deme.config.trainings import ANT_UW, CONTINUED, DISTILLED, EMA_WIDTH, NAMED_TRAININGS, SELF, SOUP
from deme.errors import UserError, naming

UNREAD_BY = {  # script → the sections that it does not read, so that they are no reason to run it again
    "pretrain.py": "finetune self_training search merge distill sample evaluate analyze",
    "scripts/cache.py": "self_training search merge distill sample evaluate analyze",
    "finetune.py": "search merge sample evaluate analyze",
    RANDOM_DIRECTIONS: "data pretrain finetune self_training search merge distill sample evaluate analyze",
    "sample_ddp.py": "pretrain finetune self_training search merge distill evaluate analyze",
}
SCHEDULE_KEYS = ("steps", "scheduler")  # of an item of sample.schedules


@dataclass(frozen=True)
class Config(Section):
    """One experiment."""

    section: ClassVar[str] = ""
    name: str = setting("digits", "place all_runs")
    output_dir: str = setting("runs", "place path")
    seed: int = setting(0, "weights search all_runs", least=0, below=2**63)
    model: sections.Model = field(default_factory=sections.Model)
    data: sections.Data = field(default_factory=sections.Data)
    timesteps: sections.Timesteps = field(default_factory=sections.Timesteps)
    pretrain: trainings.Pretrain = field(default_factory=trainings.Pretrain)
    finetune: trainings.Finetune = field(default_factory=trainings.Finetune)
    self_training: trainings.SelfTraining = field(default_factory=trainings.SelfTraining)
    search: sections.Search = field(default_factory=sections.Search)
    merge: Merge = field(default_factory=Merge)
    distill: trainings.Distill = field(default_factory=trainings.Distill)
    sample: sections.Sample = field(default_factory=sections.Sample)
    evaluate: sections.Evaluate = field(default_factory=sections.Evaluate)
    analyze: sections.Analyze = field(default_factory=sections.Analyze)

    def check_together(self) -> None:
        rule = f"must be a plain folder name: no control characters, at most {LONGEST_NAME} bytes"
        self.check("name", is_folder_name(self.name), rule)
        count, chosen = len(self.timesteps.ranges), self.finetune.range
        words = ("null", f"0 … {count - 1}", *NAMED_TRAININGS, SELF, SOUP)
        known = chosen in (None, *range(count), *NAMED_TRAININGS, SELF, SOUP)
        self.finetune.check("range", known, one_of(words, chosen))
        part = "batch_size" if self.finetune.micro_batch_size is None else "micro_batch_size"
        enough = chosen not in (DISTILLED, ANT_UW) or getattr(self.finetune, part) >= count
        self.finetune.check(part, enough, f"finetune.range={chosen} spreads it over {count} timestep ranges")
        measured = self.pretrain.patience is None or self.data.held_out_images > 0
        self.pretrain.check("patience", measured, "needs data.held_out_images above 0")
        total = self.timesteps.num_train_timesteps
        for section in (self.sample, self.search, self.self_training):
            few = (section.num_inference_steps or 1) <= total
            section.check("num_inference_steps", few, f"must be at most timesteps.num_train_timesteps={total}")
        for section, key in ((self.sample, "schedules"), (self.search, "schedules"), (self.search, "report_schedules")):
            self.check_schedules(section, key)
        given, count = self.sample.prediction_scale, len(self.timesteps.ranges)
        scales = given if isinstance(given, list) and len(given) == count else [given]
        positive = all(is_finite(scale) and scale > 0 for scale in scales)
        rule = f"must be a positive number, one for each of {count} timestep ranges, or a file of search.py"
        self.sample.check("prediction_scale", given is None or isinstance(given, str) or positive, rule)
        self._check_experts()
        networks.check_loras(self)
        rule = "must be a list of finite numbers, a mapping from name patterns to such lists, or a file of search.py"
        for pattern, numbers in self.coefficient_groups.items():
            fits = isinstance(pattern, str) and isinstance(numbers, list) and all(map(is_finite, numbers))
            self.merge.check("coefficients", fits, rule)
            lacks = f"{len(numbers)} coefficients for {len(self.merged_names)} networks"
            self.merge.check("coefficients", len(numbers) == len(self.merged_names), lacks)
        self.merge.check("coefficients", self.merge.coefficients != {}, rule)

    def check_schedules(self, section: sections.Sample | sections.Search, key: str) -> None:
        """Check the items of a section's list of schedules."""
        total, earlier = self.timesteps.num_train_timesteps, set()
        for place, item in enumerate(getattr(section, key) or []):
            with naming(f"{section.section}.{key}[{place}]", item):
                if not isinstance(item, dict):
                    raise UserError(f"must be a mapping of {' and '.join(SCHEDULE_KEYS)}")
                if unknown := [key for key in item if key not in SCHEDULE_KEYS]:
                    raise UserError(f"{unknown[0]} {one_of(SCHEDULE_KEYS, unknown[0])}")
                steps, scheduler = map(item.get, SCHEDULE_KEYS)
                if steps is not None and not (type(steps) is int and 0 < steps <= total):
                    raise UserError(f"steps must be 1 … timesteps.num_train_timesteps={total}")
                name = self.drawn_by(section, item).schedule  # of the folder, too
                if not isinstance(scheduler, str | None) or not is_folder_name(name):
                    raise UserError("scheduler must be a name, as sample.scheduler")
                if name in earlier:
                    raise UserError(f"{name} is listed before")
                earlier.add(name)

    def drawn_by(self, section: sections.Sample | sections.Search, item: dict[str, Any]) -> sections.Sample:
        """`sample` with a schedule; what its item leaves out is the section's, or else that of `sample`."""
        usual = section.num_inference_steps or self.sample.num_inference_steps
        steps, scheduler = map(item.get, SCHEDULE_KEYS)
        schedule = {"num_inference_steps": usual if steps is None else steps, "schedules": []}
        return replace(self.sample, scheduler=self.sample.scheduler if scheduler is None else scheduler, **schedule)

    def schedules_of(self, section: sections.Sample | sections.Search) -> list[sections.Sample]:
        """`sample` with each schedule of a section, `sample` or `search`; without a list, with its own one."""
        return [self.drawn_by(section, item) for item in section.schedules or [{}]]

    @property
    def drawn(self) -> list["Config"]:
        """The experiment with each of `sample.schedules`, drawn into folders of their own; without any, itself."""
        if not self.sample.schedules:
            return [self]
        folder, drawn = self.paths.samples, []
        for one in self.schedules_of(self.sample):
            output = folder.with_name(with_schedule(folder.name, one.schedule))
            drawn.append(replace(self, sample=replace(one, output=str(output))))
        return drawn

    @property
    def schedule_names(self) -> list[str]:
        """The schedules in the names of the sample folders; only an empty one if there is no list of them."""
        return [one.schedule for one in self.schedules_of(self.sample)] if self.sample.schedules else [""]

    @property
    def paths(self) -> Paths:
        """Where everything of it lies."""
        return Paths(self)

    @property
    def recorded(self) -> dict[str, Any]:
        """All settings as they are shown and written beside outputs: without the password in `search.storage`."""
        values = asdict(self)
        values["search"]["storage"] = without_password(self.search.storage)
        return values

    @property
    def all_sections(self) -> list[Section]:
        """The configuration itself, whose own settings are in no section, then its sections."""
        return [self, *(getattr(self, part.name) for part in fields(self) if is_dataclass(part.type))]

    def read_by(self, script: str) -> dict[str, Any]:
        """The settings that a script reads."""
        unread, read = UNREAD_BY.get(script, "").split(), self.recorded
        if script == "search.py":
            read["evaluate"]["features"] = self.evaluate.judges[0].text
        return {name: values for name, values in read.items() if name not in unread}

    @property
    def self_trained_names(self) -> list[str]:
        """The names of the networks that finetune.range=self trains."""
        return [f"{SELF}-{name}" for name in self.timesteps.names] if self.self_training.ranges else [SELF]

    @property
    def soup_names(self) -> list[str]:
        """The names of the networks that finetune.range=soup trains."""
        return [f"{SOUP}-{number}" for number in range(len(self.timesteps.ranges))]

    @property
    def merged_networks(self) -> list[Network]:
        """The networks that are merged, in the order of their coefficients."""
        return networks_of(self)

    @property
    def merged_names(self) -> list[str]:
        """Their names."""
        return [network.name for network in self.merged_networks]

    @property
    def merges_experts(self) -> bool:
        """True if what is merged is one network for each timestep range, in their order."""
        return [network.timesteps for network in self.merged_networks] == self.timesteps.ranges

    @property
    def experts(self) -> list[Network]:
        """The experts of the ranges, in their order."""
        return networks.experts_of(self)

    @property
    def analyzed_experts(self) -> dict[str, Network]:
        """Name → network of those that analyses compare: the ranges' experts, or whatever else is merged."""
        edges = [network.timesteps or () for network in self.merged_networks if network.word != SELF]
        if edges == [] or sorted(edges) == self.timesteps.ranges:
            return dict(zip(self.timesteps.names, self.experts, strict=True))
        return {network.name: network for network in self.merged_networks}

    def steps_of(self, training: str) -> int:
        """Optimizer steps of a training of finetune.py, by its folder's name."""
        if training == DISTILLED:
            return self.distill.max_steps
        count = len(self.timesteps.ranges) if training in NAMED_TRAININGS else 1  # all ranges' together
        return count * self.finetune.max_steps

    def snapshots(self, training: str) -> list[Path]:
        """The folders of the networks that a training of finetune.py keeps on its way, in the order of their steps."""
        every, steps, folder = self.finetune.snapshot_every, self.steps_of(training), self.paths.finetuning(training)
        kept = range(every, steps + 1, every) if every else ()
        return [denoiser_in(snapshot_path(folder, step), usual_denoiser(self)) for step in kept]

    @property
    def own_sample_steps(self) -> int:
        """Sampling steps of the own samples."""
        return self.self_training.num_inference_steps or self.sample.num_inference_steps

    @property
    def usual_coefficients(self) -> list[float]:
        """One of each of `merged_networks`: 1/N of a word's N networks, or of N folders; −1/N of self-trained ones."""
        words = [network.word for network in self.merged_networks]
        return [(-1 if word == SELF else 1) / words.count(word) for word in words]

    @property
    def coefficient_groups(self) -> dict[str, list[float]]:
        """Name pattern → merging coefficients, one of each of `merged_names`; a plain list holds for all tensors.

        Empty where they are in a file: `merge.py` reads it.
        """
        given = self.usual_coefficients if self.merge.coefficients is None else self.merge.coefficients
        if isinstance(given, dict):
            return given
        return {} if isinstance(given, str) else {"*": given}

    @property
    def needs_search(self) -> bool:
        """True if the merging coefficients are those that this run's search finds."""
        return self.merge.coefficients == "search"

    @property
    def searches_scales(self) -> bool:
        """True if a search looks for scales of the predicted noise."""
        return self.search.over == sections.SCALES

    @property
    def searches_method(self) -> bool:
        """True if a search looks for the coefficients of another merge method than the sum."""
        return not self.searches_scales and self.merge.method != networks.SUM

    @property
    def has_cheap_answer(self) -> bool:
        """True if a search has match and loss: for sums of one network for each range, without `ema_widths`."""
        return self.merges_experts and not (self.searches_scales or self.searches_method or self.search.ema_widths)

    @property
    def searched_names(self) -> list[str]:
        """What has a coefficient in a search: the networks that are merged, or the timestep ranges; then the width."""
        names = self.timesteps.names if self.searches_scales else self.merged_names
        return [*names, EMA_WIDTH] if self.search.ema_widths else names

    @property
    def intervals(self) -> list[tuple[float, float]]:
        """The bounds of the searched coefficients, one of each of `searched_names`."""
        search, networks = self.search, self.merged_networks
        if self.searches_scales:
            return [search.interval] * len(self.searched_names)
        found = [search.self_interval if network.word == SELF else search.interval for network in networks]
        return [*found, (0.0, 1.0 + len(search.ema_widths))] if search.ema_widths else found

    @property
    def search_steps(self) -> int:
        """Sampling steps of an image that a search draws, with all of its schedules."""
        return sum(one.num_inference_steps for one in self.schedules_of(self.search))

    @property
    def report_blocks(self) -> int:
        """Into how many blocks of seeds the final report of a search is split; one would have no standard error."""
        return self.evaluate.blocks if self.evaluate.blocks > 1 else 5

    def _check_experts(self) -> None:
        """What has to hold before `merged_networks` can be listed."""
        every, steps = self.finetune.snapshot_every, self.steps_of(CONTINUED)
        has_snapshots = every is not None and every <= steps
        rule = f"are snapshots of {CONTINUED}, which needs finetune.snapshot_every of at most its {steps} steps"
        self.merge.check("experts", TRAJECTORY not in self.merge.experts or has_snapshots, rule)
        for item in self.merge.experts:
            high = item.get("timesteps", [0, 0])[1] if isinstance(item, dict) else 0
            total = self.timesteps.num_train_timesteps
            self.merge.check("experts", high <= total, f"{high}: above timesteps.num_train_timesteps={total}")

    def check_search(self) -> None:
        """What has to hold between the sections where a search is made."""
        search, drawn = self.search, self.sample.seeds
        rule = "match and loss need merge.experts=[ranges], or a folder with `timesteps` for each of timesteps.ranges, "
        rule += "and merge.method=task_arithmetic; without them use multi_fidelity, or optuna with fd"
        search.check("method", self.search.by_images or self.has_cheap_answer, rule)
        if self.searches_method:
            networks.check_searched_method(self)
        one = not search.ema_widths or self.merge.ema_width is None
        self.merge.check("ema_width", one, "can't be used with search.ema_widths")
        given = self.sample.prediction_scale
        is_known = given in (None, "search") if self.searches_scales else given != "search"
        self.sample.check("prediction_scale", is_known, f"can't be used with search.over={search.over}")
        end = search.seed_offset + search.control_images + search.report_images
        apart = end <= drawn.start or search.seed_offset >= drawn.stop
        search.check("seed_offset", apart, f"sample_ddp.py draws the seeds {drawn.start} … {drawn.stop - 1}")
        enough = search.report_images == 0 or search.report_images >= 2 * self.report_blocks
        search.check("report_images", enough, f"must be 0, or at least 2 for each of {self.report_blocks} blocks")

    def check_self_training(self) -> None:
        """Make sure that the own samples fill a batch, and are no images that are scored."""
        own, drawn = self.self_training, self.sample.seeds
        rule = f"must be at least finetune.batch_size={self.finetune.batch_size}"
        own.check("num_images", own.num_images >= self.finetune.batch_size, rule)
        apart = own.seed_offset + own.num_images <= drawn.start or own.seed_offset >= drawn.stop
        own.check("seed_offset", apart, f"sample_ddp.py draws the seeds {drawn.start} … {drawn.stop - 1}")

    def check_classified(self, judges: Iterable[Judge]) -> None:
        """Make sure that the data's images are large enough for the classifier, if it is one of the judges."""
        least = sections.LEAST_CLASSIFIED
        seen = all(judge.name != "classifier" for judge in judges) or self.data.resolution >= least
        self.data.check("resolution", seen, f"evaluate.features=classifier needs at least {least} pixels")

    def check_analyzed(self) -> None:
        """Make sure that the timesteps of the analyses, and the two experts of the landscape, are there."""
        total, settings = self.timesteps.num_train_timesteps, self.analyze
        settings.check("timesteps", settings.timesteps <= total, f"there are only {total}")
        for low, high in self.timesteps.ranges:
            there = any(low <= point < high for point in self.analyzed_timesteps)
            settings.check("timesteps", there, f"none of them falls into the range [{low}, {high})")
        count = len(self.timesteps.ranges)
        enough = settings.landscape_images >= count
        settings.check("landscape_images", enough, f"are spread over {count} timestep ranges")
        count = len(self.analyzed_experts)
        inside = set(settings.landscape_ranges or []) <= set(range(count))
        settings.check("landscape_ranges", inside, f"the experts have the numbers 0 … {count - 1}")

    @property
    def analyzed_timesteps(self) -> list[int]:
        """The middles of `analyze.timesteps` equal parts of [0, T)."""
        count = self.analyze.timesteps
        return [(2 * i + 1) * self.timesteps.num_train_timesteps // (2 * count) for i in range(count)]
