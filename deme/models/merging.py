"""What a merge loads: the tensors of the pretrained denoiser, and those of each network or LoRA that is merged."""

from collections.abc import Sequence
from pathlib import Path

from deme.errors import naming
from deme.method.projection import with_identity_projections
from deme.method.task_vectors import Tensors
from deme.models.lora import folded, layers_of, read_lora
from deme.models.pipelines import denoiser_folder, load_tensors
from deme.models.variants import common_architecture


def load_merged(pipeline: Path, networks: Sequence[Path]) -> tuple[Path, Tensors, dict[str, Tensors]]:
    """The folder with the architecture of all, the pretrained denoiser's tensors, and those of the others by path.

    Networks are folders, memory-mapped, or the files of LoRAs. A LoRA gives the pretrained tensors with its changes
    added: those of the layers that it has, in float32, are in memory.
    """
    folder = denoiser_folder(pipeline)
    if any(map(Path.is_file, networks)):
        base, layers, changed = load_tensors(folder), layers_of(pipeline), {}
        for file in networks:
            with naming(file):
                changed[str(file)] = folded(base, read_lora(file, layers))
        return folder, base, changed
    architecture = common_architecture([folder, *networks])
    like = load_tensors(architecture)
    base, *others = (with_identity_projections(load_tensors(path), like) for path in (folder, *networks))
    return architecture, base, dict(zip(map(str, networks), others, strict=True))
