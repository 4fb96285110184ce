"""Every setting of a configuration file: its default, tags that say what it influences, bounds or choices.

`check_together` checks what must hold between settings. Nothing here imports torch, so errors are reported at once.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from deme.config.judges import FORMS, Judge, read_judge
from deme.config.section import ANALYSES, Section, is_finite, one_of, setting
from deme.config.trainings import PRECISIONS, WIDTH_RULE, is_width
from deme.errors import shown

CLIP_MODEL = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"  # of the paper's text-to-image scores
LEAST_CLASSIFIED = 8  # pixels: the classifier halves an image three times
DDIM = ("ddim", "DDIMScheduler")  # one sampler by two names
COEFFICIENTS, SCALES = "coefficients", "prediction_scale"  # what can be searched
RANGE_KEYS = ("num_ranges", "edges")  # of `timesteps`: what only chooses the ranges
SPACINGS = ("leading", "trailing", "linspace")


SINGLE_FILE = ".safetensors"  # how the name of a whole pipeline in one file ends


@dataclass(frozen=True)
class Model(Section):
    """What is finetuned."""

    # a pipeline's folder, its Hub id, or a single file in .safetensors; null: this run's
    pretrained: str | None = setting(None, "weights all_runs path")
    # the pipeline's folder from which a single file has its settings and tokenizer; null: the Hub's, by its tensors
    config: str | None = setting(None, "weights all_runs omit_default path")
    license: str | None = setting(None, "free")  # of the pretrained weights, for the model card; null: not stated
    projection: bool = setting(True, "weights")  # finetune with channel-wise projections

    def check_together(self) -> None:
        rule = "only for model.pretrained=FILE.safetensors"
        self.check("config", self.config is None or str(self.pretrained).endswith(SINGLE_FILE), rule)


@dataclass(frozen=True)
class Data(Section):
    """Which images, and how they become squares."""

    name: str = setting("digits", "weights statistics path")  # digits, a Hub id, or a folder of images or tables
    split: str = setting("train", "weights statistics")
    image_column: str = setting("image", "weights latents statistics")
    label_column: str | None = setting("label", "free statistics")  # null: no labels
    caption_column: str | None = setting(None, "weights text")  # null: none; sidecar: NAME.txt beside NAME.png
    resolution: int = setting(8, "weights examples latents statistics", above=0, most=2**16)  # pixels of a side
    center_crop: bool = setting(False, "weights examples latents")  # in training; evaluation always crops the centre
    random_flip: bool = setting(False, "weights examples latents")  # horizontal, in training; evaluation never flips
    held_out_images: int = setting(0, "weights examples", least=0)  # never trained on; for pretrain.py's held-out loss
    skip_uncaptioned: bool = setting(False, "weights text omit_default")  # skip images without a caption, don't stop
    skip_unreadable: bool = setting(False, "weights latents statistics")  # skip images that can't be decoded
    cache_gb: float = setting(4.0, "free", least=0)  # GiB of decoded images in each process's memory; above: in a file
    cache_disk_gb: float = setting(100.0, "free", least=0)  # GiB of that file; above: decoded each time they are needed
    cache_latents: bool = setting(False, "weights examples text")  # encode images and captions once, for all runs
    cached_views: int = setting(1, "weights examples latents text", above=0)  # crops and flips encoded of each image

    def check_together(self) -> None:
        is_fixed = self.center_crop and not self.random_flip
        one_view = not self.cache_latents or self.cached_views > 1 or is_fixed
        rule = "one view needs data.center_crop=true and data.random_flip=false; data.cached_views sets another number"
        self.check("cache_latents", one_view, rule)
        differ = self.cached_views == 1 or not is_fixed
        self.check("cached_views", differ, "data.center_crop=true and data.random_flip=false make them all the same")
        whole = self.held_out_images == 0 or not self.cache_latents or self.cached_views == 1
        self.check("held_out_images", whole, "are centre crops, which data.cached_views above 1 does not keep")


@dataclass(frozen=True)
class Timesteps(Section):
    """The ranges that are decoupled."""

    num_train_timesteps: int = setting(1000, "weights", above=0)  # T; must equal the pretrained scheduler's
    num_ranges: int = setting(4, "weights", above=0)  # N equal ranges, unless edges are given
    edges: list[int] | None = setting(None, "weights")  # rising from 0 to T: range k is [edges[k], edges[k + 1])
    # flow matching: what training draws timesteps from, restricted to each range, as diffusers' training scripts do
    density: str = setting("uniform", "weights omit_default", choices=("uniform", "logit_normal"))
    logit_mean: float = setting(0.0, "weights omit_default", least=-10, most=10)  # above 0: less noise
    logit_std: float = setting(1.0, "weights omit_default", above=0, most=10)
    shift: float | None = setting(None, "weights omit_default", above=0)  # above 1: more noise; null: the scheduler's

    def check_together(self) -> None:
        total, edges = self.num_train_timesteps, self.edges
        self.check("num_ranges", self.num_ranges <= total, f"must be at most T = {total}")
        rise = edges is None or (edges == sorted(set(edges)) and edges[:1] + edges[-1:] == [0, total])
        self.check("edges", rise, f"must rise from 0 to T = {total}")
        for key in ("logit_mean", "logit_std"):
            counts = self.density == "logit_normal" or getattr(self, key) == getattr(type(self), key)
            self.check(key, counts, "needs timesteps.density=logit_normal")

    @property
    def drawn_from(self) -> dict[str, Any]:
        """What determines the draws within ranges, for records: key → value."""
        return {f"timesteps.{key}": value for key, value in self.tagged("weights").items() if key not in RANGE_KEYS}

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The half-open ranges [low, high), lowest first."""
        equal = [k * self.num_train_timesteps // self.num_ranges for k in range(self.num_ranges + 1)]
        return list(pairwise(equal if self.edges is None else self.edges))

    @property
    def names(self) -> list[str]:
        """The names of the ranges, and of their experts' folders: (0, 250) gives 0000-0250."""
        return [f"{low:04d}-{high:04d}" for low, high in self.ranges]


@dataclass(frozen=True)
class Search(Section):
    """How the merging coefficients are found, or scales of the predicted noise."""

    # prediction_scale: that of sample for each range, on the pretrained network; a coefficient c is a scale 1 + c
    over: str = setting(COEFFICIENTS, "search omit_default", choices=(COEFFICIENTS, SCALES))
    method: str = setting("multi_fidelity", "search", choices=("closed_form", "gradient", "optuna", "multi_fidelity"))
    objective: str = setting("match", "search", choices=("match", "loss", "fd"))  # fd: only for optuna
    groups: Any = setting("range", "search")  # tensors with one coefficient: range, block, tensor, or name patterns
    # of coefficients; null: [0, 1.5], for groups=tensor [-1, 2], for over=prediction_scale [-0.05, 0.05]
    bounds: list[float] | None = setting(None, "search")
    self_bounds: list[float] | None = setting(None, "search omit_default")  # of self-trained networks; null: [-3, 0.5]
    spread: int = setting(0, "search omit_default", least=0)  # tpe, gp: so many first candidates all over the bounds
    grow_bounds: bool = setting(False, "search omit_default")  # tpe, gp: where the best candidate lies at a bound
    images: int = setting(512, "search", above=0)  # match, loss: from the training images
    batch_size: int = setting(64, "search", above=0)  # match, loss: images per forward pass
    ridge: float = setting(1e-3, "search", least=0)  # closed_form: pull to 0, relative to the mean curvature
    gauss_newton: int = setting(2, "search", least=0)  # closed_form: repetitions around its solution
    gradient_steps: int = setting(400, "search", above=0)  # of Adam
    gradient_learning_rate: float = setting(0.05, "search", above=0)
    gradient_patience: int = setting(5, "search", above=0)  # held-out measurements in a row without a better one: stop
    pull: float = setting(1e-3, "search", least=0)  # gradient: weight of the squared distance to the closed form
    start: list[str] = setting([], "search path omit_default")  # best.yaml of other searches, which are tried first
    sampler: str = setting("gp", "search", choices=("tpe", "gp", "random", "grid"))  # optuna, multi_fidelity
    trials: int = setting(32, "search", only=("sampler", "grid"), above=0)  # candidates; more continue a search
    num_images: int = setting(1000, "search", least=2)  # fd: drawn from each candidate
    control_images: int = setting(10_000, "search", above=0)  # fd: of the pretrained network, as control variates
    num_inference_steps: int | None = setting(None, "search", above=0)  # fd; null: sample's; fewer may mislead
    # fd: items as of sample.schedules; with any, the mean of the distances relative to the pretrained network's
    schedules: list[Any] = setting([], "search omit_default")
    ema_widths: list[float] = setting([], "search omit_default")  # fd: of the networks, beside their training's EMA
    seed_offset: int = setting(10_000_000, "search", least=0, below=2**63)  # fd: first seed; other images have others
    finalists: int = setting(4, "free", above=0)  # multi_fidelity: the best few, which are scored on finalist_images
    finalist_images: int = setting(4000, "search", above=0)
    report_images: int = setting(5000, "free", least=0)  # of each model in the report, from unseen seeds; 0: no report
    report_schedules: list[Any] | None = setting(None, "free")  # not searched, for the best; null: some, with schedules
    storage: str | None = setting(None, "place")  # URL of an Optuna storage; null: study.db of this search
    output: str | None = setting(None, "place one_run path")  # null: search/ of this run

    def check_together(self) -> None:
        cheap = self.objective != "fd" or self.method == "optuna"
        self.check("objective", cheap, f"search.method={self.method} needs match or loss")
        starts = self.method in ("optuna", "multi_fidelity") and self.sampler in ("tpe", "gp")
        rule = "is read by search.sampler=tpe or gp alone, with search.method=optuna or multi_fidelity"
        self.check("start", self.start == [] or starts, rule)
        self.check("grow_bounds", not self.grow_bounds or starts, rule)
        self.check("spread", self.spread == 0 or starts, rule)
        self._check_widths(starts)
        rule = "are read by search.method=multi_fidelity, or optuna with search.objective=fd, alone"
        self.check("schedules", self.schedules == [] or self.by_images, rule)
        once = self.schedules == [] or self.num_inference_steps is None
        self.check("num_inference_steps", once, "must be null, as search.schedules have their own steps")
        are_patterns = isinstance(self.groups, list) and set(map(type, self.groups)) == {str}
        whole = self.over == COEFFICIENTS or (self.groups == "range" and self.start == [])
        self.check("over", whole, "needs search.groups=range and no search.start")
        self.check("over", self.over == COEFFICIENTS or self.interval[0] > -1, "search.bounds must be above -1")
        named = are_patterns or self.groups in ("range", "block", "tensor")
        self.check("groups", named, "must be range, block, tensor, or a list of name patterns")
        for key, bounds in (("bounds", self.interval), ("self_bounds", self.self_interval)):
            pair = len(bounds) == 2 and all(map(is_finite, bounds)) and bounds[0] < bounds[1]
            self.check(key, pair, "must be two finite numbers, the least and the greatest")
            self.check(key, bounds[0] <= 0 <= bounds[1], "must hold 0, the pretrained network, where the search starts")
        self.check("self_bounds", self.self_interval[0] < 0, "self-trained networks are subtracted: must begin below 0")
        rule = f"must be at most search.control_images={self.control_images}"
        self.check("num_images", self.num_images <= self.control_images, rule)
        if self.method == "multi_fidelity":
            ordered = self.num_images <= self.finalist_images <= self.control_images
            rule = f"must lie between search.num_images={self.num_images} and control_images={self.control_images}"
            self.check("finalist_images", ordered, rule)
            self.check("finalists", self.finalists <= self.trials, f"must be at most search.trials={self.trials}")

    def _check_widths(self, is_sampled: bool) -> None:
        widths = self.ema_widths
        self.check("ema_widths", all(map(is_width, widths)), f"each {WIDTH_RULE}")
        self.check("ema_widths", len(set(widths)) == len(widths), "must be different widths")
        fits = is_sampled and self.by_images and self.groups == "range" and not self.grow_bounds
        rule = "needs candidates by tpe or gp, scored by fd, with search.groups=range and without search.grow_bounds"
        self.check("ema_widths", not widths or (fits and self.over == COEFFICIENTS), rule)

    @property
    def by_images(self) -> bool:
        """True if candidates are told apart by images that are drawn from them."""
        return self.method == "multi_fidelity" or self.objective == "fd"

    @property
    def interval(self) -> tuple[float, float]:
        """The least and the greatest coefficient."""
        default = (-1.0, 2.0) if self.groups == "tensor" else (0.0, 1.5)
        default = (-0.05, 0.05) if self.over == SCALES else default
        return default if self.bounds is None else tuple(self.bounds)

    @property
    def self_interval(self) -> tuple[float, float]:
        """The least and the greatest coefficient of a self-trained network."""
        return (-3.0, 0.5) if self.self_bounds is None else tuple(self.self_bounds)


@dataclass(frozen=True)
class Sample(Section):
    """Which images are drawn from what."""

    model: str = setting("merged", "all_runs path")  # pretrained, ensemble, neon, of NAMED_TRAININGS, or a folder
    num_images: int = setting(1000, "all_runs", above=0)
    seed_offset: int = setting(0, "all_runs", least=0, below=2**63)  # first image's seed; files are named by seed
    batch_size: int = setting(256, "free", above=0)  # images per network call; on a CPU 16 to 32 for large networks
    num_inference_steps: int = setting(50, "samples", above=0)
    scheduler: str = setting("ddim", "samples search")  # or a class of diffusers; docs/sampling.md has the names
    # draw a folder with each, such as {steps: 20, scheduler: euler}; what an item leaves out is as above
    schedules: list[Any] = setting([], "all_runs")
    timestep_spacing: str | None = setting(None, "samples search omit_default", choices=SPACINGS)  # null: as trained
    clip: bool = setting(False, "samples search omit_default")  # clip what is predicted of an image to [−1, 1]
    # divides the predicted noise: a number, one per timestep range, a best.yaml of search.over=prediction_scale, or
    # search, the one of this run; null: 1
    prediction_scale: Any = setting(None, "samples search omit_default path")
    eta: float = setting(0.0, "samples search", least=0, most=1)  # ddim: 0 is deterministic, 1 has DDPM's variance
    mixed_precision: str = setting("no", "samples search", choices=PRECISIONS)
    prompts: Any = setting(None, "search text path")  # list, or .txt, .csv, .json, … file; seed i: i-th
    prompt_column: str = setting("prompt", "search text")  # of a csv, jsonl or parquet file
    labels: list[int] | None = setting(None, "samples search omit_default")  # seed i: i-th in turn; null: all in turn
    negative_prompt: str = setting("", "samples search text")  # guidance leads away from it
    guidance_scale: float = setting(7.5, "samples search text", least=0)  # 1: no guidance, half the time
    size_on_disk: int | None = setting(None, "samples search", above=0)  # pixels after shrinking; null: as drawn
    output: str | None = setting(None, "place one_run path")  # null: samples/<model>/ of this run
    overwrite: bool = setting(False, "free")  # replace a folder that another model or other settings made
    blocks: int = setting(1, "free", above=0)  # parts of the seeds, which jobs may draw side by side into one folder
    block: int | None = setting(None, "free one_run", least=0)  # draw only this one, counted from 0; null: all

    def check_together(self) -> None:
        self.check("blocks", self.blocks <= self.num_images, f"more than sample.num_images={self.num_images}")
        self.check("block", (self.block or 0) < self.blocks, f"must be below sample.blocks={self.blocks}")
        alone = self.block is None or not self.overwrite
        self.check("overwrite", alone, "other jobs may be drawing into the folder: with sample.block, delete it first")
        texts = self.prompts if isinstance(self.prompts, list) else [self.prompts or ""]
        self.check("prompts", all(isinstance(text, str) for text in texts), "must be a file or a list of texts")
        self.check("labels", self.labels != [], "must not be empty")
        self.check("eta", self.eta == 0 or self.scheduler in DDIM, "only sample.scheduler=ddim has it")

    @property
    def schedule(self) -> str:
        """The name of sampler and number of steps, such as ddim-50."""
        return f"{DDIM[0] if self.scheduler in DDIM else self.scheduler}-{self.num_inference_steps}"

    @property
    def seeds(self) -> range:
        """The seeds of all images."""
        return range(self.seed_offset, self.seed_offset + self.num_images)

    @property
    def chosen_blocks(self) -> list[range]:
        """The seeds of `block`, or of all blocks."""
        edges = [number * self.num_images // self.blocks for number in range(self.blocks + 1)]
        parts = [self.seeds[start:end] for start, end in pairwise(edges)]
        return parts if self.block is None else [parts[self.block]]


@dataclass(frozen=True)
class Evaluate(Section):
    """What is scored against what."""

    features: Any = setting("inception", "search all_runs")  # classifier: by labels; more in judges.py; or a list
    samples: list[str] | None = setting(None, "one_run path")  # folders of images; null: all in samples/ of this run
    reference: str | None = setting(None, "search all_runs path")  # npz of statistics or image folder; null: the data
    blocks: int = setting(1, "all_runs", above=0)  # equal blocks of images in seed order, for the spread of the score
    batch_size: int = setting(50, "free all_runs", above=0)  # images per pass through the feature network
    classifier_width: int = setting(16, "search all_runs", above=0, most=1024)  # channels; features: 8 times as many
    classifier_epochs: int = setting(40, "search all_runs", above=0)
    classifier_batch_size: int = setting(64, "search all_runs", above=0)  # images per step of its training
    classifier_precision: str = setting("no", "search all_runs", choices=("no", "bf16"))  # of its training
    clip_model: str | None = setting(CLIP_MODEL, "all_runs path")  # folder or Hub id, for samples with prompts
    output: str | None = setting(None, "place one_run path")  # null: results.json of this run

    def check_together(self) -> None:
        given = self.features if isinstance(self.features, list) else [self.features]
        for text in given:
            which = f"{shown(text)} " if isinstance(self.features, list) else ""
            self.check("features", read_judge(text) is not None, f"{which}{one_of(FORMS.values(), text)}")
        self.check("features", 0 < len(given) == len(set(given)), "must be a list of different judges")

    @cached_property
    def judges(self) -> list[Judge]:
        """The networks in whose features samples are scored. A search sees the first one alone."""
        return [read_judge(text) for text in (self.features if isinstance(self.features, list) else [self.features])]


@dataclass(frozen=True)
class Analyze(Section):
    """What is measured beside the scores."""

    analyses: list[str] | None = setting(None, "free", choices=ANALYSES)  # null: all
    timesteps: int = setting(40, "gradient_conflict loss_by_timestep", least=2)  # evenly spread over [0, T)
    images: int = setting(256, "gradient_conflict loss_by_timestep activation_change", above=0)
    batch_size: int = setting(64, "free", above=0)  # images per forward pass
    sketch: int = setting(16_384, "gradient_conflict", above=0)  # dimensions of a block's reduced gradient
    landscape_points: int = setting(21, "landscape", least=2)  # along each side of the plane
    landscape_images: int = setting(256, "landscape", above=0)  # at each point, spread evenly over the timesteps
    landscape_ranges: list[int] | None = setting(None, "landscape")  # two experts; null: lowest and highest range
    output: str | None = setting(None, "place one_run path")  # null: analysis/ of this run

    def check_together(self) -> None:
        self.check("analyses", self.analyses != [], f"must be a list of {', '.join(ANALYSES)}")
        self.check("images", self.images % 2 == 0, "must be even: gradient_conflict compares two halves")
        different = self.landscape_ranges is None or len(self.landscape_ranges) == len(set(self.landscape_ranges)) == 2
        self.check("landscape_ranges", different, "must be two numbers of ranges")
