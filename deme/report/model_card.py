"""The model card of a merged network: the README.md that the Hub shows."""

from pathlib import Path
from typing import Any

from deme.config.experiment import Config
from deme.config.networks import RANDOM, RANGES, TRAJECTORY
from deme.config.paths import denoiser_in, without_schedule
from deme.config.trainings import SELF, SOUP
from deme.job.files import read_json, sha256, to_yaml
from deme.measure.scores import SCALARS, Score, load_spaces
from deme.models import pipelines
from deme.models.schedules import FLOW, prediction_type
from deme.models.weights import WEIGHTS
from deme.report.tables import distances, markdown_table, render

FROM = "copies of one pretrained network, "
MADE_BY = {  # the items of merge.experts in words
    RANGES: f"[Decouple-then-Merge](https://arxiv.org/abs/2410.06664): {FROM}each finetuned on one range of timesteps",
    SELF: f"[Neon](https://arxiv.org/abs/2510.03597): {FROM}trained on its own samples",
    SOUP: f"a [soup](https://arxiv.org/abs/2203.05482): {FROM}each finetuned on all timesteps",
    TRAJECTORY: "[LCSC](https://arxiv.org/abs/2404.02241): snapshots of one finetuning of a pretrained network",
    RANDOM: "random directions, as long in each tensor as the task vectors of experts",
}
OTHERS = "adding the task vectors of the networks below"


def model_card(config: Config, made_from: dict[str, Any]) -> str:
    """The card of the merged folder that is configured, as the Hub reads it, from the merge's record.

    Scores in results.json are those of this network if their images were drawn from its weights.
    """
    merged, repository = config.paths.merged, config.merge.push_to_hub
    network = denoiser_in(merged)
    projected = pipelines.is_projected(network)
    method, networks = made_from["method"], config.merged_networks
    names = [f"timesteps {name}" * (name == config.timesteps.names[0]) or name for name in config.merged_names]
    settings = [f"{key} {value}" for key, value in made_from.items() if key.startswith(f"{method}_")]
    coefficients = [[f"`{pattern}`", *map(str, values)] for pattern, values in made_from["coefficients"].items()]
    spaces = load_spaces(config.paths.results) if config.paths.results.exists() else {}
    weights = [sha256(network / WEIGHTS)] if spaces else []
    own = [(name, row) for name, rows in spaces.items() for row in rows if row.weights == weights]
    return render(
        "model_card.md",
        header=to_yaml(header(config)),
        config=config,
        experts=list(dict.fromkeys(MADE_BY.get(network.word, OTHERS) for network in networks)),
        given=[
            part for part, network in zip(made_from["finetuned"], networks, strict=True) if network.word not in MADE_BY
        ],
        made_from=made_from,
        method=", ".join([method, *settings]),
        coefficients=markdown_table(["tensors", *names], coefficients),
        scores=[f"- {score_line(name, row)}" for name, row in own],
        **use_of(merged),
        projected=projected,
        lacks_t5=read_json(merged / pipelines.INDEX).get("text_encoder_3") == [None, None],
        network=pipelines.read_index(merged)[network.name],
        name=merged if repository is None else repository,
        downloads=projected and repository is not None,  # else diffusers would look for the class in the repository
    )


def use_of(merged: Path) -> dict[str, str]:
    """What a model is, in words; the pipeline that loads it, empty where diffusers has none; and its arguments."""
    is_flow = prediction_type(pipelines.read_schedule(merged)) == FLOW
    kind, pipeline = "flow-matching model" if is_flow else "DDPM", pipelines.read_index(merged)["_class_name"]
    if pipelines.takes_text(merged):
        return {"kind": "text-to-image model", "pipeline": pipeline, "arguments": '"a prompt"'}
    if pipelines.labels_of(merged):
        loads = pipeline if pipelines.has_latents(merged) else ""
        return {"kind": f"class-conditional {kind}", "pipeline": loads, "arguments": "class_labels=[0, 1]"}
    return {"kind": kind, "pipeline": pipeline if is_flow else "DDIMPipeline", "arguments": "batch_size=16"}


def header(config: Config) -> dict[str, Any]:
    """The card's metadata: what the Hub finds it by; of the model and data only what the Hub has."""
    takes_text = pipelines.takes_text(config.paths.merged)
    values = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if takes_text else "unconditional-image-generation",
        "tags": ["decouple-then-merge", "model-merging"],
        "license": config.model.license,
        "base_model": pipelines.hub_name(config.paths.pretrained),
        "datasets": [config.data.name] if pipelines.hub_name(config.data.name) else None,
    }
    return {key: value for key, value in values.items() if value is not None}


def score_line(features_name: str, row: Score) -> str:
    """A network's scores in one line; the KID where it tells anything, the CLIP score where there are prompts."""
    distance, kernel = distances(features_name)
    drawn_by = row.drawn_by or without_schedule(Path(row.samples).name)[1]  # older results name it in the folder alone
    line = f"{row.images:,} images{f' by {drawn_by}' if drawn_by else ''}: {distance} {row.pooled:.4f}"
    if row.has_telling_kid:
        line += f", {kernel} {row.kid:.6f}"
    for name in SCALARS:
        if getattr(row, name) is not None:
            line += f", {name} {getattr(row, name):.3f}"
    if row.clip is not None:
        line += f", CLIP score {row.clip:.3f}"
    return line
