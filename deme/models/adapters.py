"""LoRAs on networks, by peft: one to train, or several on one base. All share the weights of the frozen base."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from deme.config.networks import is_lora
from deme.config.trainings import ALL_LINEAR, ATTENTION, Finetune
from deme.errors import UserError, naming
from deme.method.lora import Factors, Lora
from deme.models.denoisers import AUTOCAST_TYPES, load_denoiser, settings_of
from deme.models.kinds import subfolder_of
from deme.models.lora import folded, in_denoiser, read_loras
from deme.models.pipelines import denoiser_folder

ADAPTER = "default"  # peft's name of it
ATTENTION_LAYER = re.compile(r"\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)$")  # add: of the text, beside the image


def chosen_layers(network: nn.Module, settings: Finetune) -> list[str]:
    """The layers that finetune.lora_targets names, all of them large enough for finetune.lora_rank."""
    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    targets = settings.lora_targets
    if targets == ATTENTION:
        names = list(filter(ATTENTION_LAYER.search, layers))
    elif targets == ALL_LINEAR:
        names = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    else:
        names = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in targets)]
        for pattern in targets:
            fits = any(fnmatchcase(name, pattern) for name in names)
            settings.check("lora_targets", fits, f"{pattern} fits no linear layer and no convolution of the network")
    settings.check("lora_targets", names != [], "the network has no such layer")
    for name in names:
        smallest = min(len(layers[name].weight), layers[name].weight[0].numel())
        settings.check("lora_rank", settings.lora_rank <= smallest, f"above {smallest}, the smallest side of {name}")
    return names


def freeze_base(network: nn.Module, settings: Finetune) -> None:
    """Freeze a network, but for a LoRA that it has; its linear layers and convolutions get finetune.base_precision.

    Autocast computes in that type. Without a LoRA, mistakes in its settings show.
    """
    if not lora_layers(network):
        network.requires_grad_(False)
        chosen_layers(network, settings)
    dtype = AUTOCAST_TYPES[settings.base_precision or "no"]
    for name, module in network.named_modules() if dtype is not None else ():
        weights = list(module.parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(weight.requires_grad for weight in weights):
            nn.Module.to(module, dtype)  # diffusers' own warns
            settings.check("base_precision", all(weight.isfinite().all() for weight in weights), f"{name} overflows")


def sharing_weights(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters are the same tensors."""
    return copy.deepcopy(network, {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})


def new_lora(base: nn.Module, settings: Finetune) -> nn.Module:
    """A network that shares the weights of a frozen base, with a LoRA to train as `finetune` says."""
    ranks = dict.fromkeys(chosen_layers(base, settings), settings.lora_rank)
    return with_lora(base, ranks, 1.0 if settings.lora_alpha is None else settings.lora_alpha / settings.lora_rank)


def with_lora(base: nn.Module, ranks: Mapping[str, int], scale: float = 1.0) -> nn.Module:
    """A network that shares the weights of a base, which are frozen, with a new LoRA in float32.

    `ranks` has the rank r by the layer's name. The LoRA changes nothing yet: A is drawn by torch's generator, B is 0.
    """
    network = sharing_weights(base.requires_grad_(False))
    patterns = {re.escape(name): rank for name, rank in ranks.items()} if len(set(ranks.values())) > 1 else {}
    rank = max(ranks.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,
        target_modules="|".join(map(re.escape, ranks)),  # a list would also fit ends of names
        rank_pattern=patterns,
        alpha_pattern={pattern: scale * rank for pattern, rank in patterns.items()},
    )
    inject_adapter_in_model(config, network, ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def with_trained_lora(base: nn.Module, lora: Lora) -> nn.Module:
    """A network that shares the weights of a base and has this LoRA of its layers."""
    mine = {in_denoiser(layer): factors for layer, factors in lora.items()}
    if None in mine:
        other = next(layer for layer in lora if in_denoiser(layer) is None)
        raise UserError(f"changes {other}, which is not of the denoiser: merge.into=lora keeps it")
    network = with_lora(base, {name: factors.rank for name, factors in mine.items()})
    with torch.no_grad():
        for name, module in lora_layers(network).items():
            up = module.lora_B[ADAPTER].weight
            module.lora_A[ADAPTER].weight.copy_(mine[name].down)
            up.copy_(mine[name].up.reshape(up.shape))
    return network.eval()


def lora_layers(network: nn.Module) -> dict[str, LoraLayer]:
    """The layers that a LoRA changes, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, LoraLayer)}


def lora_of(network: nn.Module) -> dict[str, Factors]:
    """The LoRA that a network has: float32, on the CPU, with its scale in `up`."""
    found, subfolder = {}, subfolder_of(settings_of(network))
    for name, module in lora_layers(network).items():
        down, up = (part[ADAPTER].weight.detach().float().cpu() for part in (module.lora_A, module.lora_B))
        found[f"{subfolder}.{name}"] = Factors(down.clone(), module.scaling[ADAPTER] * up.flatten(1))
    return found


def load_denoisers(pipeline: Path, paths: Sequence[Path]) -> Iterator[nn.Module]:
    """Load the denoisers in folders, or with LoRAs from their files, one by one: float32, in eval mode.

    LoRAs share one base in memory, the pipeline's denoiser; a single one is added to its weights.
    """
    if not any(map(is_lora, paths)):
        yield from map(load_denoiser, paths)
        return
    base, loras = load_denoiser(denoiser_folder(pipeline)), read_loras(pipeline, paths)
    if len(paths) == 1:
        with naming(paths[0]):
            tensors = base.state_dict()
            changed = folded(tensors, *loras.values())
            for name in changed.lora:
                tensors[name].copy_(changed[name])
        yield base
        return
    for file, lora in loras.items():
        with naming(file):
            network = with_trained_lora(base, lora)
        yield network
