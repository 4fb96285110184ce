"""Reads the pickled weights that the authors published, without running code from them.

Two kinds exist: a whole pickled module (the merged network) and plain state dicts (finetuned networks). Both are zip
files of torch.save. Their pickle is read by an unpickler that knows tensors and dictionaries only; every other class or
function that the file names becomes an inert stand-in, which is never imported and never called.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deme.errors import UserError, one_line
from deme.method.projection import PROJECTION_SUFFIX

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
OLD_PROJECTION = "adapter_list."  # the published code's name of the channel-wise projections


class Inert:
    """Replaces an object of an unknown class: stores what the pickle gives it and does nothing."""

    def __init__(self, *_arguments: Any, **_keywords: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def ignore(self, *_content: Any) -> None:
        """Whatever a dictionary, a list or a set would be filled with."""

    __setitem__ = append = extend = add = ignore


class Rebuild:
    """A function of torch's that rebuilds tensors, replaced by ours; nothing in a pickle can change it."""

    __slots__ = ("kind",)

    def __init__(self, kind: str):
        object.__setattr__(self, "kind", kind)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("an attempt to change a function")

    def __call__(self, *arguments: Any) -> torch.Tensor:
        if self.kind == "parameter":  # (data, requires_grad, backward hooks)
            return _require_tensor(arguments[0])
        storage, offset, size, stride = arguments[:4]  # then requires_grad, backward hooks
        storage = _require_tensor(storage)
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise pickle.UnpicklingError("a tensor of impossible shape")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise pickle.UnpicklingError("a tensor that reaches beyond its storage")
        return storage.as_strided(size, stride, offset).clone()


def _require_tensor(value: Any) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise pickle.UnpicklingError(f"a tensor made of {type(value).__name__}")
    return value


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors, numbers, strings and containers; see the module's docstring."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(archive.open(f"{prefix}/data.pkl"))
        self.archive = archive
        self.prefix = prefix

    def find_class(self, module: str, name: str) -> Any:
        """A class or function that the pickle names: ours, or an inert stand-in."""
        if (module, name) == ("collections", "OrderedDict"):
            return type("PlainDict", (dict,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return Rebuild("tensor")
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return Rebuild("parameter")
        if module == "torch" and name in STORAGES:
            return type(name, (Inert,), {"dtype": STORAGES[name]})
        return type(name, (Inert,), {})

    def persistent_load(self, reference: Any) -> torch.Tensor:
        """The content of a storage that the pickle refers to, as a flat tensor."""
        kind, storage_class, key, _device, length = reference
        dtype = getattr(storage_class, "dtype", None)
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"an unknown reference {kind!r}")
        content = bytearray(self.archive.read(f"{self.prefix}/data/{key}"))
        storage = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if len(storage) != length:
            raise pickle.UnpicklingError(f"storage {key} has {len(storage)} elements instead of {length}")
        return storage


def read_published(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a published file, by their names in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            [prefix] = {name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")}
            content = TensorUnpickler(archive, prefix).load()
        tensors = dict(_module_tensors(content)) if isinstance(content, Inert) else dict(content)
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise UserError(f"{path}: not a module or state dict that torch.save wrote ({one_line(error)})") from None
    named = all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items())
    if not tensors or not named:
        raise UserError(f"{path}: holds something else than tensors by name")
    for name in tensors:
        if not name.isprintable():  # such as half of a surrogate pair, which no file can hold
            raise UserError(f"{path}: holds a tensor named {name!a}")
    return tensors


def _module_tensors(module: Inert, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of every parameter and buffer of a pickled torch.nn.Module and of the modules in it."""
    state = module.state
    for part in ("_parameters", "_buffers"):
        for name, tensor in state[part].items():
            if tensor is not None:
                yield prefix + name, tensor
    for name, child in state["_modules"].items():
        if child is not None:
            yield from _module_tensors(child, f"{prefix}{name}.")


def rename_projections(tensors: dict[str, torch.Tensor], num_down_blocks: int, num_up_blocks: int) -> dict:
    """Give the projections our names: `adapter_list.{i}.weight` counts down blocks, mid block, up blocks."""
    down = [f"down_blocks.{i}" for i in range(num_down_blocks)]
    up = [f"up_blocks.{i}" for i in range(num_up_blocks)]
    blocks = [*down, "mid_block", *up]
    old = [name for name in tensors if name.startswith(OLD_PROJECTION)]
    names = {f"{OLD_PROJECTION}{i}.weight": f"{block}{PROJECTION_SUFFIX}" for i, block in enumerate(blocks)}
    if old and set(old) != set(names):
        raise UserError(f"{len(old)} projections for the pretrained UNet's {len(blocks)} blocks")
    return {names.get(name, name): tensor for name, tensor in tensors.items()}
