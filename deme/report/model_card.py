"""The model card of a merged network: the README.md that the Hub shows."""

from typing import Any

from deme.config.experiment import Config
from deme.config.paths import DENOISER
from deme.job.files import sha256, to_yaml
from deme.measure.scores import SCALARS, Score, load_scores
from deme.models.pipelines import hub_name, is_projected, takes_text
from deme.models.weights import WEIGHTS
from deme.report.tables import NAMES, markdown_table, public

PAPER = "[Decouple-then-Merge](https://arxiv.org/abs/2410.06664)"


def model_card(config: Config, made_from: dict[str, Any]) -> str:
    """The card of the merged folder that is configured, as the Hub reads it, from the merge's record.

    Scores in results.json are those of this network if their images were drawn from its weights.
    """
    from_hub = config.merge.push_to_hub is not None
    name = config.merge.push_to_hub if from_hub else str(config.paths.merged)
    projected = is_projected(config.paths.merged / DENOISER)
    folder = f'"{name}"'
    if projected and from_hub:  # diffusers would look for the class in the Hub's repository
        folder = f'snapshot_download("{name}")'
    of_text = takes_text(config.paths.merged)
    pipeline = "StableDiffusionPipeline" if of_text else "DDIMPipeline"
    asked_for = '"a prompt"' if of_text else "batch_size=16"
    loading = [
        f"from diffusers import {pipeline}",
        f"pipeline = {pipeline}.from_pretrained({folder})",
        f"images = pipeline({asked_for}, num_inference_steps={config.sample.num_inference_steps}).images",
    ]
    if projected:
        loading.insert(0, "import deme.projection  # of the project that made it: adds the projections to diffusers")
    if projected and from_hub:
        loading.insert(1, "from huggingface_hub import snapshot_download")
    ranges = config.timesteps.names
    coefficients = [[f"`{pattern}`", *map(str, values)] for pattern, values in made_from["coefficients"].items()]
    method = made_from["method"]
    settings = [f"{key} {value}" for key, value in made_from.items() if key.startswith(f"{method}_")]
    pretrained = made_from["pretrained"]
    size = config.data.resolution
    sections = [
        f"---\n{to_yaml(header(config))}---",
        f"# {config.name}",
        f"A {'text-to-image model' if of_text else 'DDPM'} made by {PAPER}: copies of one pretrained network, each "
        "finetuned on one range of timesteps, merged into one that costs as much to sample from as the pretrained one.",
        f"- pretrained: `{pretrained['path']}` (SHA-256 of its weights `{pretrained['sha256']}`)\n"
        f"- data: `{config.data.name}`, split `{config.data.split}`, {size}×{size}\n"
        f"- merged by {', '.join([method, *settings])}\n"
        f"- channel-wise projections: {'yes' if projected else 'no'}",
        "## Merging coefficients",
        markdown_table(["tensors", f"timesteps {ranges[0]}", *ranges[1:]], coefficients),
    ]
    features_name, rows = load_scores(config.paths.results) if config.paths.results.exists() else ("", [])
    weights = [sha256(config.paths.merged / DENOISER / WEIGHTS)] if rows else []
    scores = [f"- {score_line(features_name, row)}" for row in rows if row.weights == weights]
    if scores:
        sections += ["## Scores", "\n".join(scores)]
    sections += ["## How to load it", "\n".join(["```python", *loading, "```"])]
    return public("\n\n".join(sections) + "\n")


def header(config: Config) -> dict[str, Any]:
    """The card's metadata: what the Hub finds it by; of the model and data only what the Hub has."""
    known = {
        "license": config.model.license,
        "base_model": hub_name(config.paths.pretrained),
        "datasets": [config.data.name] if hub_name(config.data.name) else None,
    }
    return {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image" if takes_text(config.paths.merged) else "unconditional-image-generation",
        "tags": ["decouple-then-merge", "model-merging"],
    } | {key: value for key, value in known.items() if value is not None}


def score_line(features_name: str, row: Score) -> str:
    """A network's scores in one line; the KID where it tells anything, the CLIP score where there are prompts."""
    distance, kernel = NAMES[features_name]
    line = f"{row.images:,} images: {distance} {row.pooled:.4f}"
    if row.has_telling_kid:
        line += f", {kernel} {row.kid:.6f}"
    for name in SCALARS:
        if getattr(row, name) is not None:
            line += f", {name} {getattr(row, name):.3f}"
    if row.clip is not None:
        line += f", CLIP score {row.clip:.3f}"
    return line
