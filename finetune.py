"""Decouple: finetune one copy of the pretrained UNet per timestep range.

    accelerate launch finetune.py                            # every range in turn
    accelerate launch finetune.py finetune.range=2           # one, counted from 0: a cluster runs them in parallel
    accelerate launch finetune.py finetune.range=continued   # the control: plain training on all timesteps, equal cost
    accelerate launch finetune.py finetune.range=min_snr     # a baseline: the control with another weighting of the
                                                             # loss; or snr_plus_one, truncated_snr, p2, ant_uw
    accelerate launch finetune.py finetune.range=distilled   # after merge.py: the merged network, held to all experts
    accelerate launch finetune.py finetune.range=self        # on samples that are drawn first: no image of the data is
                                                             # needed; merge.experts=[self] subtracts what it learns
    accelerate launch finetune.py finetune.range=soup        # on all timesteps, as many copies as there are ranges

    accelerate launch finetune.py finetune.lora_rank=8 model.projection=false    # LoRAs: the network itself is frozen

Writes runs/<name>/finetuned/0000-0250/unet/ and so on (EMA weights); checkpoints, logs and previews lie beside it, and
with finetune.snapshot_every the EMA weights of earlier steps, in snapshots/. With finetune.lora_rank it writes
finetuned/0000-0250/pytorch_lora_weights.safetensors instead.
The same command again resumes, or does nothing when all is done. Distillation is ours, not the paper's; training on
own samples, to be subtracted, is Neon (https://arxiv.org/abs/2510.03597).
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.networks import is_lora
from deme.config.trainings import ANT_UW, BASELINES, CONTINUED, DISTILLED, SELF, SOUP, Finetune
from deme.job.command import run_script
from deme.job.files import read_json, sha256
from deme.job.records import ARCHITECTURE, BASE, PRETRAINED_WEIGHTS, WEIGHTS_OF
from deme.models.kinds import subfolder_of
from deme.models.pipelines import labels_of
from deme.models.weights import weights_hash
from deme.models.trained import check_trained
from deme.models.variants import ModelFiles, find_model
from deme.training.session import Objective, Session, TrainingRun

if TYPE_CHECKING:
    from deme.data.examples import TrainingImages
    from deme.training.state import Networks

PRETRAINED, MERGED = "pretrained", "merged"  # models to start from, as sample.model names them


@dataclass(frozen=True)
class Task:
    """One network to train."""

    objective: Objective
    settings: Finetune
    is_projected: bool = False
    start: str = PRETRAINED  # or MERGED, which is held to the experts alone
    renamed: dict[str, str] = field(default_factory=dict)  # section.key → the key that its value comes from

    @property
    def name(self) -> str:
        """The name of its folder in finetuned/."""
        return self.objective.name


def expert(config: Config, number: int) -> Task:
    """The copy of one timestep range, held to the pretrained network."""
    settings, timestep_range = config.finetune, config.timesteps.ranges[number]
    objective = Objective(
        config.timesteps.names[number],
        (config.seed, 2, *timestep_range),
        [timestep_range],
        settings.global_probability,
        consistency_weight=settings.consistency_weight,
    )
    return Task(objective, settings, config.model.projection)


def plain(config: Config, name: str, *stream: int) -> Task:
    """Training on all timesteps without a teacher; the numbers tell its draws apart from those of other tasks."""
    settings = replace(config.finetune, global_probability=1.0, consistency_weight=0.0)
    whole = [(0, config.timesteps.num_train_timesteps)]
    return Task(Objective(name, (config.seed, *stream), whole, global_probability=1.0), settings)


def control(config: Config, name: str = CONTINUED) -> Task:
    """The control or a baseline: training on all timesteps without a teacher, at the cost of all ranges together.

    All of them see the same images. All but ANT-UW, which spreads its timesteps over the ranges, also see the same
    timesteps and noise.
    """
    task = plain(config, name, 1)
    objective, settings = task.objective, replace(task.settings, max_steps=config.steps_of(name))
    if name == ANT_UW:
        rate = settings.uncertainty_learning_rate
        ranges = config.timesteps.ranges
        objective = replace(objective, ranges=ranges, global_probability=0.0, uncertainty_learning_rate=rate)
        settings = replace(settings, global_probability=0.0, loss_weighting=None)
    elif name != CONTINUED:
        settings = replace(settings, loss_weighting=name)
    return Task(objective, settings)


def distillation(config: Config) -> Task:
    """The merged network, held to each range's expert in its range: ours, a step beyond the paper."""
    steps = config.steps_of(DISTILLED)
    return Task(
        Objective(DISTILLED, (config.seed, 4), config.timesteps.ranges, denoising_weight=0.0, consistency_weight=1.0),
        replace(config.finetune, max_steps=steps, global_probability=0.0, consistency_weight=1.0, loss_weighting=None),
        config.model.projection,
        start=MERGED,
        renamed={"finetune.max_steps": "distill.max_steps"},
    )


