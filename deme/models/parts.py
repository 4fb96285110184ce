"""The parts of a text-to-image pipeline beside its network, loaded; what fails is named after its part."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deme.errors import UserError, naming, one_line
from deme.models.pipelines import has_full_precision

LEAST_VOCABULARY = 256  # tokens: one for each byte
LEAST_LENGTH = 3  # tokens of a text: its start, its end, and one between


@contextmanager
def blaming(folder: Path) -> Iterator[None]:
    """Name the folder of a part in front of whatever diffusers, transformers and torch raise of what does not fit."""
    with naming(folder):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(one_line(error)) from None


def load_parts(pipeline: Path) -> tuple[nn.Module, nn.Module, Any]:
    """The VAE, the text encoder and the tokenizer, whose model_max_length is that of both."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what does not fit is told below, in one line
    vae = _load(pipeline / "vae", AutoencoderKL, torch_dtype=torch.float32)
    text_encoder = _load(pipeline / "text_encoder", CLIPTextModel, dtype=torch.float32)
    tokenizer = _load(pipeline / "tokenizer", CLIPTokenizer)
    with naming(pipeline / "tokenizer"):
        vocabulary = text_encoder.config.vocab_size
        if not LEAST_VOCABULARY <= len(tokenizer) <= vocabulary:  # transformers makes an empty one where it is missing
            raise UserError(f"{len(tokenizer)} tokens, the text encoder has {vocabulary}")
        length = tokenizer.model_max_length  # 1e30 where the folder names none
        if not isinstance(length, (int, float)) or not length >= LEAST_LENGTH:
            raise UserError(f"model_max_length={length}: must be a number of at least {LEAST_LENGTH}")
        tokenizer.model_max_length = int(min(length, text_encoder.config.max_position_embeddings))
    return vae, text_encoder, tokenizer


def _load(folder: Path, kind: Any, **dtype: torch.dtype) -> Any:
    """A part, of this class of diffusers' or transformers'.

    Args:
        dtype: of a network, by the name of its argument; a tokenizer has none.
    """
    with blaming(folder):
        if not folder.is_dir():
            raise UserError("missing")
        if not dtype:
            return kind.from_pretrained(str(folder), local_files_only=True)
        variant = {} if has_full_precision(folder) else {"variant": "fp16"}
        options = {"use_safetensors": True, "output_loading_info": True, "local_files_only": True, **variant}
        part, report = kind.from_pretrained(str(folder), **options, **dtype)
        check_filled(report)
        for name, tensor in part.state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(f"tensor {name} holds NaN or infinite values")
        return part


def check_filled(report: dict) -> None:
    """Look at what diffusers or transformers report of a network that they loaded."""
    missing = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    if missing:
        raise UserError(f"weights and config.json do not fit each other ({', '.join(sorted(missing)[:3])} …)")
