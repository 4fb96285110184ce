"""Networks that give features of images: pytorch_fid's Inception, and CLIP's score; features over all processes."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from deme.data.decoding import ahead
from deme.data.samples import read_images
from deme.errors import UserError, one_line
from deme.job.processes import Processes
from deme.models.encoders import LEAST_VOCABULARY, check_filled
from deme.models.pipelines import find_folder, hub_name


class InceptionFeatures(nn.Module):
    """pytorch_fid's Inception features, fed as pytorch_fid does: images scaled to [0, 1]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 RGB (B, 3, H, W) → float32 (B, 2048)."""
        return self.network(pixels.float() / 255)[0].flatten(1)


def load_inception() -> InceptionFeatures:
    """pytorch_fid's feature network in eval mode, its weights downloaded once into torch hub's folder."""
    from pytorch_fid import inception

    # pytorch_fid would unpickle the downloaded file; it holds plain tensors, so weights_only loads it
    inception.load_state_dict_from_url = functools.partial(torch.hub.load_state_dict_from_url, weights_only=True)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(inception.FID_WEIGHTS_URL).name
    try:
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    except OSError as error:
        raise UserError(
            f"the Inception weights can't be downloaded ({one_line(error)}); "
            f"put {inception.FID_WEIGHTS_URL} into {file.parent}"
        ) from None
    except (RuntimeError, EOFError, UnpicklingError) as error:
        reason = one_line(error)
        raise UserError(f"{file}: not the Inception weights ({reason}); delete it to download them again") from None
    return InceptionFeatures(network).eval()


class ClipScores(nn.Module):
    """The CLIP score of single images, as a network that `features.extract` takes.

    It is 100 × the cosine between the embeddings of an image and of its prompt: the score of Hessel et al. 2021
    (https://arxiv.org/abs/2104.08718) without its clipping at 0 and with 100 in place of its factor of 2.5.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any):
        super().__init__()
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor

    def read(self, paths: Sequence[Path], prompts: Sequence[str], part: slice) -> Any:
        """A part of a folder's images as the model takes them, float32 (B, 3, S, S), and their prompts; thread-safe."""
        images = read_images(paths[part])
        batch = self.image_processor(images, input_data_format="channels_first", return_tensors="pt")
        batch["prompts"] = list(prompts[part])
        return batch

    def features(self, batch: Any) -> torch.Tensor:
        """B images with their prompts → the score of each, float32 (B, 1). Equal prompts are embedded once."""
        pixels, prompts = batch["pixel_values"], batch["prompts"]
        texts = list(dict.fromkeys(prompts))
        # here and not in `read`: the tokenizer is no two threads' at a time
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        embedded = self.model(**tokens.to(pixels.device), pixel_values=pixels)  # both of length 1
        own = embedded.text_embeds[[texts.index(prompt) for prompt in prompts]]
        return 100 * (embedded.image_embeds * own).sum(1, keepdim=True)


def load_clip(source: str) -> ClipScores:
    """A CLIP model with its tokenizer and image processor: float32, in eval mode. Only safetensors are read.

    Args:
        source: a folder relative to the working directory or else to the repository, or owner/name on the Hub.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    place: str | Path = source
    if hub_name(source) is None:
        place = find_folder(source)
        if place is None:
            raise UserError("no such folder")
        if not (place / "config.json").is_file():  # transformers would take the settings of OpenAI's model
            raise UserError("not the folder of a CLIP model: config.json is missing")
    logging.set_verbosity_error()  # what does not fit is told below, in one line
    try:
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
        # sizes that differ are listed in the report, as what is missing
        model, report = CLIPModel.from_pretrained(place, ignore_mismatched_sizes=True, **options)
        tokenizer = CLIPTokenizer.from_pretrained(place)
        image_processor = CLIPImageProcessor.from_pretrained(place)
    except Exception as error:  # network, name, permission and format errors have no common class
        raise UserError(f"no CLIP model can be loaded from it: {one_line(error)}") from None
    check_filled(report)
    vocabulary = model.config.text_config.vocab_size
    if not LEAST_VOCABULARY <= len(tokenizer) <= vocabulary:  # transformers makes an empty one where it is missing
        raise UserError(f"its tokenizer is missing or another model's: {len(tokenizer)} tokens, not {vocabulary}")
    return ClipScores(model.eval(), tokenizer, image_processor)


@torch.inference_mode()
def extract(
    processes: Processes,
    network: nn.Module,
    read: Callable[[slice], Any],
    count: int,
    batch_size: int,
    threads: int = 0,
    start: int = 0,
) -> np.ndarray:
    """The features of `count` images over all processes: float32, shape (count, D), the same in every process.

    Args:
        network: has `features`, uint8 RGB (B, 3, H, W) → float32 (B, D).
        read: slice → uint8 RGB images (B, 3, H, W), or what else the network's `features` takes and `to` moves.
        threads: that read ahead.
        start: the first of the images.
    """
    edges = [start + count * rank // processes.num_processes for rank in range(processes.num_processes + 1)]
    first = edges[processes.process_index]
    last = max(first + 1, edges[processes.process_index + 1])  # one without a share takes part, and is dropped below
    batches = [slice(place, min(place + batch_size, last)) for place in range(first, last, batch_size)]
    is_quiet = not processes.is_main_process
    images = tqdm(ahead(read, batches, threads), "features", len(batches), disable=is_quiet, leave=False, delay=5)
    parts = [network.features(part.to(processes.device)) for part in images]
    shares = processes.gather(processes.pad_across_processes(torch.cat(parts)))
    shares = shares.cpu().chunk(processes.num_processes)
    features = torch.cat([share[: edges[i + 1] - edges[i]] for i, share in enumerate(shares)]).numpy()
    if not np.isfinite(features).all():
        raise UserError("the feature network gives NaN or infinite values")
    return features