def self_training(config: Config) -> list[Task]:
    """Plain training on samples of the pretrained network: one copy for all timesteps, or one for each range."""
    if not config.self_training.ranges:
        return [plain(config, SELF, 5)]
    settings = replace(config.finetune, consistency_weight=0.0)
    return [
        Task(Objective(name, (config.seed, 5, *edges), [edges], settings.global_probability), settings)
        for name, edges in zip(config.self_trained_names, config.timesteps.ranges, strict=True)
    ]


def soup(config: Config) -> list[Task]:
    """As many copies as there are ranges, each trained plainly on all timesteps, with images and draws of its own."""
    return [plain(config, name, 6, number) for number, name in enumerate(config.soup_names)]


def chosen_tasks(config: Config) -> list[Task]:
    """The networks that this command trains; all of them start from the same one."""
    chosen = config.finetune.range
    if chosen in (CONTINUED, *BASELINES):
        return [control(config, chosen)]
    if chosen == DISTILLED:
        return [distillation(config)]
    if chosen == SELF:
        config.check_self_training()
        return self_training(config)
    if chosen == SOUP:
        return soup(config)
    numbers = range(len(config.timesteps.ranges)) if chosen is None else [chosen]
    return [expert(config, number) for number in numbers]


def source_of(task: Task, config: Config) -> tuple[str, str]:
    """The key and the value that name the pipeline that a task starts from."""
    if task.start == MERGED:
        return "merge.output", str(config.paths.merged)
    return "model.pretrained", config.paths.pretrained


def run_of(session: Session, task: Task, subfolder: str, hashes: dict[str, str]) -> TrainingRun:
    """The run of a task.

    Args:
        subfolder: the name of the trained network's folder.
        hashes: of the networks that it starts from and is held to.
    """
    paths = session.config.paths
    folder, output = paths.finetuning(task.name), paths.trained(task.name)
    output = output if is_lora(output) else output.with_name(subfolder)
    made_from = {"finetune.range": task.name, "model.projection": task.is_projected, **hashes}
    if task.objective.uncertainty_learning_rate is not None:
        made_from["timestep ranges"] = [list(edges) for edges in task.objective.ranges]
    return session.new_run(task.objective, task.settings, folder, output, made_from, task.renamed)


def open_session(config: Config) -> Session:
    """This command's session; the data of self-training are own samples, which are drawn first."""
    if config.finetune.range != SELF:
        return Session(config, config.finetune)
    from deme.job.processes import make_accelerator
    from deme.training.self_training import own_samples, training_config

    session = Session(training_config(config), config.finetune)
    session.source = own_samples(config, make_accelerator(config.finetune.mixed_precision, "finetune.mixed_precision"))
    return session


