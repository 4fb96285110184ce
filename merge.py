"""Merge: pretrained + Σ_k w_k (finetuned_k − pretrained), one coefficient w_k per timestep range.

    python merge.py
    python merge.py "merge.coefficients=[0.1,0.1,0.2,0.5]" merge.output=runs/digits/merged-by-hand
    python merge.py merge.method=ties merge.output=runs/digits/merged-ties
    python merge.py merge.coefficients=search           # what search.py found
    python merge.py "merge.coefficients={up_blocks.*: [0.5,0.5,0.5,0.5], '*': [0.1,0.1,0.1,0.1]}"
    python merge.py merge.push_to_hub=owner/name        # upload it

Writes a diffusers pipeline folder, runs/<name>/merged/, with the pretrained scheduler's configuration, merge.yaml (the
inputs with their SHA-256, the coefficients) and the model card README.md. An output that the same merge made is left
alone, but its card gets the scores that evaluate.py has found since.
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.paths import DENOISER
from deme.config.sections import range_name
from deme.errors import UserError, naming, one_line
from deme.job.command import run_script
from deme.job.files import Watched, atomic_file, atomic_folder, check_apart, read_json, sha256
from deme.job.locks import locked
from deme.job.records import ENCODER, MERGED, SCHEDULE, WEIGHTS_HASH, Record, provenance, read_record
from deme.models.pipelines import (
    SCHEDULER_CONFIG,
    common_architecture,
    encoders_hash,
    scheduler_folder,
    denoiser_folder,
    write_pipeline_files,
)
from deme.models.searched import read_searched
from deme.models.variants import ModelFiles, find_finetuned, find_pretrained
from deme.models.weights import WEIGHTS, load_tensors, weights_hash, write_denoiser

if TYPE_CHECKING:
    from deme.method.task_vectors import MergeMethod


def plan(config: Config) -> str:
    """What this command would do."""
    file = searched_file(config)
    groups = config.coefficient_groups if file is None else {"those in": file}
    coefficients = [f"  {pattern}: {coefficients}" for pattern, coefficients in groups.items()]
    inputs = [f"  {folder}" for folder in config.paths.finetuned]
    title = f"merge {config.paths.pretrained} and the following by {config.merge.method} -> {config.paths.merged}"
    upload = [] if config.merge.push_to_hub is None else [f"upload it to {config.merge.push_to_hub}"]
    return "\n".join([title, *inputs, "with the coefficients", *coefficients, *upload])


def main(config: Config) -> None:
    """Merge, unless it is done; write the card; upload."""
    from concurrent.futures import ThreadPoolExecutor

    # --- inputs
    output = config.paths.merged
    pretrained = find_pretrained(config.paths)
    inputs = find_finetuned(config.paths)
    groups, searched = config.coefficient_groups, None
    file = searched_file(config)
    if file is not None:
        with naming("merge.coefficients", config.merge.coefficients):
            searched = read_searched(file)
        groups = searched.groups(config)
        if config.merge.method == "ties":
            print(f"{file}: found for the sum of task vectors, used with merge.method=ties")
    check_apart("merge.output", output, [denoiser_folder(pretrained), *inputs])
    networks = [denoiser_folder(pretrained), *inputs]
    common_architecture(networks)  # also where the output is complete: another version may have merged it
    sources = ModelFiles(pretrained, networks)
    watched = sources.watched(*(folder / "config.json" for folder in networks))
    with ThreadPoolExecutor() as pool:
        hashing = pool.map(weights_hash, networks)  # takes about as long as importing torch

        from deme.method.task_vectors import TaskArithmetic
        from deme.method.ties import Ties

        base_hash, *hashes = hashing

    # --- what the result is made from
    settings = config.merge
    method = TaskArithmetic() if settings.method != "ties" else Ties(settings.ties_fraction, settings.ties_combine)
    names = map(range_name, config.timesteps.ranges)
    experts = [
        {"timesteps": name, "path": str(folder), "sha256": weights_hash}
        for name, folder, weights_hash in zip(names, inputs, hashes, strict=True)
    ]
    base = {"path": config.paths.pretrained, "sha256": base_hash}
    made_from = {"coefficients": groups, "pretrained": base, "finetuned": experts}
    if searched is not None and not searched.is_of(base_hash, hashes):
        remedy = "search again, or write its coefficients into the configuration"
        raise UserError(f"merge.coefficients={config.merge.coefficients}: found for other networks; {remedy}")
    made_from |= sources.hashes()
    wanted = Record(MERGED, method.describe() | made_from, provenance(config))

    # --- merge, unless the output is complete
    with locked(output, "merge.output"):
        if is_complete(output, wanted):
            print(f"{output} is complete")
        else:
            write_merged(output, pretrained, inputs, groups, method, wanted, watched)
            print(f"wrote {output}")
        write_card(config, wanted)

    # --- share
    if settings.push_to_hub is not None:
        push_to_hub(output, settings.push_to_hub, settings.push_private)


def searched_file(config: Config) -> Path | None:
    """The file of search.py that merge.coefficients names, if any."""
    given = config.merge.coefficients
    if not isinstance(given, str):
        return None
    return config.paths.best_coefficients if given == "search" else Path(given)


def is_complete(output: Path, wanted: Record) -> bool:
    """Whether the folder that stands there, if any, was merged so, and holds what was merged."""
    if not output.exists():
        return False
    found = read_record(MERGED, output)
    if found is None:
        raise UserError(f"merge.output={output}: exists without a {MERGED.file}, so it is not replaced")
    if not found.fits(wanted, output):
        return False
    weights = output / DENOISER / WEIGHTS
    scheduler = scheduler_folder(output) / SCHEDULER_CONFIG
    merged_hash = found.beside.get(WEIGHTS_HASH)  # older records have none
    whole = weights.is_file() and scheduler.is_file() and sha256(scheduler) == wanted.made_from[SCHEDULE]
    whole = whole and (ENCODER not in wanted.made_from or holds_encoders(output, wanted.made_from[ENCODER]))
    if whole and merged_hash in (None, sha256(weights)):
        return True
    print(f"{output} no longer holds what was merged: replacing it")
    return False


def holds_encoders(output: Path, expected: str) -> bool:
    """Whether a merged folder has the encoders of this hash."""
    try:
        return encoders_hash(output) == expected
    except UserError:  # one is missing
        return False


def write_merged(
    output: Path,
    pretrained: Path,
    inputs: list[Path],
    groups: dict[str, list[float]],
    method: "MergeMethod",
    record: Record,
    watched: Watched,
) -> None:
    """Merge UNet folders into a pipeline folder: the weights are read by memory map, only the sum is held in memory.

    Args:
        pretrained: pipeline folder.
        inputs: the finetuned UNets' folders, in the order of the coefficients.
        groups: name pattern → coefficients.
        watched: what the record names by its hash.
    """
    from deme.method.coefficients import coefficients_of
    from deme.method.projection import with_identity_projections
    from deme.method.task_vectors import merge_tensors

    architecture = common_architecture([denoiser_folder(pretrained), *inputs])
    like = load_tensors(architecture)
    base, *experts = (
        with_identity_projections(load_tensors(folder), like) for folder in (denoiser_folder(pretrained), *inputs)
    )
    finetuned = dict(zip(map(str, inputs), experts, strict=True))
    with naming("merge.coefficients", groups):
        coefficients = {name: coefficients_of(name, groups) for name in base}

    unet_config = read_json(architecture / "config.json")
    unet_config.pop("_name_or_path", None)  # where that copy was loaded from: a path that means nothing elsewhere

    with atomic_folder(output) as temporary:
        try:
            merged = dict(merge_tensors(base, finetuned, coefficients, method))
        except OverflowError as error:
            raise UserError(f"merge.coefficients={error}") from None
        write_denoiser(temporary / DENOISER, merged, unet_config)
        write_pipeline_files(temporary, pretrained)
        watched.check()
        merged_hash = {WEIGHTS_HASH: sha256(temporary / DENOISER / WEIGHTS)}
        replace(record, beside=record.beside | merged_hash).write(temporary)


def write_card(config: Config, record: Record) -> None:
    """Write the merged folder's README.md, with the scores in results.json that belong to its network."""
    from deme.report.model_card import find_scores, model_card

    output = config.paths.merged
    scores = find_scores(config.paths.results, output / DENOISER / WEIGHTS)
    with atomic_file(output / "README.md") as temporary:
        temporary.write_text(model_card(config, record.made_from, scores), encoding="utf-8")


def push_to_hub(folder: Path, name: str, private: bool) -> None:
    """Upload a pipeline folder; the Hub's repository is made where it does not exist."""
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(name, exist_ok=True, **({"private": True} if private else {}))
        if private and not HfApi().repo_info(name).private:  # it was there before
            raise UserError("the Hub's repository is public, merge.push_private=true: nothing is uploaded")
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Merged by Decouple-then-Merge")
    except Exception as error:  # network, token and permission errors have no common class
        raise UserError(f"merge.push_to_hub={name}: {one_line(error)}") from None
    print(f"uploaded {folder}: {commit}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
