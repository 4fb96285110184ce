"""Self-training: the pretrained network's own samples as training data (Neon, arXiv 2510.03597).

What a network learns from its own samples leads away from the data. So the merge subtracts it.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from deme.config.experiment import Config
from deme.config.sections import Data
from deme.data.decoding import Source
from deme.data.drawing import draw_samples
from deme.data.opening import open_source
from deme.data.samples import in_turn, list_images, load_prompts, read_prompts
from deme.errors import naming
from deme.job.files import make_folder
from deme.job.processes import Processes, in_main_process
from deme.models.pipelines import labels_of, takes_text
from deme.models.variants import find_model, timed


def training_config(config: Config) -> Config:
    """The configuration whose data are the own samples: no image of the configured data is read, or held out."""
    data = {"name": str(config.paths.own_samples), "split": "train", "image_column": "image", "label_column": None}
    data |= {"caption_column": config.data.caption_column and "caption"}
    data |= {"held_out_images": 0, "skip_uncaptioned": False, "skip_unreadable": False}
    pretrain = replace(config.pretrain, patience=None)  # which needs held-out images
    return replace(config, data=replace(config.data, **data), pretrain=pretrain)


def own_samples(config: Config, processes: Processes) -> Source:
    """Draw what is missing of the own samples in the schedule of `sample`, and open them as data."""
    settings, folder = config.self_training, config.paths.own_samples
    model = find_model("pretrained", config.paths)
    watched = model.watched()
    seeds, labels = range(settings.seed_offset, settings.seed_offset + settings.num_images), labels_of(model.pipeline)
    texts = in_turn(range(labels), seeds)
    if takes_text(model.pipeline):
        texts = in_main_process(processes, partial(drawn_captions, config))
    drawn = {"model": "pretrained", "output": str(folder), "prompts": None, "size_on_disk": None, "overwrite": False}
    drawn |= {"labels": None}  # all take turns
    drawn |= {"num_images": settings.num_images, "seed_offset": settings.seed_offset, "blocks": 1, "block": None}
    drawn |= {"num_inference_steps": config.own_sample_steps, "schedules": [], "prediction_scale": None}
    notes = config.paths.own_seconds
    if processes.is_main_process and not folder.exists():
        make_folder(notes.parent, "output_dir")
        notes.write_text("")
    with timed(notes) if processes.is_main_process else nullcontext():
        draw_samples(replace(config, sample=replace(config.sample, **drawn)), model, watched, texts, processes)
    return as_data(training_config(config).data, folder, texts if labels else {})


def as_data(data: Data, folder: Path, labels: dict[int, int]) -> Source:
    """A sample folder as data, with its prompts, or with the label of each seed."""
    source = replace(open_source(replace(data, caption_column=None)), data=data)
    images = sorted(list_images(folder), key=lambda path: path.name)  # as data are, where 1000000 is before 999999
    if labels:
        return replace(source, labels=[labels[int(path.stem)] for path in images])
    prompts = read_prompts(folder, images) if data.caption_column is not None else None
    return source if prompts is None else replace(source, captions=[[prompt] for prompt in prompts])


def drawn_captions(config: Config) -> dict[int, str]:
    """Seed → a caption of the configured data, for each own sample; their order follows from the first seed."""
    captions, settings = open_source(config.data).captions, config.self_training
    config.data.check("caption_column", captions is not None, "a text-to-image model needs captions")
    order = np.random.default_rng(settings.seed_offset).permutation(len(captions))
    seeds = range(settings.seed_offset, settings.seed_offset + settings.num_images)
    texts = {seed: captions[order[seed % settings.num_images % len(order)]][0] for seed in seeds}
    with naming("data.caption_column", config.data.caption_column):
        load_prompts([*texts.values()], "")  # as what sample.prompts holds, they must not be blank
    return texts
