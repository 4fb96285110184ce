"""Merging whole models tensor by tensor: coefficients by name pattern, merge methods, the candidates of a search."""

import copy
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from deme.errors import UserError

Tensors = Mapping[str, torch.Tensor]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PUBLISHED = (0.1, 0.1, 0.2, 0.5)  # the paper's coefficients for LSUN-Church, of four equal ranges, lowest first
PART = 2**18  # elements worked on at a time, so that intermediate results stay in the processor's cache
REST = "rest"  # outside of all blocks
BLOCKS = ("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "blocks", REST)  # of a denoiser, in order
BLOCKS += ("text_encoder", "text_encoder_2")
BLOCK = re.compile(r"(?:(?:(?:down|up|transformer)_)?blocks\.\d+|mid_block)\.")  # how its tensors' names begin


def block_of(name: str) -> str:
    """The block of a tensor by its name; outside of all blocks it is a text encoder, or REST."""
    match, part = BLOCK.match(name), name.partition(".")[0]
    outside = part if part.startswith("text_encoder") else REST
    return outside if match is None else match[0].removesuffix(".")


def in_order(blocks: Iterable[str]) -> list[str]:
    """Blocks in the order of the forward pass, 10 after 9; then what lies outside."""
    return sorted(blocks, key=lambda block: (BLOCKS.index(block.partition(".")[0]), len(block), block))


def pattern_of(name: str, patterns: Iterable[str]) -> str:
    """The first name pattern that fits a tensor's name."""
    return _present(name, _fitting(name, patterns))


def _fitting(name: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _present(name: str, pattern: str | None) -> str:
    if pattern is None:
        raise UserError(f"no pattern fits the tensor {name}; add one for '*'")
    return pattern


def patterns_of(groups: str | Sequence[str], names: Sequence[str]) -> list[str]:
    """The name patterns of groups of tensors, each of which has its own coefficients.

    Groups are range (one of all tensors), block (and one of the tensors outside), tensor, or the patterns themselves.
    """
    blocks = dict.fromkeys(f"{match[0]}*" for match in map(BLOCK.match, names) if match)
    named = {"range": ["*"], "block": [*blocks, "*"], "tensor": list(names)}
    patterns = named[groups] if isinstance(groups, str) else list(groups)
    for name, pattern in used_patterns(patterns, names).items():
        _present(name, pattern)
    return patterns


def used_patterns(patterns: Collection[str], names: Iterable[str]) -> dict[str, str | None]:
    """Name of a tensor → the first name pattern that fits it, None if none does.

    A pattern that no tensor is left for is refused: its coefficients would change nothing.
    """
    found = {name: _fitting(name, patterns) for name in names}
    for pattern in Counter(list(patterns)) - Counter({*found.values()}):
        raise UserError(f"no tensor is left for the pattern {pattern}")
    return found


def coefficients_of(
    names: Iterable[str], groups: Mapping[str, list[float]], whole: Iterable[str]
) -> dict[str, list[float]]:
    """The coefficients of tensors, by name, from those by name pattern; each must fit a tensor of the whole network."""
    found = used_patterns(groups, whole)
    return {name: groups[_present(name, found[name])] for name in names}


class MergeMethod(ABC):
    """Base of the dataclasses in deme/method/merging/, which make one network of a pretrained one and its copies."""

    def check_inputs(self, weights: Iterable[str], statistics: Path) -> None:  # noqa: B027  not every method needs it
        """Look for what it needs beside the networks, whose weights have these SHA-256, before anything is merged."""

    def prepare(self, pretrained: Tensors, finetuned: Sequence[Tensors]) -> None:  # noqa: B027  not every method needs it
        """Look at the whole models once, before their tensors are merged one by one."""

    @abstractmethod
    def merge_tensor(
        self, name: str, pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor], coefficients: Sequence[float]
    ) -> torch.Tensor:
        """The merged tensor of this name, in float32, contiguous; it is stored in the pretrained tensor's type.

        The tensors are of any floating-point type and of one shape, of at least one dimension; each finetuned one has
        its coefficient.
        """

    def describe(self) -> dict[str, Any]:
        """The method and its settings, for the record of a merge: {method: ties, ties_fraction: 0.2, ...}."""
        name = type(self).__module__.rpartition(".")[2]
        return {"method": name, **{f"{name}_{key}": value for key, value in asdict(self).items()}}


def merge_method(name: str, settings: Mapping[str, Any]) -> MergeMethod:
    """The merge method in deme/method/merging/NAME.py, with the settings in merge.settings."""
    kind = getattr(import_module(f"deme.method.merging.{name}"), name.title().replace("_", ""))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(settings)))
    except OmegaConfBaseException as error:
        key, rule = error.full_key, str(error).splitlines()[0]
        raise UserError(f"merge.settings.{key}={settings.get(key)}: {rule}") from None
    except UserError as error:  # of the class itself
        raise UserError(f"merge.settings.{error}") from None


