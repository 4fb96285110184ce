"""Settings of trainings: of pretraining, of finetuning copies, and of the trainings beside them."""

from dataclasses import dataclass
from typing import Any, ClassVar

from deme.config.section import Section, setting

WEIGHTINGS = ("constant", "snr_plus_one", "truncated_snr", "min_snr", "p2")  # of the loss by timestep
CONTINUED = "continued"  # the control: plain training on all timesteps at the ranges' total cost
ANT_UW = "ant_uw"  # the control with learned weights of the timestep ranges
BASELINES = (*WEIGHTINGS[1:], ANT_UW)  # the control with another weighting of the loss: the paper's table 1
DISTILLED = "distilled"  # the merged network, trained to match each range's expert in its range
SELF = "self"  # trained on samples of the pretrained network, to be subtracted
SOUP = "soup"  # copies trained on all timesteps, as many as there are ranges
NEON = "neon"  # the pretrained network minus that task vector, without a search
NAMED_TRAININGS = (CONTINUED, *BASELINES, DISTILLED)  # of one network each, beside the ranges
GRADIENT_PASSES = 3  # forward passes that an image's gradient costs: one forward, and backward twice as much
PRECISIONS = ("no", "fp16", "bf16")
ATTENTION, ALL_LINEAR = TARGETS = ("attention", "all-linear")  # layers that a LoRA changes
PREVIEW_PROMPTS = ["a photograph of an astronaut riding a horse", "a red cube on top of a blue sphere"]
PREVIEW_PROMPTS += ["an oil painting of a lighthouse in a storm", "four cups of coffee on a wooden table"]
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LEAST_WIDTH, LARGEST_WIDTH = 0.01, 0.25  # σ_rel of an average of the weights
EMA_WIDTH = "ema_width"  # what a search calls it
WIDTH_RULE = (
    f"must lie in [{LEAST_WIDTH}, {LARGEST_WIDTH}] and have at most three decimals"  # folders are named after it
)


def is_width(value: float) -> bool:
    """True if a number is the width of an average of the weights."""
    return LEAST_WIDTH <= value <= LARGEST_WIDTH and round(value, 3) == value


