"""Every setting with its unit or bounds, in the sections of a configuration file.

`__post_init__` checks values; every mistake is a `UserError` of one line that names the key and its value. Nothing here
imports torch, so that a mistake is answered at once.
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Optional, Union

from deme.config.section import Section

HUB_ID = r"[\w-][\w.-]*/[\w.-]+"  # owner/name
CLIP_MODEL = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"  # that of the paper's text-to-image scores
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
MERGE_METHODS = tuple(sorted(file.stem for file in Path(__file__).parents[1].glob("method/merging/[!_]*.py")))
WEIGHTINGS = ("constant", "snr_plus_one", "truncated_snr", "min_snr", "p2")  # of the loss by timestep
# what `finetune.range` takes beside a range
CONTINUED = "continued"  # the control: plain training on all timesteps at the ranges' total cost
ANT_UW = "ant_uw"  # the same with learned weights of the timestep ranges
BASELINES = (*WEIGHTINGS[1:], ANT_UW)  # the control with another weighting of the loss: the paper's table 1
DISTILLED = "distilled"  # the merged network, trained to match each range's expert in its range
NAMED_TRAININGS = (CONTINUED, *BASELINES, DISTILLED)
REPORT_BLOCKS = 5  # of the images of a search's report, where evaluate.blocks=1 gives no standard error
# of analyze.py
ANALYSES = ("gradient_conflict", "loss_by_timestep", "task_vectors", "landscape", "activation_change")
LEAST_CLASSIFIED = 8  # pixels: the classifier halves an image three times
PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("tensorboard", "wandb")
PREVIEW_PROMPTS = (  # for text-to-image models, of the things that they find hard
    "a photograph of an astronaut riding a horse",
    "a red cube on top of a blue sphere",
    "an oil painting of a lighthouse in a storm",
    "four cups of coffee on a wooden table",
)
GRADIENT_PASSES = 3  # through a network, that the gradient of an image costs: forward, and backward for twice as much
# of the data, what determines the images that a network sees, beside what the data's fingerprint tells
EXAMPLE_KEYS = ("resolution", "center_crop", "random_flip", "held_out_images", "cache_latents", "cached_views")
POLYNOMIAL_END = 1e-7  # the learning rate that diffusers' polynomial schedule ends at
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True)
class Model(Section):
    """What is finetuned."""

    section: ClassVar[str] = "model"
    path_keys: ClassVar[tuple[str, ...]] = ("pretrained",)
    pretrained: Optional[str] = None  # pipeline folder or Hub id; null: what pretrain.py made in this run
    license: Optional[str] = None  # of the pretrained weights, for the merged network's card; null: not stated
    projection: bool = True  # finetune with channel-wise projections


@dataclass(frozen=True)
class Data(Section):
    """Which images, and how they become squares."""

    section: ClassVar[str] = "data"
    path_keys: ClassVar[tuple[str, ...]] = ("name",)
    name: str = "digits"  # digits (embedded), a Hub id, or a local folder of images or of tables
    split: str = "train"
    image_column: str = "image"
    label_column: Optional[str] = "label"  # null: no labels
    caption_column: Optional[str] = None  # of texts, or lists of texts of which each step draws one; null: no captions;
    # sidecar: of an image folder, the lines of NAME.txt beside NAME.png
    resolution: int = 8  # pixels; the shorter side is resized to it, then a square is cropped
    center_crop: bool = False  # in training; evaluation always crops the centre
    random_flip: bool = False  # horizontal, in training; evaluation never flips
    held_out_images: int = 0  # that no training sees: pretrain.py measures its loss on them
    skip_uncaptioned: bool = False  # leave images without a caption out instead of stopping
    skip_unreadable: bool = False  # leave images that can't be decoded out instead of stopping
    cache_gb: float = 4.0  # GiB of decoded images that each process holds in memory; more are mapped from a file
    cache_disk_gb: float = 100.0  # GiB of that file; more are decoded on the fly, each time they are needed
    cache_latents: bool = False  # text-to-image: encode images and captions once, into a folder all runs share
    cached_views: int = 1  # crops and flips of each image that are encoded

    def __post_init__(self):
        self.check_positive("cached_views")
        one_view = not self.cache_latents or self.cached_views > 1 or (self.center_crop and not self.random_flip)
        rule = "one view needs data.center_crop=true and data.random_flip=false; data.cached_views sets another number"
        self.check("cache_latents", one_view, rule)
        differ = self.cached_views == 1 or not self.center_crop or self.random_flip
        self.check("cached_views", differ, "data.center_crop=true and data.random_flip=false make them all the same")
        whole = self.held_out_images == 0 or not self.cache_latents or self.cached_views == 1
        self.check("held_out_images", whole, "are centre crops, which data.cached_views above 1 does not keep")
        self.check_positive("resolution")
        self.check("resolution", self.resolution <= 2**16, f"must be at most {2**16:,}")
        self.check_not_negative("held_out_images", "cache_gb", "cache_disk_gb")


@dataclass(frozen=True)
class Timesteps(Section):
    """The ranges that are decoupled."""

    section: ClassVar[str] = "timesteps"
    num_train_timesteps: int = 1000  # T; must equal the pretrained scheduler's
    num_ranges: int = 4  # N equal ranges, unless edges are given
    edges: Optional[list[int]] = None  # rising from 0 to T: range k is [edges[k], edges[k + 1])

    def __post_init__(self):
        self.check_positive("num_train_timesteps")
        total = self.num_train_timesteps
        self.check("num_ranges", 1 <= self.num_ranges <= total, f"must lie in [1, {total}]")
        if self.edges is not None:
            ends = len(self.edges) >= 2 and self.edges[0] == 0 and self.edges[-1] == total
            rises = all(low < high for low, high in pairwise(self.edges))
            self.check("edges", ends and rises, f"must rise from 0 to T = {total}")

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The half-open ranges [low, high), lowest first."""
        edges = self.edges
        if edges is None:
            edges = [k * self.num_train_timesteps // self.num_ranges for k in range(self.num_ranges + 1)]
        return list(pairwise(edges))


@dataclass(frozen=True)
class Training(Section):
    """What pretraining and finetuning share."""

    max_steps: int = 1000  # optimizer steps
    max_minutes: Optional[float] = None  # stop with a checkpoint after this time; the same command resumes
    batch_size: int = 64  # images per optimizer step, over all processes
    micro_batch_size: Optional[int] = None  # images per forward pass; null: the whole batch
    learning_rate: float = 5e-5
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0  # optimizer steps
    adam_beta1: float = 0.95
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-6
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999  # upper bound of the decay
    ema_inv_gamma: float = 1.0
    ema_power: float = 0.75
    mixed_precision: str = "no"  # no, fp16 or bf16
    loss_weighting: Optional[str] = None  # one of WEIGHTINGS; null: the mean squared error of what is predicted
    min_snr_gamma: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    normalize_loss_weighting: bool = True  # divide the weights by their mean over all timesteps
    antithetic: bool = True  # draw timesteps in mirrored pairs
    caption_dropout: float = 0.1  # probability that an image's caption is empty, for classifier-free guidance
    gradient_checkpointing: bool = False  # less memory for up to a third more time; the weights are the same
    log_every: int = 50  # optimizer steps
    log_with: list[str] = field(default_factory=lambda: ["tensorboard"])  # beside log.jsonl; of TRACKERS
    checkpoint_every: int = 5000  # optimizer steps
    checkpoints_kept: int = 2
    preview_every: Optional[int] = None  # optimizer steps; null: no previews
    preview_prompts: list[str] = field(default_factory=lambda: list(PREVIEW_PROMPTS))  # text-to-image: an image each

    def __post_init__(self):
        self.check_positive("max_steps", "max_minutes", "batch_size", "micro_batch_size", "learning_rate")
        self.check_positive("adam_epsilon", "max_grad_norm", "ema_inv_gamma", "ema_power")
        self.check_positive("log_every", "checkpoint_every", "checkpoints_kept", "preview_every")
        self.check_positive("min_snr_gamma", "p2_k", "p2_gamma")
        self.check_not_negative("lr_warmup_steps", "adam_weight_decay")
        self.check_fraction("ema_decay", "adam_beta1", "adam_beta2", "caption_dropout")
        self.check("adam_beta1", self.adam_beta1 < 1, "must be below 1")
        self.check("adam_beta2", self.adam_beta2 < 1, "must be below 1")
        self.check("preview_prompts", len(self.preview_prompts) > 0, "must not be empty")
        self.check_choice("mixed_precision", PRECISIONS)
        self.check("log_with", set(self.log_with) <= set(TRACKERS), f"must be a list of {', '.join(TRACKERS)}")
        self.check_choice("lr_scheduler", LR_SCHEDULERS)
        if self.loss_weighting is not None:
            self.check_choice("loss_weighting", WEIGHTINGS)
        warms_up = self.lr_scheduler != "constant" or self.lr_warmup_steps == 0
        self.check("lr_warmup_steps", warms_up, f"{self.section}.lr_scheduler=constant has no warm-up")
        above_end = self.lr_scheduler != "polynomial" or self.learning_rate > POLYNOMIAL_END
        self.check("learning_rate", above_end, f"the polynomial schedule ends at {POLYNOMIAL_END}")
        whole = self.micro_batch_size is None or self.batch_size % self.micro_batch_size == 0
        self.check(
            "batch_size", whole, f"must be a multiple of {self.section}.micro_batch_size={self.micro_batch_size}"
        )

    def check_shares(self, processes: int) -> None:
        """Make sure that so many processes can share the micro-batches of a step equally."""
        size = self.micro_batch_size or self.batch_size
        micro_batches = self.batch_size // size
        share, rest = divmod(self.batch_size, processes)
        remedy = f"a batch_size that is a multiple of {processes}" if rest else f"micro_batch_size={share} or a divisor"
        self.check(
            "micro_batch_size",
            micro_batches % processes == 0,
            f"{self.section}.batch_size={self.batch_size} makes {micro_batches} micro-batches of {size}, which "
            f"{processes} processes can't share equally: set {remedy}",
        )


@dataclass(frozen=True)
class Pretrain(Training):
    """Training a network from nothing."""

    section: ClassVar[str] = "pretrain"
    path_keys: ClassVar[tuple[str, ...]] = ("encoders",)
    held_out_every: int = 1000  # optimizer steps between two measurements of the held-out loss
    patience: Optional[int] = None  # stop once so many of them in a row did not fall by 0.1 %; null: max_steps
    encoders: Optional[str] = None  # pipeline folder whose VAE and text encoder a text-to-image model works with
    unet: dict[str, Any] = field(default_factory=dict)  # arguments of UNet2DModel, with encoders UNet2DConditionModel
    scheduler: dict[str, Any] = field(default_factory=dict)  # arguments of diffusers' DDPMScheduler

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("held_out_every", "patience")


@dataclass(frozen=True)
class Finetune(Training):
    """Training the copy of a range, the control or a baseline."""

    section: ClassVar[str] = "finetune"
    range: Union[int, str, None] = None  # null: every range in turn; 0, 1, …: that one; or one of NAMED_TRAININGS
    global_probability: float = 0.3  # p: chance that a micro-batch draws its timesteps from all of [0, T)
    consistency_weight: float = 1.0  # λ
    uncertainty_learning_rate: float = 0.025  # of ant_uw's weights, which follow lr_scheduler too

    def __post_init__(self):
        super().__post_init__()
        self.check_positive("uncertainty_learning_rate")
        self.check_fraction("global_probability")
        self.check_not_negative("consistency_weight")


@dataclass(frozen=True)
class Distill(Section):
    """Training the merged network to match the experts (ours, not the paper's); all else is as in `finetune`."""

    section: ClassVar[str] = "distill"
    max_steps: int = 1000  # optimizer steps

    def __post_init__(self):
        self.check_positive("max_steps")


@dataclass(frozen=True)
class Merge(Section):
    """What is merged, how, and into what."""

    section: ClassVar[str] = "merge"
    path_keys: ClassVar[tuple[str, ...]] = ("coefficients", "finetuned", "output")
    method: str = "task_arithmetic"  # one of MERGE_METHODS
    settings: dict[str, Any] = field(default_factory=dict)  # of the method: the fields of its class
    # w, one per range, lowest range first; null: 1/N each; or name pattern -> such a list, the first pattern that fits
    # a tensor counts: {"down_blocks.*": [...], "mid_block.*": [...], "up_blocks.*": [...], "*": [...]}; or a file that
    # search.py wrote; search: that of this run
    coefficients: Any = None
    finetuned: Optional[str] = None  # folder that holds 0000-0250/ …; null: this run's
    output: Optional[str] = None  # null: merged/ of this run
    push_to_hub: Optional[str] = None  # also upload the merged folder to this Hub id, owner/name
    push_private: bool = False  # make the Hub's repository private; one that is public already is refused

    def __post_init__(self):
        self.check_choice("method", MERGE_METHODS)
        named = self.push_to_hub is None or re.fullmatch(HUB_ID, self.push_to_hub) is not None
        self.check("push_to_hub", named, "must be a Hub id, owner/name")
        rule = "must be a list of finite numbers, a mapping from name patterns to such lists, or a file of search.py"
        if isinstance(self.coefficients, str):
            self.check("coefficients", self.coefficients != "", rule)
            return
        lists = self.coefficients.values() if isinstance(self.coefficients, dict) else [self.coefficients]
        for coefficients in lists if self.coefficients is not None else ():
            fits = isinstance(coefficients, list) and all(_is_finite_number(w) for w in coefficients)
            self.check("coefficients", fits, rule)
        named = not isinstance(self.coefficients, dict) or all(isinstance(key, str) for key in self.coefficients)
        self.check("coefficients", self.coefficients != {} and named, rule)


@dataclass(frozen=True)
class Search(Section):
    """How the merging coefficients are found."""

    section: ClassVar[str] = "search"
    path_keys: ClassVar[tuple[str, ...]] = ("output",)
    method: str = "multi_fidelity"  # or closed_form, gradient, optuna
    objective: str = "match"  # or loss, or for optuna alone fd; multi_fidelity starts from it and ends with fd
    # which tensors share a coefficient: range (all), block, tensor, or a list of name patterns as in merge.coefficients
    groups: Any = "range"
    bounds: Optional[list[float]] = None  # least and greatest coefficient; null: [0, 1.5], for groups=tensor [-1, 2]
    images: int = 512  # of match and loss, from those that training sees
    batch_size: int = 64  # images per forward pass of these
    ridge: float = 1e-3  # closed_form: pull to 0, relative to the mean curvature
    gauss_newton: int = 2  # closed_form: how often it is repeated around its solution
    gradient_steps: int = 400  # Adam's
    gradient_learning_rate: float = 0.05
    gradient_patience: int = 5  # stop once so many measurements on held-out images in a row found nothing better
    pull: float = 1e-3  # gradient: weight of the mean squared distance to where it starts, the closed form
    sampler: str = "gp"  # optuna, multi_fidelity: tpe, gp, random or grid
    trials: int = 32  # optuna, multi_fidelity: candidates that are tried
    num_images: int = 1000  # fd: drawn from each candidate
    control_images: int = 10_000  # fd: of the pretrained network, with which fewer of a candidate tell as much
    num_inference_steps: Optional[int] = None  # fd; null: sample's, as what is found with few may not hold with many
    seed_offset: int = 10_000_000  # fd: the first of its seeds, which no other images may have
    finalists: int = 4  # multi_fidelity: the best few, which are scored on finalist_images
    finalist_images: int = 4000
    report_images: int = 5000  # of each model in the final report, on seeds that no candidate saw; 0: no report
    storage: Optional[str] = None  # URL of an Optuna storage; null: study.db of this search
    output: Optional[str] = None  # null: search/ of this run

    def __post_init__(self):
        self.check_choice("method", ("closed_form", "gradient", "optuna", "multi_fidelity"))
        self.check_choice("objective", ("match", "loss", "fd"))
        self.check_choice("sampler", ("tpe", "gp", "random", "grid"))
        cheap = self.objective != "fd" or self.method == "optuna"
        self.check("objective", cheap, f"search.method={self.method} needs match or loss")
        lists = isinstance(self.groups, list) and len(self.groups) > 0 and all(isinstance(g, str) for g in self.groups)
        named = self.groups in ("range", "block", "tensor") or lists
        self.check("groups", named, "must be range, block, tensor, or a list of name patterns")
        rule = "must be two finite numbers, the least and the greatest"
        pair = self.bounds is None or (len(self.bounds) == 2 and all(map(_is_finite_number, self.bounds)))
        self.check("bounds", pair and (self.bounds is None or self.bounds[0] < self.bounds[1]), rule)
        low, high = self.interval
        self.check("bounds", low <= 0 <= high, "must hold 0, the pretrained network, where the search starts")
        self.check_positive("images", "batch_size", "gradient_steps", "gradient_learning_rate", "gradient_patience")
        self.check_positive("trials", "num_images", "num_inference_steps", "finalists", "finalist_images")
        self.check_positive("control_images")
        self.check_not_negative("ridge", "gauss_newton", "pull", "report_images")
        self.check("num_images", self.num_images > 1, "a covariance needs at least 2")
        rule = f"must be at most search.control_images={self.control_images}"
        self.check("num_images", self.num_images <= self.control_images, rule)
        if self.method == "multi_fidelity":
            ordered = self.num_images <= self.finalist_images <= self.control_images
            rule = f"must lie between search.num_images={self.num_images} and control_images={self.control_images}"
            self.check("finalist_images", ordered, rule)
            self.check("finalists", self.finalists <= self.trials, f"must be at most search.trials={self.trials}")
        self.check_seed("seed_offset")
        self.check("storage", self.storage != "", "must be an URL, or null")

    @property
    def interval(self) -> tuple[float, float]:
        """The least and the greatest coefficient."""
        if self.bounds is not None:
            return self.bounds[0], self.bounds[1]
        return (-1.0, 2.0) if self.groups == "tensor" else (0.0, 1.5)


@dataclass(frozen=True)
class Sample(Section):
    """Which images are drawn from what."""

    section: ClassVar[str] = "sample"
    path_keys: ClassVar[tuple[str, ...]] = ("model", "prompts", "output")
    model: str = "merged"  # merged, pretrained, continued, ensemble, distilled, or a folder
    num_images: int = 1000
    seed_offset: int = 0  # the images' seeds, and names, are seed_offset … seed_offset + num_images - 1
    batch_size: int = 256  # images per UNet call; does not change the images. On a CPU 16 to 32 for large networks
    num_inference_steps: int = 50
    scheduler: str = "ddim"  # ddim, pndm, dpmsolver++, unipc, euler, or a class of diffusers' that fits the schedule
    # leading, trailing or linspace; null: the pretrained schedule's, where it names none ddim's is leading
    timestep_spacing: Optional[str] = None
    eta: float = 0.0  # of ddim: 0 is deterministic, 1 has DDPM's variance
    mixed_precision: str = "no"  # no, fp16 or bf16: on a CPU that has it 1.6 times as fast for large networks
    prompts: Any = None  # text-to-image: a list, or a file: .txt, .csv, .json, .parquet … Seed i is drawn from the i-th
    prompt_column: str = "prompt"  # of a csv, jsonl or parquet file
    negative_prompt: str = ""  # what guidance leads away from
    guidance_scale: float = 7.5  # of classifier-free guidance; 1: none, in half the time
    size_on_disk: Optional[int] = None  # pixels that the images are shrunk to; null: as drawn
    output: Optional[str] = None  # null: samples/<model>/ of this run
    overwrite: bool = False  # replace a folder that another model or other settings made
    blocks: int = 1  # parts of the seeds, each of which a job may draw beside the others, into the same folder
    block: Optional[int] = None  # draw this one alone, counted from 0; null: all of them

    def __post_init__(self):
        self.check_positive("num_images", "batch_size", "num_inference_steps", "size_on_disk", "blocks")
        self.check("blocks", self.blocks <= self.num_images, f"more than sample.num_images={self.num_images}")
        self.check("block", self.block is None or 0 <= self.block < self.blocks, f"must lie in [0, {self.blocks})")
        alone = self.block is None or not self.overwrite
        self.check("overwrite", alone, "other jobs may be drawing into the folder: with sample.block, delete it first")
        self.check_not_negative("guidance_scale")
        texts = self.prompts if isinstance(self.prompts, list) else [self.prompts]
        are_texts = self.prompts is None or all(isinstance(text, str) for text in texts)
        self.check("prompts", are_texts, "must be a file or a list of texts")
        self.check_seed("seed_offset")
        self.check_fraction("eta")
        self.check("eta", self.eta == 0 or self.is_ddim, "only sample.scheduler=ddim has it")
        if self.timestep_spacing is not None:
            self.check_choice("timestep_spacing", ("leading", "trailing", "linspace"))
        self.check_choice("mixed_precision", PRECISIONS)
        self.check("model", self.model != "", "must name a model")

    @property
    def is_ddim(self) -> bool:
        """Whether the sampler is DDIM, by either name."""
        return self.scheduler in ("ddim", "DDIMScheduler")

    @property
    def seeds(self) -> range:
        """Those of all images."""
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

    section: ClassVar[str] = "evaluate"
    path_keys: ClassVar[tuple[str, ...]] = ("samples", "reference", "clip_model", "output")
    features: str = "inception"  # inception (FID) or classifier (classifier FD; the data needs labels)
    samples: Optional[list[str]] = None  # folders of images; null: every folder in samples/ of this run
    reference: Optional[str] = None  # npz of statistics or folder of images; null: made from the configured data
    blocks: int = 1  # equal blocks of images in seed order, for the spread of the score
    batch_size: int = 50  # images per pass through the feature network
    classifier_width: int = 16  # channels before its first stage; its features are 8 times as many
    classifier_epochs: int = 40
    classifier_batch_size: int = 64  # images per step of its training
    classifier_precision: str = "no"  # no or bf16, in its training
    clip_model: Optional[str] = CLIP_MODEL  # folder or Hub id, for the CLIP score of samples with prompts; null: none
    output: Optional[str] = None  # null: results.json of this run

    def __post_init__(self):
        self.check_choice("features", ("inception", "classifier"))
        self.check_choice("classifier_precision", ("no", "bf16"))
        self.check_positive("blocks", "batch_size", "classifier_width", "classifier_epochs", "classifier_batch_size")
        self.check("classifier_width", self.classifier_width <= 1024, "must be at most 1024")
        self.check("clip_model", self.clip_model != "", "must name a CLIP model, or be null")


@dataclass(frozen=True)
class Analyze(Section):
    """What is looked at beside the scores."""

    section: ClassVar[str] = "analyze"
    path_keys: ClassVar[tuple[str, ...]] = ("output",)
    analyses: Optional[list[str]] = None  # which of ANALYSES; null: all
    timesteps: int = 40  # evenly spread over [0, T): gradient_conflict, loss_by_timestep
    images: int = 256  # of each of these timesteps; of each range: activation_change
    batch_size: int = 64  # images per forward pass
    sketch: int = 16_384  # dimensions that the gradient of each block is reduced to: gradient_conflict
    landscape_points: int = 21  # along each side of the plane
    landscape_images: int = 256  # at each point of it, spread evenly over the timesteps
    landscape_ranges: Optional[list[int]] = None  # the two experts that span it; null: lowest and highest range
    output: Optional[str] = None  # null: analysis/ of this run

    def __post_init__(self):
        rule = f"must be a list of {', '.join(ANALYSES)}"
        known = self.analyses is None or (len(self.analyses) > 0 and set(self.analyses) <= set(ANALYSES))
        self.check("analyses", known, rule)
        self.check_positive("timesteps", "images", "batch_size", "sketch", "landscape_points", "landscape_images")
        self.check("timesteps", self.timesteps > 1, "a pair needs at least 2")
        self.check("images", self.images % 2 == 0, "must be even: gradient_conflict compares two halves")
        self.check("landscape_points", self.landscape_points > 1, "contours need at least 2")
        given = self.landscape_ranges
        two = given is None or (len(given) == 2 and given[0] != given[1])
        self.check("landscape_ranges", two, "must be two numbers of ranges")
        self.check("output", self.output != "", "must be a folder, or null")

    @property
    def chosen(self) -> list[str]:
        """The analyses, each once, in their order."""
        return [name for name in ANALYSES if self.analyses is None or name in self.analyses]


def _is_finite_number(value: object) -> bool:
    """Finite in float32, the type that weights are summed in."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def range_name(timestep_range: tuple[int, int]) -> str:
    """A range's folder name: (0, 250) gives 0000-0250."""
    return "{:04d}-{:04d}".format(*timestep_range)
