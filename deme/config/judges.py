"""Judges: the networks of evaluate.features, in whose features images are compared."""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from deme.errors import UserError, naming, one_line

FORMS = {  # by library: how a judge is written
    "inception": "inception",
    "classifier": "classifier",
    "torchvision": "torchvision:NETWORK=FILE.safetensors",
    "timm": "timm:NETWORK=FILE.safetensors",
    "dinov2": "dinov2=FOLDER",
}
DINOV2 = {(384, 12, 14): "vits14", (768, 12, 14): "vitb14", (1024, 24, 14): "vitl14", (1536, 40, 14): "vitg14"}
SIZES = ("hidden_size", "num_hidden_layers", "patch_size")  # in config.json, as in DINOV2
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".tar")  # loading them may run code
CONVERT = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('{}', weights_only=True), '{}', "
    "{{'format': 'pt'}})\""
)


@dataclass(frozen=True)
class Judge:
    """One of FORMS."""

    text: str  # as it is written
    library: str
    network: str
    path: Path | None  # of its weights; None: they are downloaded or trained

    @cached_property
    def files(self) -> list[Path]:
        """The files that it is read from: safetensors, and DINOv2's config.json; all are there."""
        if self.path is None:
            return []
        is_folder = self.library == "dinov2"
        weights = self.path / "model.safetensors" if is_folder else self.path
        pickled = self.path / "pytorch_model.bin" if is_folder else self.path
        with naming("evaluate.features", self.text):
            if pickled.suffix in PICKLED and pickled.is_file() and not (is_folder and weights.is_file()):
                command = CONVERT.format(pickled, weights.with_suffix(".safetensors"))
                raise UserError(f"{pickled} is pickled, and never loaded; this converts it: {command}")
            files = [self.path / "config.json", weights] if is_folder else [weights]
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file}: no such file")
            if weights.suffix != ".safetensors":
                raise UserError("not a .safetensors file")
        return files

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, or of the hashes of several."""
        hashes = []
        for path in self.files:
            with path.open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @cached_property
    def name(self) -> str:
        """The name of its feature space, in tables and files: with the network and eight digits of the hash."""
        if self.path is None:
            return self.library
        return f"{self.library}-{self.network or self._size()}-{self.digest[:8]}"

    def _size(self) -> str:
        """The network's name by the sizes in DINOv2's config.json, or these sizes."""
        with naming("evaluate.features", self.text), naming(self.files[0]):
            try:
                config = json.loads(self.files[0].read_text(encoding="utf-8"))
                if config["model_type"] != "dinov2":
                    raise UserError(f"the model is of the type {config['model_type']}, not dinov2")
                sizes = tuple(int(config[key]) for key in SIZES)
            except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
                raise UserError(f"not the config.json of a DINOv2 model ({one_line(error)})") from None
        return DINOV2.get(sizes, "x".join(map(str, sizes)))


def read_judge(text: object) -> Judge | None:
    """The judge that a text names; None if it is none of FORMS."""
    match = re.fullmatch(r"(\w+)(:[\w.-]+)?(=.+)?", text) if isinstance(text, str) else None
    form = FORMS.get(match[1], "?") if match else "?"
    if match is None or form == "?" or [":" in form, "=" in form] != [match[2] is not None, match[3] is not None]:
        return None
    path = None if match[3] is None else Path(match[3][1:]).expanduser()
    return Judge(text, match[1], (match[2] or ":")[1:], path)