def plan(config: Config) -> str:
    """What this command would do."""
    lines = []
    for task in chosen_tasks(config):
        unet = config.paths.trained(task.name)
        state = "complete" if unet.exists() else f"{task.settings.max_steps} steps"
        lines.append(f"finetune {source_of(task, config)[1]}: {task.name} -> {unet}: {state}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Finetune what is not finetuned yet."""
    # --- what is left to do
    tasks = chosen_tasks(config)
    session = open_session(config)
    model = tasks[0].start
    variant = find_model(model, config.paths)
    session.takes_labels = labels_of(variant.pipeline) > 0
    unets = {model: variant.denoisers[0]}
    if model == MERGED:
        unets |= zip(config.timesteps.names, check_trained(variant.pipeline, config.experts), strict=True)
        are_alike = {is_lora(path) for path in unets.values()} == {config.finetune.lora_rank is not None}
        rule = f"a LoRA is distilled from LoRAs, a network from networks: {', '.join(map(str, unets.values()))}"
        config.finetune.check("lora_rank", are_alike, rule)
    inputs = ModelFiles(variant.pipeline, list(unets.values()))
    inputs.check_fits(config)
    watched = inputs.watched()
    hashes = {
        **{WEIGHTS_OF.format(name): weights_hash(unet) for name, unet in unets.items()},
        ARCHITECTURE: sha256(inputs.folders[0] / "config.json"),
        **inputs.hashes(),
    }
    subfolder = subfolder_of(read_json(inputs.folders[0] / "config.json"))
    runs = [(task, run_of(session, task, subfolder, hashes)) for task in tasks]
    runs = [(task, run) for task, run in runs if not session.is_complete(run)]
    if not runs:
        return

    # --- the networks and the images; torch is imported only now, as the lines above do not need it
    import gc

    from deme.method.task_vectors import merge_method
    from deme.training.state import load_networks
    from deme.training.trainer import open_training

    merge_method(config.merge.method, config.merge.settings)  # a typo would show only when the training is over
    key, source = source_of(tasks[0], config)
    load = partial(load_networks, inputs, key, source, config.timesteps, tasks[0].settings)
    accelerator, start, images = open_training(session, load, watched, hashes)
    accelerator.print(
        f"{source}: {start.student.num_parameters():,} parameters; {len(images.training):,} images; "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )

    # --- one run per task
    for task, run in runs:
        if not finetune(session, task, run, start, images):
            return
        gc.collect()  # autocast's wrappers tie this run's networks into cycles, which would keep their memory


def finetune(session: Session, task: Task, run: TrainingRun, start: "Networks", images: "TrainingImages") -> bool:
    """Train a copy of the network that a task starts from and write it; False if time was up first."""
    import copy

    from deme.models.denoisers import with_projections
    from deme.training.trainer import train

    if task.settings.lora_rank is not None:
        return finetune_lora(session, task, run, start, images)
    student = with_projections(start.student) if task.is_projected else copy.deepcopy(start.student)
    teacher = start.teacher
    if teacher is None and task.objective.consistency_weight > 0:
        teacher = copy.deepcopy(start.student)
    networks = replace(start, student=student, teacher=teacher)
    return train(session, run, networks, images, write=student.save_pretrained) is not None


def finetune_lora(session: Session, task: Task, run: TrainingRun, start: "Networks", images: "TrainingImages") -> bool:
    """Train a LoRA and write it; False if time was up first. Student and teacher share the frozen base."""
    from deme.models.adapters import lora_of
    from deme.models.lora import write_lora
    from deme.training.state import with_new_lora
    from deme.training.trainer import train

    made_from = run.record.made_from
    # the merged LoRA is trained on
    networks = start if task.start == MERGED else with_new_lora(start, task.settings, task.objective)
    base = made_from.get(BASE) or made_from[PRETRAINED_WEIGHTS]
    header = {"training": task.name, "timesteps": list(task.objective.ranges)}
    header["pretrained"] = {"path": session.config.paths.pretrained, "sha256": base}

    def write(file: Path) -> None:
        write_lora(file, lora_of(networks.student), header)

    return train(session, run, networks, images, write) is not None


if __name__ == "__main__":
    run_script(__doc__, plan, main)
