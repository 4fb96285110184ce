"""Merge: pretrained + Σ_k w_k (finetuned_k − pretrained), one coefficient w_k per timestep range.

    python merge.py
    python merge.py "merge.coefficients=[0.1,0.1,0.2,0.5]" merge.output=runs/digits/merged-by-hand
    python merge.py merge.method=ties merge.output=runs/digits/merged-ties
    python merge.py "merge.coefficients={up_blocks.*: [0.5,0.5,0.5,0.5], '*': [0.1,0.1,0.1,0.1]}"
    python merge.py merge.push_to_hub=owner/name        # upload it

Writes a diffusers pipeline folder, runs/<name>/merged/, with the pretrained scheduler's configuration, merge.yaml (the
inputs with their SHA-256, the coefficients) and the model card README.md. An output that the same merge made is left
alone, but its card gets the scores that evaluate.py has found since.
"""

from pathlib import Path

from deme.command import provenance, run_script
from deme.config import Config, UserError, range_name


def plan(config: Config) -> str:
    groups = config.coefficient_groups.items()
    coefficients = [f"  {pattern}: {coefficients}" for pattern, coefficients in groups]
    inputs = [f"  {folder}" for folder in config.merge_inputs]
    title = f"merge {config.pretrained} and the following by {config.merge.method} -> {config.merged}"
    upload = [] if config.merge.push_to_hub is None else [f"upload it to {config.merge.push_to_hub}"]
    return "\n".join([title, *inputs, "with the coefficients", *coefficients, *upload])


def main(config: Config) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from deme.files import sha256
    from deme.locks import locked
    from deme.pipelines import WEIGHTS, find_pipeline, unet_folder, weights_file

    # --- inputs
    settings = config.merge
    pretrained, output = find_pipeline(config.pretrained), config.merged
    for number, folder in enumerate(config.merge_inputs):
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder / WEIGHTS}: missing; train it with finetune.py finetune.range={number}")
    with ThreadPoolExecutor() as pool:
        files = [weights_file(unet_folder(pretrained)), *(folder / WEIGHTS for folder in config.merge_inputs)]
        base_hash, *hashes = pool.map(sha256, files)
    description = {
        "method": settings.method,
        "coefficients": config.coefficient_groups,
        "pretrained": {"path": str(config.pretrained), "sha256": base_hash},
        "finetuned": [
            {"timesteps": range_name(timestep_range), "path": str(folder), "sha256": weights_hash}
            for timestep_range, folder, weights_hash in zip(
                config.timesteps.ranges, config.merge_inputs, hashes, strict=True
            )
        ],
    }
    if settings.method == "ties":
        description |= {"ties_fraction": settings.ties_fraction, "ties_combine": settings.ties_combine}

    # --- merge, unless the output is complete
    with locked(output, "merge.output"):
        if not is_complete(output, description):
            write_merged(pretrained, config, description | provenance(config))
            print(f"wrote {output}")
        write_card(config, description)

    # --- share
    if settings.push_to_hub is not None:
        push_to_hub(output, settings.push_to_hub)


def is_complete(output: Path, description: dict) -> bool:
    """Whether the folder that stands there, if any, was merged so.

    Raises:
        UserError: merge.py did not make it.
    """
    from deme.files import read_yaml

    if not output.exists():
        return False
    record = output / "merge.yaml"
    if not record.exists():
        raise UserError(f"merge.output={output}: exists without a merge.yaml, so it is not replaced")
    before = read_yaml(record)
    complete = all(before.get(key) == value for key, value in description.items())
    print(f"{output} is complete" if complete else f"{output} was merged from something else: replacing it")
    return complete


def write_merged(pretrained: Path, config: Config, record: dict) -> None:
    """Merge UNet folders into a pipeline folder: the weights are read by memory map, only the sum is held in memory.

    Args:
        pretrained: pipeline folder.
        record: the content of merge.yaml.
    """
    import json

    from safetensors.torch import save_file

    from deme.files import atomic_folder, write_yaml
    from deme.pipelines import (
        PROJECTED_CLASS,
        WEIGHTS,
        load_tensors,
        read_json,
        unet_folder,
        write_pipeline_files,
    )
    from deme.task_vectors import Ties, merge_tensors, with_identity_projections

    finetuned = {str(folder): load_tensors(folder) for folder in config.merge_inputs}
    base = load_tensors(unet_folder(pretrained))
    for tensors in finetuned.values():
        base = with_identity_projections(base, tensors)

    unet_config = read_json(config.merge_inputs[0] / "config.json")
    unet_config.pop("_name_or_path", None)  # where that copy was loaded from: a path that means nothing elsewhere

    with atomic_folder(config.merged) as temporary:
        (temporary / "unet").mkdir()
        ties = Ties(config.merge.ties_fraction, config.merge.ties_combine) if config.merge.method == "ties" else None
        merged = dict(merge_tensors(base, finetuned, config.coefficient_groups, ties))
        save_file(merged, temporary / "unet" / WEIGHTS, metadata={"format": "pt"})
        (temporary / "unet" / "config.json").write_text(json.dumps(unet_config, indent=2), encoding="utf-8")
        write_pipeline_files(temporary, pretrained, projected=unet_config.get("_class_name") == PROJECTED_CLASS)
        write_yaml(temporary / "merge.yaml", record)


def write_card(config: Config, record: dict) -> None:
    """Write the merged folder's README.md, with the scores in results.json that belong to its network."""
    from deme.files import atomic_file
    from deme.model_card import find_scores, model_card
    from deme.pipelines import PROJECTED_CLASS, WEIGHTS, read_json

    unet = config.merged / "unet"
    projected = read_json(unet / "config.json").get("_class_name") == PROJECTED_CLASS
    scores = find_scores(config.results, unet / WEIGHTS)
    name = config.merge.push_to_hub if config.merge.push_to_hub is not None else str(config.merged)
    with atomic_file(config.merged / "README.md") as temporary:
        temporary.write_text(model_card(config, record, projected, scores, name), encoding="utf-8")


def push_to_hub(folder: Path, name: str) -> None:
    """Upload a pipeline folder; the Hub's repository is made where it does not exist.

    Raises:
        UserError: no network, no permission.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True)
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Merged by Decouple-then-Merge")
    except Exception as error:  # network, token and permission errors have no common class
        raise UserError(f"merge.push_to_hub={name}: {' '.join(str(error).split())}") from None
    print(f"uploaded {folder}: {commit}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
