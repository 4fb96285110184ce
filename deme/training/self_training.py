"""Self-training: the pretrained network's own samples as training data (Neon, arXiv 2510.03597).

What a network learns from its own samples leads away from the data. So the merge subtracts it.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np

from deme.config.experiment import Config
from deme.data.drawing import draw_samples
from deme.data.opening import Source, open_source
from deme.data.samples import list_images, prompts_of, read_prompts
from deme.job.files import atomic_file, make_folder
from deme.job.processes import Processes, in_main_process
from deme.models.pipelines import takes_text
from deme.models.variants import find_model

CAPTION = "caption"  # the column of the prompts that the samples were drawn from


def training_config(config: Config) -> Config:
    """The configuration whose data are the own samples: no image of the configured data is read, or held out."""
    data = {"name": str(config.paths.own_samples), "split": "train", "image_column": "image", "label_column": None}
    data |= {"caption_column": None if config.data.caption_column is None else CAPTION}
    data |= {"held_out_images": 0, "skip_uncaptioned": False, "skip_unreadable": False}
    pretrain = replace(config.pretrain, patience=None)  # which needs held-out images
    return replace(config, data=replace(config.data, **data), pretrain=pretrain)


def own_samples(config: Config, processes: Processes) -> Source:
    """Draw what is missing of the own samples in the schedule of `sample`, and open them as data.

    A text-to-image model draws from the captions of the configured data, in an order that follows from the seed.
    """
    settings, folder = config.self_training, config.paths.own_samples
    model = find_model("pretrained", config.paths)
    watched = model.watched()
    of_text = takes_text(model.pipeline)
    if of_text:
        in_main_process(processes, partial(write_prompts, config))
    drawn = {"model": "pretrained", "output": str(folder), "size_on_disk": None, "overwrite": False}
    drawn |= {"num_images": settings.num_images, "seed_offset": settings.seed_offset, "blocks": 1, "block": None}
    drawn |= {"num_inference_steps": settings.num_inference_steps or config.sample.num_inference_steps}
    drawn |= {"prompts": str(folder.with_suffix(".jsonl")) if of_text else None, "prompt_column": CAPTION}
    drawing = replace(config, sample=replace(config.sample, **drawn))
    draw_samples(drawing, model, watched, prompts_of(drawing.sample, of_text), processes)
    data = training_config(config).data
    source = replace(open_source(replace(data, caption_column=None)), data=data)
    prompts = read_prompts(folder, list_images(folder)) if data.caption_column is not None else None
    return source if prompts is None else replace(source, captions=[[prompt] for prompt in prompts])


def write_prompts(config: Config) -> None:
    """Write a caption of the configured data for each own sample."""
    captions = open_source(config.data).captions
    order = np.random.default_rng(config.self_training.seed_offset).permutation(len(captions))
    file = config.paths.own_samples.with_suffix(".jsonl")
    make_folder(file.parent, "output_dir")
    lines = [json.dumps({CAPTION: captions[order[i % len(order)]][0]}) for i in range(config.self_training.num_images)]
    with atomic_file(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
