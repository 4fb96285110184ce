"""The model card of a merged network: the README.md that the Hub shows."""

from pathlib import Path

from deme.config import Config, UserError, range_name
from deme.files import markdown_table, sha256, to_yaml
from deme.pipelines import read_json

PAPER = "[Decouple-then-Merge](https://arxiv.org/abs/2410.06664)"


def model_card(config: Config, record: dict, projected: bool, scores: list[dict], name: str) -> str:
    """
    Args:
        record: the content of merge.yaml.
        projected: the UNet has channel-wise projections, which this project adds to diffusers' class.
        scores: rows of a results.json that belong to this network.
        name: where the reader finds the folder: a Hub id or a path.
    """
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["decouple-then-merge", "model-merging"],
    }
    from_hub = config.merge.push_to_hub is not None
    folder = f'"{name}"'
    if projected and from_hub:  # diffusers would look for the class in the Hub's repository
        folder = f'snapshot_download("{name}")'
    loading = [
        "from diffusers import DDIMPipeline",
        f"pipeline = DDIMPipeline.from_pretrained({folder})",
        f"images = pipeline(batch_size=16, num_inference_steps={config.sample.num_inference_steps}).images",
    ]
    if projected:
        loading.insert(0, "import deme.projection  # of the project that made it: adds the projections to diffusers")
    if projected and from_hub:
        loading.insert(1, "from huggingface_hub import snapshot_download")
    ranges = [range_name(timestep_range) for timestep_range in config.timesteps.ranges]
    coefficients = [[f"`{pattern}`", *map(str, values)] for pattern, values in record["coefficients"].items()]
    method = "task arithmetic: pretrained + Σ wₖ (finetunedₖ − pretrained)"
    if record["method"] == "ties":
        method = f"TIES, fraction {record['ties_fraction']}, disjoint {record['ties_combine']}"
    size = config.data.resolution
    sections = [
        f"---\n{to_yaml(header)}---",
        f"# {config.name}",
        f"A DDPM made by {PAPER}: copies of one pretrained network, each finetuned on one range of timesteps, merged "
        "into a network that costs as much to sample from as the pretrained one.",
        f"- pretrained: `{record['pretrained']['path']}` (SHA-256 of its weights `{record['pretrained']['sha256']}`)\n"
        f"- data: `{config.data.name}`, split `{config.data.split}`, {size}×{size}\n"
        f"- merged by {method}\n"
        f"- channel-wise projections: {'yes' if projected else 'no'}",
        "## Merging coefficients",
        markdown_table(["tensors", f"timesteps {ranges[0]}", *ranges[1:]], coefficients),
    ]
    if scores:
        sections += ["## Scores", "\n".join(f"- {score_line(row)}" for row in scores)]
    sections += ["## How to load it", "\n".join(["```python", *loading, "```"])]
    return "\n\n".join(sections) + "\n"


def score_line(row: dict) -> str:
    distance, kernel = ("FID", "KID") if row["features"] == "inception" else ("classifier FD", "classifier KID")
    line = f"{row['images']:,} images: {distance} {row['pooled']:.4f}"
    if row.get("kid") is not None:
        line += f", {kernel} {row['kid']:.6f}, precision {row['precision']:.3f}, recall {row['recall']:.3f}"
    return line


def find_scores(results: Path, weights: Path) -> list[dict]:
    """The rows of a results.json whose images were drawn from a network's weights, each with the features' name."""
    if not results.exists():
        return []
    content, network = read_json(results), [sha256(weights)]
    try:
        return [row | {"features": content["features"]} for row in content["rows"] if row["weights"] == network]
    except (KeyError, TypeError) as error:
        raise UserError(f"{results}: not the results of evaluate.py: {error!r}") from None
