"""Merge: pretrained + Σ_k w_k (finetuned_k − pretrained), one coefficient w_k per timestep range.

    python merge.py
    python merge.py "merge.coefficients=[0.1,0.1,0.2,0.5]" merge.output=runs/digits/merged-by-hand

Writes a diffusers pipeline folder, runs/<name>/merged/, with the pretrained scheduler's configuration, and merge.yaml:
the inputs with their SHA-256 and the coefficients. An output that the same merge made is left alone.
"""

import shutil
from pathlib import Path

from deme.config import Config, UserError, provenance, range_name, run_script


def plan(config: Config) -> str:
    terms = [f"{w} x {folder}" for w, folder in zip(config.merge.coefficients, config.merge_inputs, strict=True)]
    return "\n  + ".join([f"merge {config.pretrained}", *terms]) + f"\n  -> {config.merged}"


def main(config: Config) -> None:
    from deme.files import make_folder, read_yaml, sha256
    from deme.pipelines import WEIGHTS, find_pipeline, unet_folder, weights_file

    # --- inputs
    pretrained, output = find_pipeline(config.pretrained), config.merged
    for number, folder in enumerate(config.merge_inputs):
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder / WEIGHTS}: missing; train it with finetune.py finetune.range={number}")
    description = {
        "method": config.merge.method,
        "coefficients": config.merge.coefficients,
        "pretrained": {"path": str(config.pretrained), "sha256": sha256(weights_file(unet_folder(pretrained)))},
        "finetuned": [
            {"timesteps": range_name(timestep_range), "path": str(folder), "sha256": sha256(folder / WEIGHTS)}
            for timestep_range, folder in zip(config.timesteps.ranges, config.merge_inputs, strict=True)
        ],
    }

    # --- the output that stands there
    record = output / "merge.yaml"
    if output.exists():
        if not record.exists():
            raise UserError(f"merge.output={output}: exists without a merge.yaml, so it is not replaced")
        before = read_yaml(record)
        if all(before.get(key) == value for key, value in description.items()):
            print(f"{output} is complete")
            return
        print(f"{output} was merged from other inputs or coefficients: replacing it")

    # --- merge
    make_folder(output.parent, "merge.output")
    write_merged(pretrained, config.merge_inputs, config.merge.coefficients, output, description | provenance(config))
    print(f"wrote {output}")


def write_merged(pretrained: Path, unets: list[Path], coefficients: list[float], output: Path, record: dict) -> None:
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
        SCHEDULER_CONFIG,
        WEIGHTS,
        load_tensors,
        read_json,
        scheduler_folder,
        unet_folder,
    )
    from deme.task_vectors import merge_tensors, with_identity_projections

    finetuned = {str(folder): load_tensors(folder) for folder in unets}
    base = load_tensors(unet_folder(pretrained))
    for tensors in finetuned.values():
        base = with_identity_projections(base, tensors)

    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    if (pretrained / "model_index.json").is_file():
        index = read_json(pretrained / "model_index.json")
    settings = read_json(unets[0] / "config.json")
    settings.pop("_name_or_path", None)  # where that copy was loaded from: a path that means nothing elsewhere
    if settings.get("_class_name") == PROJECTED_CLASS:
        index["unet"] = ["deme.projection", PROJECTED_CLASS]

    with atomic_folder(output) as temporary:
        for part in ("scheduler", "unet"):
            (temporary / part).mkdir()
        shutil.copy(scheduler_folder(pretrained) / SCHEDULER_CONFIG, temporary / "scheduler" / SCHEDULER_CONFIG)
        merged = dict(merge_tensors(base, finetuned, coefficients))
        save_file(merged, temporary / "unet" / WEIGHTS, metadata={"format": "pt"})
        (temporary / "unet" / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        write_yaml(temporary / "merge.yaml", record)


if __name__ == "__main__":
    run_script(__doc__, plan, main)