def check_compatible(pretrained: Tensors, finetuned: Tensors, name: str) -> None:
    """Check that two models' tensors can be merged, by name, type and shape; `name` is the finetuned model's."""
    for key in sorted({*pretrained, *finetuned}):
        for tensors, owner in ((pretrained, "the pretrained model"), (finetuned, name)):
            if key in tensors and tensors[key].dtype not in FLOATS:
                kind = str(tensors[key].dtype).removeprefix("torch.")
                raise UserError(f"{owner}: tensor {key} is of the type {kind}, which can't be merged")
        if key not in finetuned:
            raise UserError(f"{name}: the pretrained model's tensor {key} is missing")
        if key not in pretrained:
            raise UserError(f"{name}: tensor {key} is not in the pretrained model")
        if finetuned[key].shape != pretrained[key].shape:
            shapes = f"{tuple(finetuned[key].shape)}, in the pretrained model {tuple(pretrained[key].shape)}"
            raise UserError(f"{name}: tensor {key} has the shape {shapes}")


def check_finite(name: str, key: str, tensor: torch.Tensor) -> None:
    """Check that a model's tensor holds no NaN and no infinity."""
    if not torch.isfinite(tensor).all():
        raise UserError(f"{name}: tensor {key} holds NaN or infinite values")


class Moved:
    """How far each network moves the weights of each block: the norm of its task vector times its coefficients."""

    def __init__(self):
        self.squares: dict[str, np.ndarray] = {}  # (2, N): Σ (w τ)² by block, and the same with the signs of the w

    def add(self, name: str, lengths: Sequence[float], coefficients: Sequence[float]) -> None:
        """Add a tensor's task vectors by their norms."""
        block, moved = block_of(name), np.square(np.multiply(lengths, coefficients))
        self.squares[block] = self.squares.get(block, 0) + np.stack([moved, moved * np.sign(coefficients)])

    @property
    def by_block(self) -> dict[str, list[float]]:
        """The norms by block, to six digits: negative where more is subtracted than added."""
        rows = {block: np.sqrt(total) * np.where(net < 0, -1, 1) for block, (total, net) in self.squares.items()}
        return {block: [float(f"{value:.6g}") for value in rows[block]] for block in in_order(rows)}


def lengths(pretrained: torch.Tensor, finetuned: Sequence[torch.Tensor]) -> np.ndarray:
    """‖finetuned_k − pretrained‖ of one tensor, float64, shape (N,), without a copy of it."""
    squares = np.zeros(len(finetuned))
    for base, *experts in zip(*(tensor.reshape(-1).split(PART) for tensor in (pretrained, *finetuned)), strict=True):
        base = base.float()
        squares += [float((expert.float() - base).square_().sum()) for expert in experts]
    return np.sqrt(squares)


