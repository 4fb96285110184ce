"""Decouple: finetune one copy of the pretrained UNet per timestep range.

    accelerate launch finetune.py                            # every range in turn
    accelerate launch finetune.py finetune.range=2           # one, counted from 0: a cluster runs them in parallel
    accelerate launch finetune.py finetune.range=continued   # the control: plain training on all timesteps, equal cost
    accelerate launch finetune.py finetune.range=min_snr     # a baseline: the control with another weighting of the
                                                             # loss; or snr_plus_one, truncated_snr, p2, ant_uw
    accelerate launch finetune.py finetune.range=distilled   # after merge.py: the merged network, held to all experts

Writes runs/<name>/finetuned/0000-0250/unet/ and so on (EMA weights); checkpoints, logs and previews lie beside it.
The same command again resumes, or does nothing when all is done. The last one is ours, not the paper's.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.sections import ANT_UW, BASELINES, CONTINUED, DISTILLED, Finetune, range_name
from deme.errors import UserError, naming
from deme.job.command import run_script
from deme.job.files import sha256
from deme.job.records import ARCHITECTURE
from deme.models.inputs import Inputs
from deme.models.variants import find_finetuned, find_variant
from deme.models.weights import weights_hash
from deme.training.session import Run, Session

if TYPE_CHECKING:
    from deme.data.images import Examples
    from deme.training.trainer import Networks

PRETRAINED, MERGED = "pretrained", "merged"  # models to start from, as sample.model names them


@dataclass(frozen=True)
class Task:
    """One network that this command trains."""

    name: str  # of its folder below finetuned/
    stream: tuple[int, ...]  # of its random draws; (seed, 0) is that of pretrain.py, (seed, 3) that of search.py
    settings: Finetune
    ranges: list[tuple[int, int]]  # of timesteps; each micro-batch is spread evenly over them
    is_projected: bool
    start: str = PRETRAINED  # the model that it starts from
    is_held_to_experts: bool = False  # each part of a micro-batch to that of its range, and to nothing else
    uncertainty_learning_rate: float | None = None  # of learned weights of the ranges; None: there are none
    names: dict[str, str] = field(default_factory=dict)  # of settings that do not come from `finetune`


def expert(config: Config, timestep_range: tuple[int, int]) -> Task:
    """The copy of one timestep range, held to the pretrained network."""
    stream = (config.seed, 2, *timestep_range)
    return Task(range_name(timestep_range), stream, config.finetune, [timestep_range], config.model.projection)


def control(config: Config, name: str = CONTINUED) -> Task:
    """The control, or a baseline: training on all timesteps without a teacher, at the cost of all ranges together.

    All of them see the same images, and but for ANT-UW, whose timesteps are spread over the ranges, the same timesteps
    and noise.
    """
    steps = len(config.timesteps.ranges) * config.finetune.max_steps
    settings = replace(config.finetune, max_steps=steps, global_probability=1.0, consistency_weight=0.0)
    task = Task(name, (config.seed, 1), settings, [(0, config.timesteps.num_train_timesteps)], is_projected=False)
    if name == ANT_UW:
        return replace(
            task,
            settings=replace(settings, global_probability=0.0, loss_weighting=None),
            ranges=config.timesteps.ranges,
            uncertainty_learning_rate=config.finetune.uncertainty_learning_rate,
        )
    return task if name == CONTINUED else replace(task, settings=replace(settings, loss_weighting=name))


def distillation(config: Config) -> Task:
    """The merged network, held to each range's expert in its range: ours, a step beyond the paper."""
    steps = config.distill.max_steps
    return Task(
        DISTILLED,
        (config.seed, 4),
        replace(config.finetune, max_steps=steps, global_probability=0.0, consistency_weight=1.0, loss_weighting=None),
        config.timesteps.ranges,
        config.model.projection,
        start=MERGED,
        is_held_to_experts=True,
        names={"finetune.max_steps": "distill.max_steps"},
    )


def chosen_tasks(config: Config) -> list[Task]:
    """What this command trains; all of them start from the same network."""
    chosen = config.finetune.range
    ranges = config.timesteps.ranges
    if chosen in (CONTINUED, *BASELINES):
        return [control(config, chosen)]
    if chosen == DISTILLED:
        return [distillation(config)]
    return [expert(config, timestep_range) for timestep_range in (ranges if chosen is None else [ranges[chosen]])]


def source_of(task: Task, config: Config) -> tuple[str, str]:
    """The pipeline that a task starts from, behind the key that names it."""
    if task.start == MERGED:
        return "merge.output", str(config.paths.merged)
    return "model.pretrained", config.paths.pretrained


def run_of(session: Session, task: Task, hashes: dict[str, str]) -> Run:
    """The run of a task, and everything that determines its weights.

    Args:
        hashes: of what it starts from and is held to.
    """
    folder = session.config.paths.finetuning(task.name)
    others = {"finetune.range": task.name, "model.projection": task.is_projected, **hashes}
    if task.uncertainty_learning_rate is not None:
        others["finetune.uncertainty_learning_rate"] = task.uncertainty_learning_rate
        others["timestep ranges"] = [list(edges) for edges in task.ranges]
    return session.run(folder, folder / "unet", task.settings, others, task.names)


