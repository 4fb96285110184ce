"""The models of a run that can be sampled: pretrained, continued (the control), the baselines, ensemble, merged,
distilled, or any folder."""

from dataclasses import dataclass
from pathlib import Path

from deme.config.paths import Paths
from deme.config.sections import BASELINES, CONTINUED, DISTILLED, NAMED_TRAININGS
from deme.errors import UserError, naming
from deme.models.pipelines import find_pipeline, unet_folder
from deme.models.weights import WEIGHTS, has_weights

# of the rows of a table; others follow by name
ORDER = ("pretrained", CONTINUED, *BASELINES, "ensemble", "merged", DISTILLED)

MAKERS = {  # of the models that a run makes: its command
    **{name: f"finetune.py finetune.range={name}" for name in NAMED_TRAININGS},
    "ensemble": "finetune.py",
    "merged": "merge.py",
}


@dataclass(frozen=True)
class Variant:
    """Where a model's networks and noise schedule lie."""

    unets: list[Path]  # one UNet folder, or one per timestep range
    pipeline: Path  # whose noise schedule is used


def find_variant(model: str, paths: Paths) -> Variant:
    """The model of this name, or in this folder: a pipeline, or a UNet with the pretrained noise schedule."""
    if model == "pretrained":
        pipeline = find_pretrained(paths)
        return Variant([unet_folder(pipeline)], pipeline)
    if model in MAKERS:
        unets = made_unets(model, paths)
        for folder in unets:
            if not folder.is_dir():
                raise UserError(f"{folder} is missing; {MAKERS[model]} makes it")
        return Variant(unets, find_pipeline(str(paths.merged)) if model == "merged" else find_pretrained(paths))
    folder = Path(model)
    if (folder / "unet").is_dir():
        has_scheduler = (folder / "scheduler").is_dir()
        return Variant([folder / "unet"], find_pipeline(model) if has_scheduler else find_pretrained(paths))
    if (folder / "config.json").is_file():
        return Variant([folder], find_pretrained(paths))
    raise UserError(f"not {', '.join(ORDER)}, or a folder that holds a UNet")


def made_unets(model: str, paths: Paths) -> list[Path]:
    """Where the UNet folders of a model of MAKERS lie, made or not."""
    if model == "ensemble":
        return paths.finetuned
    return [(paths.merged if model == "merged" else paths.finetuning(model)) / "unet"]


def find_finetuned(paths: Paths) -> list[Path]:
    """The folders of the finetuned UNets, lowest range first, with weights in any form."""
    for k, folder in enumerate(paths.finetuned):
        if not has_weights(folder):
            raise UserError(f"{folder / WEIGHTS}: missing; train it with finetune.py finetune.range={k}")
    return paths.finetuned


def find_pretrained(paths: Paths) -> Path:
    """The folder of the pipeline that finetuning starts from."""
    if paths.pretrained == str(paths.pretrained_here) and not paths.pretrained_here.is_dir():
        raise UserError(f"model.pretrained=null: {paths.pretrained} is missing; pretrain.py makes it")
    with naming("model.pretrained", paths.pretrained):
        return find_pipeline(paths.pretrained)