def merge_tensors(
    pretrained: Tensors,
    finetuned: Mapping[str, Tensors],
    coefficients: Mapping[str, list[float]],
    method: MergeMethod,
    moved: Moved | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Merge whole models: yields (tensor name, merged tensor), of the pretrained tensors' types.

    Each tensor's name gives one coefficient per finetuned model. Too large ones raise OverflowError. `moved` is told
    of each task vector while its tensors are at hand.
    """
    for name, tensors in finetuned.items():
        check_compatible(pretrained, tensors, name)
    method.prepare(pretrained, list(finetuned.values()))
    for key, base in pretrained.items():
        experts = [tensors[key] for tensors in finetuned.values()]
        merged = merged_tensor(method, key, base, experts, coefficients[key]).to(base.dtype)
        if not torch.isfinite(merged.sum()):  # one pass over the result finds any input that is not finite
            for name, tensors in {"the pretrained model": pretrained, **finetuned}.items():
                check_finite(name, key, tensors[key])
            if not torch.isfinite(merged).all():
                raise OverflowError(f"{coefficients[key]}: too large for tensor {key}, which overflows")
        if moved is not None:
            moved.add(key, lengths(base, experts), coefficients[key])
        yield key, merged


def merged_tensor(
    method: MergeMethod,
    name: str,
    pretrained: torch.Tensor,
    finetuned: Sequence[torch.Tensor],
    coefficients: Sequence[float],
) -> torch.Tensor:
    """The merged tensor of this name, in float32; a scalar is a vector with one entry."""
    first, *others = torch.atleast_1d(pretrained, *finetuned)
    return method.merge_tensor(name, first, others, coefficients).reshape(pretrained.shape)


def random_directions(
    pretrained: Tensors, finetuned: Tensors, seed: Sequence[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A network in a random direction, in each tensor as far from the pretrained one as a finetuned one: float32."""
    random = np.random.default_rng(seed)
    for name in sorted(pretrained):
        base = pretrained[name].float()
        drawn = torch.from_numpy(np.asarray(random.standard_normal(tuple(base.shape), dtype=np.float32)))
        yield name, base + drawn * ((finetuned[name].float() - base).norm() / drawn.norm())


class Candidates:
    """The networks that a merge method gives with any coefficients; it is the sum unless another one is given.

    The sum is pretrained + Σ_k w_gk (finetuned_k − pretrained). A GPU gets a copy of all weights. Mapped tensors stay
    mapped on a CPU, so that the processes of a host share them. `group_of` has the number g of each tensor's group.
    """

    def __init__(
        self,
        pretrained: Tensors,
        finetuned: Mapping[str, Tensors],
        group_of: Mapping[str, int],
        device: torch.device,
        method: MergeMethod | None = None,
    ):
        for name, tensors in finetuned.items():
            check_compatible(pretrained, tensors, name)
        for name, tensors in {"the pretrained model": pretrained, **finetuned}.items():
            for key, tensor in tensors.items():
                check_finite(name, key, tensor)
        self.pretrained = {name: tensor.to(device) for name, tensor in pretrained.items()}
        self.finetuned = [{name: tensors[name].to(device) for name in pretrained} for tensors in finetuned.values()]
        self.group_of = group_of
        self.shape = (max(group_of.values()) + 1, len(self.finetuned))
        self.method = method or merge_method("task_arithmetic", {})
        self.method.prepare(self.pretrained, self.finetuned)

    def ungrouped(self) -> "Candidates":
        """The same weights with one coefficient per range for all tensors."""
        whole = copy.copy(self)
        whole.group_of = dict.fromkeys(self.group_of, 0)
        whole.shape = (1, self.shape[1])
        return whole

    @torch.no_grad()
    def form(self, network: nn.Module, coefficients: Any) -> None:
        """Make a network the candidate of coefficients of shape (groups, ranges), in place, in its floating-point type.

        Those of shape (ranges,) hold for all groups. In float32 on a CPU it equals bit for bit what merge.py writes.
        """
        rows = np.broadcast_to(np.asarray(coefficients, dtype=np.float64), self.shape).tolist()
        for name, target in network.state_dict().items():
            experts = [tensors[name] for tensors in self.finetuned]
            target.copy_(merged_tensor(self.method, name, self.pretrained[name], experts, rows[self.group_of[name]]))

    @torch.no_grad()
    def form_expert(self, network: nn.Module, number: int) -> None:
        """Make a network the copy that was finetuned on a range."""
        for name, target in network.state_dict().items():
            target.copy_(self.finetuned[number][name])

    def task_vector(self, group: int, number: int) -> dict[str, torch.Tensor]:
        """finetuned − pretrained of one range, for the tensors of one group: float32, by name."""
        return {
            name: self.finetuned[number][name].float() - base.float()
            for name, base in self.pretrained.items()
            if self.group_of[name] == group
        }

    def gradient(self, network: nn.Module) -> torch.Tensor:
        """The gradient by the coefficients, from that of a network's parameters: float64, shape (groups, ranges).

        ∂L/∂w_gk = Σ over the tensors θ of group g of ⟨∂L/∂θ, finetuned_k − pretrained⟩.
        """
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=next(network.parameters()).device)
        for name, parameter in network.named_parameters():
            base = self.pretrained[name].float()
            for k, tensors in enumerate(self.finetuned):
                gradient[self.group_of[name], k] += (parameter.grad.float() * (tensors[name].float() - base)).sum()
        return gradient