def plan(config: Config) -> str:
    """What this command would do."""
    lines = []
    for task in chosen_tasks(config):
        unet = config.paths.finetuning(task.name) / "unet"
        state = "complete" if unet.exists() else f"{task.settings.max_steps} steps"
        lines.append(f"finetune {source_of(task, config)[1]}: {task.name} -> {unet}: {state}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Finetune what is not finetuned yet."""
    # --- what is left to do
    session = Session(config, config.finetune)
    tasks = chosen_tasks(config)
    first = tasks[0]
    start = find_variant(first.start, config.paths)
    pipeline, folder = start.pipeline, start.unets[0]
    experts = {}
    if first.is_held_to_experts:
        experts = dict(zip(map(range_name, first.ranges), find_finetuned(config.paths), strict=True))
    unets = {first.start: folder, **experts}
    inputs = Inputs(pipeline, list(unets.values()))
    inputs.check_fits(config)
    watched = inputs.watched(*(unet / "config.json" for unet in inputs.unets))
    hashes = {
        **{f"{name} weights (SHA-256)": weights_hash(unet) for name, unet in unets.items()},
        ARCHITECTURE: sha256(folder / "config.json"),
        **inputs.hashes(),
    }
    runs = [(task, run_of(session, task, hashes)) for task in tasks]
    runs = [(task, run) for task, run in runs if not session.is_complete(run)]
    if not runs:
        return

    # --- torch is imported after what can be answered without it
    import gc

    from deme.data.examples import load_examples
    from deme.job.processes import make_accelerator
    from deme.method.distillation import Experts
    from deme.models.encoders import load_encoder
    from deme.models.networks import load_scheduler, load_unet, try_out
    from deme.training.trainer import Networks

    # --- the networks and the images
    accelerator = make_accelerator(config.finetune.mixed_precision, "finetune.mixed_precision")
    config.finetune.check_shares(accelerator.num_processes)
    key, source = source_of(first, config)
    with naming(key, source):
        unet = load_unet(folder)
        scheduler = load_scheduler(pipeline)
        encoder = load_encoder(pipeline, unet)
        try_out(unet, scheduler, encoder)
    teachers = [load_unet(path) for path in experts.values()]
    for path, teacher in zip(experts.values(), teachers, strict=True):
        with naming(path):
            try_out(teacher, scheduler, encoder)
            channels = teacher.config.in_channels
            if channels != unet.config.in_channels:
                raise UserError(f"in_channels={channels}: {folder} has {unet.config.in_channels}")
    loaded = Networks(unet, Experts(teachers) if teachers else None, scheduler, encoder)
    accelerator.wait_for_everyone()
    watched.check()  # all processes have read the same
    made_of = session.data_hashes | hashes
    images = load_examples(config, config.finetune, encoder, made_of, accelerator).training
    accelerator.print(
        f"{source}: {unet.num_parameters():,} parameters; {len(images):,} images; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )

    # --- one run per task
    for task, run in runs:
        if not finetune(session, task, session.reading(run), loaded, images):
            return
        gc.collect()  # autocast's wrappers tie this run's networks into cycles, which would keep their memory


def finetune(session: Session, task: Task, run: Run, loaded: "Networks", images: "Examples") -> bool:
    """Train one copy of the network that a task starts from and write it; False when time was up before.

    Args:
        loaded: as `student`, the network that it starts from; as `teacher`, the experts where it has any.
    """
    import copy
    from functools import partial

    from deme.job.processes import make_accelerator
    from deme.models.networks import with_projections
    from deme.training.trainer import Objective, Trainer

    settings = task.settings

    # --- the teacher is the network that the student starts from, or else the experts
    student = with_projections(loaded.student) if task.is_projected else copy.deepcopy(loaded.student)
    teacher = loaded.teacher
    if teacher is None and settings.consistency_weight > 0:
        teacher = copy.deepcopy(loaded.student)
    networks = replace(loaded, student=student, teacher=teacher)

    # --- which timesteps it sees, and what it is held to
    objective = Objective(
        name=task.name,
        stream=task.stream,
        ranges=task.ranges,
        global_probability=settings.global_probability,
        denoising_weight=0.0 if task.is_held_to_experts else 1.0,
        consistency_weight=settings.consistency_weight,
        uncertainty_learning_rate=task.uncertainty_learning_rate,
    )

    # --- train; the output holds the EMA weights
    accelerator = make_accelerator(settings.mixed_precision, "finetune.mixed_precision")  # one loss scale per run
    make_trainer = partial(Trainer, accelerator, networks, images, objective, settings, run.folder)
    return session.train(accelerator, run, make_trainer, write=student.save_pretrained) is not None


if __name__ == "__main__":
    run_script(__doc__, plan, main)