@dataclass(frozen=True)
class Training(Section):
    """What pretraining and finetuning share."""

    max_steps: int = setting(1000, "weights", above=0)  # optimizer steps
    max_minutes: float | None = setting(None, "free", above=0)  # then stop at a checkpoint; the same command resumes
    batch_size: int = setting(64, "weights", above=0)  # images per optimizer step, over all processes
    micro_batch_size: int | None = setting(None, "weights", above=0)  # images per forward pass; null: the whole batch
    learning_rate: float = setting(5e-5, "weights", above=0)
    lr_scheduler: str = setting("constant", "weights", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = setting(0, "weights", least=0)  # optimizer steps
    adam_beta1: float = setting(0.95, "weights", least=0, below=1)
    adam_beta2: float = setting(0.999, "weights", least=0, below=1)
    adam_weight_decay: float = setting(1e-6, "weights", least=0)
    adam_epsilon: float = setting(1e-8, "weights", above=0)
    max_grad_norm: float = setting(1.0, "weights", above=0)
    ema_decay: float = setting(0.9999, "weights", least=0, most=1)  # upper bound of the decay
    ema_inv_gamma: float = setting(1.0, "weights", above=0)
    ema_power: float = setting(0.75, "weights", above=0)
    mixed_precision: str = setting("no", "weights", choices=PRECISIONS)
    loss_weighting: str | None = setting(None, "weights omit_default", choices=WEIGHTINGS)  # null: plain MSE
    min_snr_gamma: float = setting(5.0, "weights", only=("loss_weighting", "min_snr"), above=0)
    p2_k: float = setting(1.0, "weights", only=("loss_weighting", "p2"), above=0)
    p2_gamma: float = setting(1.0, "weights", only=("loss_weighting", "p2"), above=0)
    normalize_loss_weighting: bool = setting(True, "weights", only=("loss_weighting", *WEIGHTINGS))  # to a mean of 1
    antithetic: bool = setting(True, "weights omit_default")  # draw timesteps in mirrored pairs
    caption_dropout: float = setting(0.1, "weights examples text", least=0, most=1)  # chance of an empty caption
    # chance of no label, for models that take labels
    label_dropout: float = setting(0.1, "weights examples omit_default", least=0, most=1)
    gradient_checkpointing: bool = setting(False, "free")  # same weights, less memory, up to a third more time
    log_every: int = setting(50, "free", above=0)  # optimizer steps
    log_with: list[str] = setting(["tensorboard"], "free", choices=("tensorboard", "wandb"))  # beside log.jsonl
    checkpoint_every: int = setting(5000, "free", above=0)  # optimizer steps
    checkpoints_kept: int = setting(2, "free", above=0)
    preview_every: int | None = setting(None, "free", above=0)  # optimizer steps; null: no previews
    preview_prompts: list[str] = setting(PREVIEW_PROMPTS, "free text")  # text-to-image: one image each
    snapshot_every: int | None = setting(None, "free omit_default", above=0)  # steps; null: keep no EMA weights of them

    def check_together(self) -> None:
        self.check("preview_prompts", len(self.preview_prompts) > 0, "must not be empty")
        warms_up = self.lr_scheduler != "constant" or self.lr_warmup_steps == 0
        self.check("lr_warmup_steps", warms_up, f"{self.section}.lr_scheduler=constant has no warm-up")
        above_end = self.lr_scheduler != "polynomial" or self.learning_rate > 1e-7
        self.check("learning_rate", above_end, "the polynomial schedule ends at 1e-07")
        size = self.micro_batch_size or self.batch_size
        rule = f"must be a multiple of {self.section}.micro_batch_size={size}"
        self.check("batch_size", self.batch_size % size == 0, rule)

    def check_shares(self, processes: int) -> None:
        """Check that this many processes can share the micro-batches of a training step equally."""
        size = self.micro_batch_size or self.batch_size
        share, rest = divmod(self.batch_size, processes)
        remedy = f"a batch_size that is a multiple of {processes}" if rest else f"micro_batch_size={share} or a divisor"
        rule = f"{self.section}.batch_size={self.batch_size} makes {self.batch_size // size} micro-batches of {size}, "
        rule += f"which {processes} processes can't share equally: set {remedy}"
        self.check("micro_batch_size", self.batch_size // size % processes == 0, rule)


@dataclass(frozen=True)
class Pretrain(Training):
    """Training a network from nothing."""

    held_out_every: int = setting(1000, "weights", above=0)  # optimizer steps between measurements of the held-out loss
    patience: int | None = setting(None, "weights", above=0)  # stop after so many without a fall by 0.1 % in a row
    encoders: str | None = setting(None, "weights text path")  # pipeline with a text-to-image model's VAE, text encoder
    unet: dict[str, Any] = setting({}, "weights")  # arguments of UNet2DModel, or with encoders of UNet2DConditionModel
    transformer: dict[str, Any] = setting({}, "weights omit_default")  # of DiTTransformer2DModel, in place of a UNet
    # arguments of diffusers' DDPMScheduler, or with _class_name: FlowMatchEulerDiscreteScheduler of that
    scheduler: dict[str, Any] = setting({}, "weights")

    def check_together(self) -> None:
        super().check_together()
        alone = not self.transformer or (not self.unet and self.encoders is None)
        self.check("transformer", alone, "works on pixels in place of a UNet: needs no pretrain.unet, no encoders")


@dataclass(frozen=True)
class Finetune(Training):
    """Training the copy of a range, the control or a baseline."""

    range: int | str | None = setting(None, "weights all_runs")  # null: each; 0, …: one; NAMED_TRAININGS; self; soup
    global_probability: float = setting(0.3, "weights", least=0, most=1)  # p: of a micro-batch from all timesteps
    consistency_weight: float = setting(1.0, "weights", least=0)  # λ
    uncertainty_learning_rate: float = setting(0.025, "weights", only=("range", ANT_UW), above=0)  # of its weights
    ema_profiles: list[float] = setting([], "weights omit_default")  # widths of more averages, which snapshots hold
    lora_rank: int | None = setting(None, "weights omit_default", above=0)  # train a LoRA; null: all weights
    lora_alpha: float | None = setting(None, "weights omit_default", above=0)  # it is scaled by alpha / rank; null: 1
    # layers that it changes: attention, all-linear, or name patterns such as ["*.to_q", "*.conv1"]
    lora_targets: Any = setting(ATTENTION, "weights omit_default")
    base_precision: str | None = setting(None, "weights omit_default", choices=PRECISIONS[1:])  # of the frozen weights

    def check_together(self) -> None:
        super().check_together()
        for key in ("lora_alpha", "lora_targets", "base_precision"):
            is_usual = getattr(self, key) == getattr(type(self), key, None)
            self.check(key, is_usual or self.lora_rank is not None, "needs finetune.lora_rank")
        targets, rule = self.lora_targets, f"must be {', '.join(TARGETS)}, or a list of name patterns of layers"
        are_patterns = isinstance(targets, list) and targets != [] and all(isinstance(one, str) for one in targets)
        self.check("lora_targets", are_patterns or targets in TARGETS, rule)
        rule = f"finetune.mixed_precision={self.mixed_precision} must be the same"
        self.check("base_precision", self.base_precision in (None, self.mixed_precision), rule)
        rule = "keeps whole networks, which needs finetune.lora_rank=null"
        self.check("snapshot_every", self.lora_rank is None or self.snapshot_every is None, rule)
        widths = self.ema_profiles
        self.check("ema_profiles", all(map(is_width, widths)), f"each {WIDTH_RULE}")
        self.check("ema_profiles", len(set(widths)) == len(widths) != 1, "must be different widths, at least two")
        kept = not widths or self.snapshot_every is not None
        self.check("ema_profiles", kept, f"needs {self.section}.snapshot_every")

    @property
    def gradient_passes(self) -> int:
        """Forward passes that an image's gradient costs: backward costs twice as much, for frozen weights as much."""
        return GRADIENT_PASSES if self.lora_rank is None else GRADIENT_PASSES - 1


@dataclass(frozen=True)
class Distill(Section):
    """Training the merged network to match the experts, which the paper does not do; all else is as in `finetune`."""

    max_steps: int = setting(1000, "weights", above=0)  # optimizer steps


@dataclass(frozen=True)
class SelfTraining(Section):
    """Training on the pretrained network's own samples (finetune.range=self); all else is as in `finetune`."""

    section: ClassVar[str] = "self_training"
    ranges: bool = setting(False, "weights merged")  # one for each timestep range, not one for all
    num_images: int = setting(6000, "weights", above=0)  # drawn from the pretrained network
    num_inference_steps: int | None = setting(None, "weights", above=0)  # null: as `sample`
    seed_offset: int = setting(20_000_000, "weights", least=0, below=2**63)  # first seed; other images have others
