"""Merge: pretrained + Σ_k w_k (finetuned_k − pretrained), one coefficient w_k per timestep range.

    python merge.py
    python merge.py "merge.coefficients=[0.1,0.1,0.2,0.5]" merge.output=runs/digits/merged-by-hand
    python merge.py merge.method=ties merge.settings.fraction=0.1 merge.output=runs/digits/merged-ties
    python merge.py merge.coefficients=search           # what search.py found
    python merge.py "merge.coefficients={up_blocks.*: [0.5,0.5,0.5,0.5], '*': [0.1,0.1,0.1,0.1]}"
    python merge.py merge.push_to_hub=owner/name        # upload it
    python merge.py merge.single_file=true              # also write one file with the pipeline, for ComfyUI and A1111
    python merge.py "merge.experts=[a.safetensors,b.safetensors]" "merge.coefficients=[0.7,0.5]"    # LoRAs

Writes a diffusers pipeline folder, runs/<name>/merged/, with the pretrained scheduler's configuration, merge.yaml (the
inputs with their SHA-256, the coefficients) and the model card README.md. If the output is complete, only its card is
written again, with the scores that evaluate.py has found since. LoRAs are merged into one LoRA,
pytorch_lora_weights.safetensors, or into the pretrained pipeline (merge.into=model).
"""

import deme.job.early  # noqa: F401, I001  Ctrl-C may come while the rest is imported

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deme.config.experiment import Config
from deme.config.networks import RANGES, SUM, makes_lora, of_loras
from deme.config.paths import LORA, denoiser_in
from deme.config.trainings import SELF
from deme.errors import UserError, blaming, naming
from deme.job.command import run_script
from deme.job.files import Watched, atomic_folder, check_apart, locked, read_json, sha256, write_text
from deme.job.records import LORA_ERRORS, MERGED, MOVED, WEIGHTS_HASH, Record, provenance, read_record
from deme.models import averages, variants
from deme.models.pipelines import denoiser_folder
from deme.models.trained import tell_other_bases
from deme.models.weights import WEIGHTS, weights_hash
from deme.models.variants import ModelFiles
from deme.models.searched import Searched, read_searched

if TYPE_CHECKING:
    from deme.method.task_vectors import MergeMethod

NAMED_BY = dict.fromkeys((RANGES, SELF), "timesteps")  # keys of merge.yaml that are older than other networks
IN_HEADER = ("pretrained", "finetuned", "coefficients")  # of a file: keys of merge.yaml
Groups = dict[str, list[float]]  # name pattern → coefficients, one per range


def plan(config: Config) -> str:
    """What this command would do."""
    if config.merge.settings:  # else torch is not needed
        from deme.method.task_vectors import merge_method

        merge_method(config.merge.method, config.merge.settings)  # checks the settings
    file = searched_file(config)
    groups = config.coefficient_groups if file is None else {"those in": file}
    coefficients = [f"  {pattern}: {coefficients}" for pattern, coefficients in groups.items()]
    inputs = [f"  {folder}" for folder in config.paths.finetuned]
    title = f"merge {config.paths.pretrained} and the following by {config.merge.method} -> {config.paths.merged}"
    upload = [] if config.merge.push_to_hub is None else [f"upload it to {config.merge.push_to_hub}"]
    return "\n".join([title, *inputs, "with the coefficients", *coefficients, *upload])


