"""Tiny real text-to-image parts that the tests make: random weights, a vocabulary of single bytes, no download."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTEXT = 77  # tokens, the start's and the end's among them
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without merges: a token for every byte, another one where it ends a word."""
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), START, END]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=CONTEXT)


def tiny_clip(folder: Path) -> None:
    """Save a CLIP model of 16×16 images with random weights, its tokenizer and its image processor."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = layers | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT}
    config = CLIPConfig(
        text_config=text | {"pad_token_id": tokenizer.pad_token_id},
        vision_config=layers | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
        initializer_factor=10.0,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPImageProcessor(**sizes).save_pretrained(folder)


def tiny_conditional_unet(seed: int = 0, **settings) -> UNet2DConditionModel:
    """A UNet of 4×4 latents with cross-attention."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "layers_per_block": 1}
    blocks |= {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "block_out_channels": [8, 16]}
    blocks |= {"attention_head_dim": 4, "cross_attention_dim": 16, "norm_num_groups": 4, "sample_size": 4}
    return UNet2DConditionModel(**(blocks | settings)).eval()  # 4 channels is diffusers' default


def tiny_vae() -> AutoencoderKL:
    """An autoencoder of 8×8 grayscale images."""
    torch.manual_seed(1)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        sample_size=8,
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
    )


def tiny_text_config(tokenizer: CLIPTokenizer, width: int = 16, **settings) -> CLIPTextConfig:
    """A text encoder of this width."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=10.0,
        **settings,
    )


def tiny_pipeline(**unet_settings) -> StableDiffusionPipeline:
    """A pipeline of 8×8 grayscale images with random weights and Stable Diffusion v1-4's noise schedule."""
    unet = tiny_conditional_unet(**unet_settings)
    tokenizer = tiny_tokenizer()
    vae = tiny_vae()
    text = tiny_text_config(tokenizer)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler, **parts)


def tiny_xl_pipeline() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with two text encoders, of the widths 16 and 32, and two resnets in each block."""
    tokenizer = tiny_tokenizer()
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 2}
    blocks |= {"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 16 + 32}
    blocks |= {"transformer_layers_per_block": [1, 2], "use_linear_projection": True}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = tiny_conditional_unet(**blocks, **added, projection_class_embeddings_input_dim=6 * 4 + 32)
    text, text_2 = tiny_text_config(tokenizer), tiny_text_config(tokenizer, 32, projection_dim=32, hidden_act="gelu")
    schedule = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text_2), tokenizer, tokenizer
    return StableDiffusionXLPipeline(tiny_vae(), *encoders, unet, schedule, add_watermarker=False)
