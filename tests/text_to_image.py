"""Tiny real text-to-image parts that the tests make: random weights, a vocabulary of single bytes, no download."""

from pathlib import Path
from string import printable

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
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


def tiny_vae(**settings) -> AutoencoderKL:
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
        **settings,
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


def tiny_t5_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a token for each printable character."""
    extra = 200
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((one, -3.0) for one in printable.strip())]
    return T5Tokenizer(vocab=[*words, *((f"<extra_id_{i}>", 0.0) for i in range(extra))], extra_ids=extra)


def tiny_sd3_pipeline(has_t5: bool = True, **settings) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 with CLIPs of the widths 16 and 32, and T5; two blocks of a width of 16."""
    torch.manual_seed(0)
    shape = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    shape |= {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    transformer = SD3Transformer2DModel(**shape, joint_attention_dim=56, pooled_projection_dim=48, **settings).eval()
    texts = [tiny_text_config(tiny_tokenizer(), width, projection_dim=width) for width in (16, 32)]
    clips = [part for text in texts for part in (CLIPTextModelWithProjection(text), tiny_tokenizer())]
    tokenizer = tiny_t5_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=56, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
    third = (T5EncoderModel(t5).eval(), tokenizer) if has_t5 else (None, None)
    vae, scheduler = tiny_vae(shift_factor=0.2), FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, vae, *clips, *third)


def tiny_sana_pipeline() -> SanaPipeline:
    """SANA with a Gemma of the width 16 and an autoencoder of 32×32 grayscale images, whose latents are 16×16."""
    torch.manual_seed(0)
    shape = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": 16}
    heads = {"num_attention_heads": 2, "num_cross_attention_heads": 2, "attention_head_dim": 8}
    widths = {"cross_attention_head_dim": 8, "cross_attention_dim": 16}
    transformer = SanaTransformer2DModel(**shape, **heads, **widths).eval()
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocabulary = {name: i for i, name in enumerate([*names, *printable.strip()])}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    gemma = Gemma2Config(vocab_size=len(tokenizer), num_attention_heads=2, num_key_value_heads=2, **sizes)
    coder = {"block_types": ["ResBlock", "EfficientViTBlock"], "block_out_channels": [8, 8]}
    coder |= {"layers_per_block": [1, 1], "qkv_multiscales": [[], [5]]}
    coder = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in coder.items()}
    vae = AutoencoderDC(in_channels=1, latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **coder).eval()
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(tokenizer, Gemma2Model(gemma).eval(), vae, transformer, scheduler)


def tiny_wan_pipeline(experts: int = 1) -> WanPipeline:
    """Wan with a UMT5 of the width 16 and an autoencoder of grayscale videos; a second expert is that of low noise."""
    torch.manual_seed(0)
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_dim": 16, "freq_dim": 8, "ffn_dim": 32}
    transformers = [
        WanTransformer3DModel(**shape, num_attention_heads=2, attention_head_dim=8).eval() for _ in range(experts)
    ]
    tokenizer = tiny_t5_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 0.5, 2.0, 1.5]}
    coder = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    coder |= {"in_channels": 1, "out_channels": 1, "scale_factor_spatial": 2, "scale_factor_temporal": 1}
    vae = AutoencoderKLWan(**coder, **statistics).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    given = (tokenizer, UMT5EncoderModel(text).eval(), vae, scheduler, *transformers)
    return WanPipeline(*given, boundary_ratio=0.875 if experts == 2 else None)
