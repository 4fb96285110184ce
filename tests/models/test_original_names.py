"""The original names of Stable Diffusion's layers, held to diffusers' conversion and to what ComfyUI looks for."""

import functools

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from text_to_image import tiny_conditional_unet, tiny_xl_pipeline

from deme.models.lora import kohya_names, names_in_files
from deme.models.original_names import unet_names

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
# the blocks of the published networks, with few channels
V1 = {"down_block_types": [*[CROSS_DOWN] * 3, DOWN], "up_block_types": [UP, *[CROSS_UP] * 3]}
V1 |= {"layers_per_block": 2, "block_out_channels": [8, 16, 24, 24]}
XL = {"down_block_types": [DOWN, CROSS_DOWN, CROSS_DOWN], "up_block_types": [CROSS_UP, CROSS_UP, UP]}
XL |= {"layers_per_block": 2, "block_out_channels": [8, 16, 24], "transformer_layers_per_block": [1, 2, 10]}
XL |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 56}
# keys in kohya's files for the published networks: ComfyUI finds those of XL by the original names of its own network
COMFY_XL = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks_8_1_transformer_blocks_9_ff_net_2",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
    "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_k": "output_blocks_2_1_transformer_blocks_9_attn2_to_k",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.2.transformer_blocks.1.attn1.to_v": "output_blocks_5_1_transformer_blocks_1_attn1_to_v",
    "up_blocks.2.resnets.2.conv1": "output_blocks_8_0_in_layers_2",
    "add_embedding.linear_2": "label_emb_0_2",
    "time_embedding.linear_1": "time_embed_0",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
}
OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
ENCODER = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
published = functools.cache(lambda is_xl: tiny_conditional_unet(**(XL if is_xl else V1)))


@pytest.mark.parametrize("make", [lambda: published(False), lambda: published(True), tiny_conditional_unet])
def test_diffusers_reads_the_original_names_of_every_tensor(make):
    unet = make()
    tensors = unet.state_dict()
    names = unet_names(tensors)
    original = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in tensors.items()}
    assert len(original) == len(tensors)
    again = convert_ldm_unet_checkpoint(original, unet.config)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_the_checkpoint_of_version_1_has_the_name_by_which_programs_know_it():
    assert "output_blocks.11.0.skip_connection.weight" in unet_names(published(False).state_dict()).values()


def layers_in(**parts) -> list[str]:
    weights = (f"{part}.{name}" for part, network in parts.items() for name in network.state_dict())
    return [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]


def test_loras_of_xl_have_the_keys_that_comfyui_looks_for():
    parts = {"unet": published(True), "text_encoder_2": tiny_xl_pipeline().text_encoder_2}
    names = kohya_names([*layers_in(**parts), ENCODER])
    assert {layer: names[f"unet.{layer}"] for layer in COMFY_XL} == {
        layer: f"lora_unet_{name}" for layer, name in COMFY_XL.items()
    }
    assert names[ENCODER] == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    second = "text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj"
    assert names[second] == "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
    assert len(set(names.values())) == len(names)


def test_loras_of_version_1_have_diffusers_names_in_kohyas_files():
    names = kohya_names([*layers_in(unet=published(False)), ENCODER])
    assert names[f"unet.{OUT}"] == "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert names[ENCODER] == "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize("is_xl", [False, True])
def test_both_namings_of_kohya_and_those_with_and_without_text_model_are_read(is_xl):
    layers = [*layers_in(unet=published(is_xl)), ENCODER]
    answers = names_in_files(layers)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    for name in (
        layer,
        layer.removeprefix("unet."),
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    ):
        assert answers[name] == layer
    for name in (ENCODER, "text_encoder.encoder.layers.0.mlp.fc1"):
        assert answers[name] == ENCODER
    for begin in ("lora_te_", "lora_te1_"):
        assert answers[f"{begin}text_model_encoder_layers_0_mlp_fc1"] == ENCODER
