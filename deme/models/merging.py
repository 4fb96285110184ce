"""What a merge loads: the tensors of the pretrained denoiser, and those of each network or LoRA that is merged."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from deme.errors import naming
from deme.method.lora import Changed, Factors, merge_by, merge_loras
from deme.method.merging.task_arithmetic import TaskArithmetic
from deme.method.projection import with_identity_projections
from deme.method.task_vectors import MergeMethod, Moved, Tensors, coefficients_of
from deme.models.lora import by_tensor, folded, read_loras, tensor_of, weights_of
from deme.models.pipelines import denoiser_folder
from deme.models.variants import common_architecture
from deme.models.weights import load_tensors


def load_merged(pipeline: Path, networks: Sequence[Path]) -> tuple[Path, Tensors, dict[str, Tensors]]:
    """The folder with the architecture of all, the pretrained denoiser's tensors, and those of the others by path.

    Networks are folders, memory-mapped, or the files of LoRAs. A LoRA gives the pretrained tensors with its changes,
    which are added to a tensor when it is asked for.
    """
    folder = denoiser_folder(pipeline)
    if any(map(Path.is_file, networks)):
        base, changed = load_tensors(folder), {}
        for file, lora in read_loras(pipeline, networks).items():
            with naming(file):
                changed[file] = folded(base, lora)
        return folder, base, changed
    architecture = common_architecture([folder, *networks])
    like = load_tensors(architecture)
    base, *others = (with_identity_projections(load_tensors(path), like) for path in (folder, *networks))
    return architecture, base, dict(zip(map(str, networks), others, strict=True))


def load_changed(pipeline: Path, network: Path) -> Tensors:
    """The tensors of a network's folder, or those of the pipeline's denoiser with a LoRA's changes."""
    return load_merged(pipeline, [network])[2][str(network)] if network.is_file() else load_tensors(network)


def changed_parts(pretrained: Tensors, networks: Mapping[str, Tensors]) -> tuple[Tensors, Mapping[str, Tensors]]:
    """The tensors that a merge can change, of the pretrained network and of the others: of LoRAs only their layers.

    So a share of a task vector, such as that of TIES, is one of what LoRAs change, not of the whole network.
    """
    if not all(isinstance(tensors, Changed) for tensors in networks.values()):
        return pretrained, networks
    names = {name for tensors in networks.values() for name in tensors.lora}
    parts = {name: tensor for name, tensor in pretrained.items() if name in names}
    return parts, {name: Changed(parts, tensors.lora) for name, tensors in networks.items()}


def merge_lora_files(
    pipeline: Path, files: Sequence[Path], groups: Mapping[str, list[float]], method: MergeMethod, rank: int | None
) -> tuple[dict[str, Factors], dict[str, float], Moved]:
    """LoRA files merged into one LoRA, by layer; the relative errors of its truncation, by weight; and what moved what.

    `groups` has the coefficients by name pattern. Only task arithmetic without a rank needs no truncation.
    """
    weights = weights_of(pipeline)
    loras = {file: by_tensor(lora) for file, lora in read_loras(pipeline, files).items()}
    with naming("merge.coefficients", groups):
        changed = {name: None for lora in loras.values() for name in lora}
        coefficients = coefficients_of(changed, groups, [*load_tensors(denoiser_folder(pipeline)), *by_tensor(weights)])
    if isinstance(method, TaskArithmetic):
        merged, errors = merge_loras(loras, coefficients, rank)
    else:
        merged, errors = merge_by(method, by_tensor(weights), loras, coefficients, rank)
    moved = Moved()
    for name, values in coefficients.items():
        moved.add(name, [lora[name].norm() if name in lora else 0.0 for lora in loras.values()], values)
    layers = {tensor_of(layer): layer for layer in weights}
    return {layers[name]: factors for name, factors in merged.items()}, errors, moved
