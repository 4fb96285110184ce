"""Encoders of single families of text-to-image models: what differs from Stable Diffusion's."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from deme.models.encoders import LENGTHS, T5, Condition, LatentsAndText


class LatentsAndTwoTexts(LatentsAndText):
    """The same for Stable Diffusion XL (Podell et al. 2023): two text encoders, a pooled text, the sizes of crops.

    The hidden states before the last of both encoders lie side by side. Sizes are the height and width of the image,
    the top and left edge of the crop, and its height and width. The VAE is in float32 where its settings say so, as
    half precision overflows.
    """

    takes_sizes = True

    def __init__(self, *parts: Any, side: int, zeros_for_empty: bool):
        super().__init__(*parts)
        self.side = side  # pixels of the images that are drawn
        self.zeros_for_empty = zeros_for_empty  # an empty negative prompt is all zeros
        self.pooled = self.text_encoders[-1].config.projection_dim

    def _ready(self, part: nn.Module) -> nn.Module:
        whole = part is self.vae and part.config.force_upcast
        return nn.Module.to(part, self.device, torch.float32) if whole else super()._ready(part)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The hidden states of both encoders, (B, tokens, D), and as another token the pooled text, filled with 0."""
        both, pooled = self._of_clips(texts)
        return torch.cat([both, functional.pad(pooled[-1], (0, both.shape[-1] - self.pooled))[:, None]], dim=1)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        if sizes is None:  # the whole image
            sizes = torch.tensor([[self.side, self.side, 0, 0, self.side, self.side]], device=embeddings.device)
        parts = {"encoder_hidden_states": embeddings[:, :-1], "text_embeds": embeddings[:, -1, : self.pooled]}
        return parts | {"time_ids": sizes.to(embeddings.dtype).expand(len(embeddings), -1)}

    def negative(self, texts: Sequence[str]) -> Condition:
        """The same, or zeros for empty texts where the pipeline says so."""
        found = self.condition(texts)
        if not (self.zeros_for_empty and not any(texts)):
            return found
        return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in found.items()}


class LatentsAndThreeTexts(LatentsAndText):
    """The same for Stable Diffusion 3 (Esser et al. 2024): two CLIPs, a pooled text, and T5 if it is there.

    The CLIPs' hidden states lie side by side, filled with 0 to the width of T5's, which follow as further tokens.
    Without T5 these are zeros.
    """

    def __init__(self, *parts: Any, width: int):
        super().__init__(*parts)
        self.width = width  # of an embedding
        self.pooled = sum(part.config.projection_dim for part in self.text_encoders[:2])

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The hidden states, (B, tokens, D), and as another token the pooled texts, filled with 0; no zeros for T5."""
        both, pooled = self._of_clips(texts)
        parts = [both, torch.cat(pooled, dim=-1)[:, None]]
        tokens = [functional.pad(part, (0, self.width - part.shape[-1])) for part in parts]
        for text_encoder, tokenizer in zip(self.text_encoders[2:], self.tokenizers[2:], strict=True):
            states = self._ready(text_encoder)(self._tokens(texts, tokenizer).input_ids)[0]
            tokens.insert(1, states.to(both.dtype))
        return torch.cat(tokens, dim=1)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        missing = LENGTHS[T5] if len(self.text_encoders) == 2 else 0
        states = functional.pad(embeddings[:, :-1], (0, 0, 0, missing))
        return {"encoder_hidden_states": states, "pooled_projections": embeddings[:, -1, : self.pooled]}


class LatentsAndInstructedText(LatentsAndText):
    """The same for SANA (Xie et al. 2024): Gemma reads each text after an instruction.

    As in the pipeline, texts are in lower case, and texts that guidance leads away from have no instruction. Neither
    has the empty caption, which stands for them in training.
    """

    def __init__(self, *parts: Any, instruction: str):
        super().__init__(*parts)
        self.instruction = instruction

    @torch.no_grad()
    def embed(self, texts: Sequence[str], instruct: bool = True) -> torch.Tensor:
        """The last hidden states of each text, and in another column the attention mask, (B, tokens, D + 1)."""
        [tokenizer], text_encoder, found = self.tokenizers, self._ready(*self.text_encoders), []
        kept = [0, *range(1 - tokenizer.model_max_length, 0)]  # the first token and the text's, not the instruction's
        for text in texts:
            begin = self.instruction if instruct and text else ""
            tokens = self._tokens([text.lower().strip()], tokenizer, begin)
            states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
            mask = tokens.attention_mask[..., None].to(states.dtype)
            found.append(torch.cat([states, mask], dim=-1)[:, kept])
        return torch.cat(found)

    def _as_condition(self, embeddings: torch.Tensor, sizes: torch.Tensor | None) -> Condition:
        return {"encoder_hidden_states": embeddings[..., :-1], "encoder_attention_mask": embeddings[..., -1]}

    def negative(self, texts: Sequence[str]) -> Condition:
        """The same for texts that guidance leads away from."""
        return self._as_condition(self.embed(texts, instruct=False), None)


class FramesAndText(LatentsAndText):
    """The same for Wan (2025): an image is a video of one frame, and UMT5 reads the text.

    Each channel of the latents has a mean and a standard deviation. As in the pipeline, whitespace and HTML entities of
    texts are replaced, and the hidden states behind a text are zeros; what ftfy repairs, where it is installed, is not.
    The VAE is in float32.
    """

    def _set_latents(self, settings: Mapping[str, Any]) -> None:
        self.channels = settings["z_dim"]
        mean, deviation = (torch.tensor(settings[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        self.scale, self.shift = 1 / deviation, mean

    def prepare(self, device: torch.device, mixed_precision: str) -> None:
        """Set the device and, on a GPU, the type of the text encoder."""
        super().prepare(device, mixed_precision)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)

    def _ready(self, part: nn.Module) -> nn.Module:
        return nn.Module.to(part, self.device, torch.float32) if part is self.vae else super()._ready(part)

    def _moments(self, images: torch.Tensor) -> torch.Tensor:
        return super()._moments(images[:, :, None])[:, :, 0]

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return super()._decoded(latents[:, :, None])[:, :, 0]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """The text encoder's last hidden states, (B, tokens, D), and zeros behind each text."""
        cleaned = [re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip() for text in texts]
        tokens = self._tokens(cleaned, self.tokenizers[0])
        states = self._ready(self.text_encoders[0])(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return states * tokens.attention_mask[..., None]