def main(config: Config) -> None:
    """Merge, unless it is done; write the card; upload."""
    # --- inputs
    output = config.paths.merged
    pretrained = variants.find_pretrained(config.paths)
    searched = find_searched(config)
    width = config.merge.ema_width if searched is None else searched.width(config)
    inputs = ModelFiles(pretrained, [denoiser_folder(pretrained), *averages.merged_folders(config, pretrained, width)])
    groups = config.coefficient_groups if searched is None else searched.groups(config)
    check_apart("merge.output", output, inputs.denoisers)
    # also where the output is complete: another version may have merged it
    architecture = variants.common_architecture(inputs.folders)
    watched = inputs.watched()
    with ThreadPoolExecutor() as pool:
        hashing, beside = pool.map(weights_hash, inputs.denoisers), pool.submit(inputs.hashes)
        from deme.method.task_vectors import merge_method  # torch is imported meanwhile, which takes about as long

        method = merge_method(config.merge.method, config.merge.settings)
        hashes = list(hashing)
    tell_origins(inputs.denoisers, hashes)
    method.check_inputs(hashes[1:], config.paths.merge_statistics)
    if config.merge.single_file:
        from deme.models.single_file import check_original

        with naming("merge.single_file", True):
            check_original(pretrained, architecture)
    if searched is not None:
        check_searched(config, searched, hashes, method)

    # --- the record: what the result is made from
    made_from = {
        **method.describe(),
        **of_loras(config),
        "coefficients": groups,
        "pretrained": {"path": config.paths.pretrained, "sha256": hashes[0]},
        "finetuned": [
            {NAMED_BY.get(network.word, "name"): network.name, "path": str(folder), "sha256": weights}
            | averages.recorded_average(folder)
            for network, folder, weights in zip(config.merged_networks, inputs.denoisers[1:], hashes[1:], strict=True)
        ],
        **beside.result(),
    }
    wanted = Record(MERGED, made_from, provenance(config))

    # --- merge, unless the output is complete
    with locked(output, "merge.output"):
        is_lora = makes_lora(config)
        if is_complete(output, wanted, is_lora, architecture):
            print(f"{output} is complete")
        else:
            (write_lora if is_lora else write_merged)(config, inputs, groups, method, wanted, watched)
            print(f"wrote {output}")
        if not is_lora:
            write_card(config, wanted)
        if config.merge.single_file and not config.paths.merged_file.exists():
            write_single_file(config, wanted)

    # --- share
    if config.merge.push_to_hub is not None:
        push_to_hub(output, config.merge.push_to_hub, config.merge.push_private)


def tell_origins(networks: list[Path], hashes: list[str]) -> None:
    """Print which networks have the weights of an earlier one, or another base than the first, the pretrained one."""
    tell_other_bases(networks[0], hashes[0], networks[1:])
    earlier: dict[str, str] = {}
    for weights, name in zip(hashes, ["the pretrained network", *map(str, networks[1:])], strict=True):
        if weights in earlier:
            print(f"{name}: has the same weights as {earlier[weights]}")
        earlier.setdefault(weights, name)


def searched_file(config: Config) -> Path | None:
    """The file of search.py that merge.coefficients names; None where it holds the coefficients itself."""
    given = config.merge.coefficients
    if not isinstance(given, str):
        return None
    return config.paths.best_coefficients if given == "search" else Path(given)


def find_searched(config: Config) -> Searched | None:
    """The coefficients of search.py, if merge.coefficients asks for them."""
    file = searched_file(config)
    if file is None:
        return None
    with naming("merge.coefficients", config.merge.coefficients):
        numbers = re.split(r"[,\s]+", str(file))
        if len(numbers) > 1 and all(re.fullmatch(r"[-+]?[.\d]+(e[-+]?\d+)?", number) for number in numbers):
            raise UserError(f"no file; a list is written [{','.join(numbers)}]")
        return read_searched(file)


def check_searched(config: Config, searched: Searched, hashes: list[str], method: "MergeMethod") -> None:
    """Refuse coefficients of other networks, by the hashes of their weights; tell of those of another merge method.

    A hand-written file may name no networks.
    """
    if (searched.pretrained, searched.finetuned) not in ((hashes[0], hashes[1:]), (None, None)):
        remedy = "search again, or write its coefficients into the configuration"
        raise UserError(f"merge.coefficients={config.merge.coefficients}: found for other networks; {remedy}")
    found_for = searched.merged_by or {"method": SUM}
    if found_for != method.describe():
        told = [", ".join(f"{key}={value}" for key, value in one.items()) for one in (found_for, method.describe())]
        print(f"{searched.file}: found for {told[0]}, used with {told[1]}")


def is_complete(output: Path, wanted: Record, is_lora: bool, architecture: Path) -> bool:
    """True if the output was merged from the same inputs and still holds the result.

    `architecture` is the folder of a network that is built as the merged one should be.
    """
    if not output.exists():
        return False
    record = read_record(MERGED, output)
    if record is None:
        raise UserError(f"merge.output={output}: exists without a {MERGED.file}, so it is not replaced")
    if not record.fits(wanted, output):
        return False
    try:
        file, parts = output / LORA, {}
        if not is_lora:
            network = denoiser_in(output)
            variants.common_architecture([network, architecture])  # refuses others
            file, parts = network / WEIGHTS, ModelFiles(output, [network]).hashes()
        if wanted.made_from | parts == wanted.made_from and sha256(file) == record.beside.get(WEIGHTS_HASH):
            return True
    except (OSError, UserError):  # a file is missing, or another architecture
        pass
    print(f"{output} no longer holds what was merged: replacing it")
    return False


