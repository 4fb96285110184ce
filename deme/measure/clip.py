"""The CLIP score of text-to-image samples: how well each image fits the prompt that it was drawn from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from deme.data.samples import read_images
from deme.errors import UserError, one_line
from deme.models.encoders import LEAST_VOCABULARY, check_filled
from deme.models.pipelines import find_folder, hub_name


@dataclass(frozen=True)
class PromptedImages:
    """Images with the prompts that they were drawn from.

    Args:
        pixels: as the model takes them, float32, shape (B, 3, S, S).
        prompts: of each image.
    """

    pixels: torch.Tensor
    prompts: Sequence[str]

    def to(self, device: torch.device) -> "PromptedImages":
        """The same with the pixels on a device."""
        return replace(self, pixels=self.pixels.to(device))


class ClipScores(nn.Module):
    """The CLIP score of single images, as a network that `features.extract` takes.

    It is 100 × the cosine between the embeddings of an image and of its prompt: the score of Hessel et al. 2021
    (https://arxiv.org/abs/2104.08718) without its clipping at 0 and with 100 in place of its factor of 2.5.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def read(self, paths: Sequence[Path], prompts: Sequence[str], part: slice) -> PromptedImages:
        """A part of a folder's images, resized, cropped and normalized as the model was trained; thread-safe."""
        images = read_images(paths[part])
        processed = self.image_processor(images, input_data_format="channels_first", return_tensors="pt")
        return PromptedImages(processed["pixel_values"], prompts[part])

    def features(self, batch: PromptedImages) -> torch.Tensor:
        """B images with their prompts → the score of each, float32 (B, 1). Equal prompts are embedded once."""
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(batch.prompts))}
        # here and not in `read`: the tokenizer is no two threads' at a time
        tokens = self.tokenizer(
            list(places),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(batch.pixels.device)
        embedded = self.model(**tokens, pixel_values=batch.pixels)  # both of length 1
        own = embedded.text_embeds[[places[prompt] for prompt in batch.prompts]]
        return 100 * (embedded.image_embeds * own).sum(1, keepdim=True)


def load_clip(source: str) -> ClipScores:
    """A CLIP model with its tokenizer and image processor: float32, in eval mode. Only safetensors are read.

    Args:
        source: a folder relative to the working directory or else to the repository, or owner/name on the Hub.
    """
    place: str | Path = source
    if hub_name(source) is None:
        place = find_folder(source)
        if place is None:
            raise UserError("no such folder")
        if not (place / "config.json").is_file():  # transformers would take the settings of OpenAI's model
            raise UserError("not the folder of a CLIP model: config.json is missing")
    logging.set_verbosity_error()  # what does not fit is told below, in one line
    try:
        # sizes that differ are listed in the report, as what is missing
        model, report = CLIPModel.from_pretrained(
            place, use_safetensors=True, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(place)
        image_processor = CLIPImageProcessor.from_pretrained(place)
    except Exception as error:  # network, name, permission and format errors have no common class
        raise UserError(f"no CLIP model can be loaded from it: {one_line(error)}") from None
    check_filled(report)
    vocabulary = model.config.text_config.vocab_size
    if not LEAST_VOCABULARY <= len(tokenizer) <= vocabulary:  # transformers makes an empty one where it is missing
        raise UserError(f"its tokenizer is missing or another model's: {len(tokenizer)} tokens, not {vocabulary}")
    return ClipScores(model.eval(), tokenizer, image_processor)