def write_merged(
    config: Config, inputs: ModelFiles, groups: Groups, method: "MergeMethod", record: Record, watched: Watched
) -> None:
    """Merge denoisers into a pipeline folder; their weights are memory-mapped, only the result is held in memory.

    Args:
        inputs: the pretrained denoiser, then the finetuned ones in the order of the coefficients.
        watched: the files that the record names by their hashes.
    """
    from deme.method.task_vectors import Moved, coefficients_of, merge_tensors
    from deme.models.merging import changed_parts, load_merged

    architecture, pretrained, networks = load_merged(inputs.pipeline, inputs.denoisers[1:])
    base, finetuned = changed_parts(pretrained, networks)
    with naming("merge.coefficients", groups):
        coefficients = coefficients_of(base, groups, pretrained)

    moved = Moved()
    with atomic_folder(config.paths.merged) as temporary:
        try:
            merged = {**pretrained, **dict(merge_tensors(base, finetuned, coefficients, method, moved))}
        except OverflowError as error:
            raise UserError(f"merge.coefficients={error}") from None
        variants.write_denoiser(temporary, merged, read_json(architecture / "config.json"))
        variants.write_pipeline_files(temporary, inputs.pipeline)
        watched.check()
        beside = {WEIGHTS_HASH: sha256(denoiser_in(temporary) / WEIGHTS), MOVED: moved.by_block}
        replace(record, beside=record.beside | beside).write(temporary)


def write_lora(
    config: Config, inputs: ModelFiles, groups: Groups, method: "MergeMethod", record: Record, watched: Watched
) -> None:
    """Merge LoRAs into one: a sum exactly, unless merge.lora_rank truncates it, all else truncated.

    The errors of a truncation are printed and recorded.
    """
    from deme.method.lora import ALL
    from deme.models import lora
    from deme.models.merging import merge_lora_files

    settings = config.merge
    files = inputs.denoisers[1:]
    merged, errors, moved = merge_lora_files(inputs.pipeline, files, groups, method, settings.lora_rank)
    settings.check("coefficients", len(merged) > 0, "leave nothing to write")
    if errors:
        rank = "the sum of the ranks" if settings.lora_rank is None else f"merge.lora_rank={settings.lora_rank}"
        print(f"{settings.method} is truncated to {rank}: relative error {errors[ALL]:.3g} of the merged LoRA")
    with atomic_folder(config.paths.merged) as temporary:
        made_from = {key: record.made_from[key] for key in IN_HEADER}
        with naming("merge.lora_format", settings.lora_format):
            names = lora.kohya_names(lora.layers_of(inputs.pipeline)) if settings.lora_format == "kohya" else None
        lora.write_lora(temporary / LORA, merged, made_from, names)
        watched.check()
        beside = {WEIGHTS_HASH: sha256(temporary / LORA), LORA_ERRORS: errors, MOVED: moved.by_block}
        replace(record, beside=record.beside | beside).write(temporary)


def write_card(config: Config, record: Record) -> None:
    """Write the merged folder's README.md, with the scores in results.json that belong to its network."""
    from deme.report.model_card import model_card

    write_text(config.paths.merged / "README.md", model_card(config, record.made_from))


def write_single_file(config: Config, record: Record) -> None:
    """Write the whole merged pipeline in one file, into its folder."""
    from deme.models import single_file

    made_from = {key: record.made_from[key] for key in IN_HEADER}
    single_file.write_single_file(config.paths.merged_file, config.paths.merged, made_from)
    print(f"wrote {config.paths.merged_file}")


def push_to_hub(folder: Path, name: str, private: bool) -> None:
    """Upload a pipeline folder; the Hub's repository is made where it does not exist."""
    from huggingface_hub import HfApi

    with blaming(f"merge.push_to_hub={name}"):  # network, token and permission errors have no common class
        HfApi().create_repo(name, exist_ok=True, **({"private": True} if private else {}))
        if private and not HfApi().repo_info(name).private:  # it was there before
            raise UserError("the Hub's repository is public, merge.push_private=true: nothing is uploaded")
        commit = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Merged by Decouple-then-Merge")
    print(f"uploaded {folder}: {commit}")


if __name__ == "__main__":
    run_script(__doc__, plan, main)
