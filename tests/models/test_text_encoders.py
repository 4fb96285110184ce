"""The encoders of Stable Diffusion 3 and SANA give what diffusers' pipelines compute."""

import hashlib
import inspect
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, SanaPipeline
from text_to_image import tiny_pipeline, tiny_sana_pipeline, tiny_sd3_pipeline, tiny_wan_pipeline, tiny_xl_pipeline

from deme.errors import UserError
from deme.job.files import sha256
from deme.job.records import ENCODER
from deme.models.denoisers import load_denoiser
from deme.models.encoder_loading import load_encoder
from deme.models.encoders import GEMMA, LENGTHS, T5, UMT5, Captioned, Pixels
from deme.models.families import FramesAndText, LatentsAndInstructedText, LatentsAndThreeTexts
from deme.models.pipelines import encoder_files
from deme.models.variants import ModelFiles

TEXTS = ["A handwritten Three ", "", "é" * 400]
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def three_texts(pipeline) -> LatentsAndThreeTexts:
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    if pipeline.tokenizer_3 is None:
        encoders, tokenizers = encoders[:2], tokenizers[:2]
    else:
        tokenizers[2].model_max_length = LENGTHS[T5]
    return LatentsAndThreeTexts(pipeline.vae, encoders, tokenizers, width=56)


def of_frames(pipeline) -> FramesAndText:
    pipeline.tokenizer.model_max_length = LENGTHS[UMT5]
    return FramesAndText(pipeline.vae, [pipeline.text_encoder], [pipeline.tokenizer])


def instructed(pipeline) -> LatentsAndInstructedText:
    tokenizer = pipeline.tokenizer
    tokenizer.model_max_length, tokenizer.padding_side = LENGTHS[GEMMA], "right"
    return LatentsAndInstructedText(
        pipeline.vae, [pipeline.text_encoder], [tokenizer], instruction="\n".join(INSTRUCTION)
    )


def with_settings(pipeline, folder: Path, file: str, **settings) -> Path:
    """The folder of a pipeline with other settings in one of its files."""
    pipeline.save_pretrained(folder)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | settings))
    return folder


@pytest.mark.parametrize(("make", "counts"), [(tiny_pipeline, True), (tiny_xl_pipeline, False)])
@torch.no_grad()
def test_padding_is_masked_where_diffusers_pipeline_does(tmp_path, make, counts):
    """By Stable Diffusion 1's, if its text encoder says so. Records differ, as older versions masked nothing."""
    embeddings, options = {}, {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for masks in (True, False):
        folder = with_settings(make(), tmp_path / str(masks), "text_encoder/config.json", use_attention_mask=masks)
        pipeline = DiffusionPipeline.from_pretrained(folder)
        states = pipeline.encode_prompt(TEXTS, device="cpu", **options)[0]
        found = load_encoder(folder, load_denoiser(folder / "unet")).condition(TEXTS)["encoder_hidden_states"]
        torch.testing.assert_close(found, states)
        embeddings[masks] = found
        files = "\n".join(f"{name} {sha256(path)}" for name, path in encoder_files(folder).items())
        recorded = ModelFiles(folder, [folder / "unet"]).hashes()[ENCODER]
        assert (recorded == hashlib.sha256(files.encode()).hexdigest()) is not (masks and counts)
    assert torch.allclose(embeddings[True], embeddings[False]) is not counts


def test_texts_are_filled_up_on_the_right(tmp_path):
    """As all networks here were trained; Gemma's tokenizer, which says left, is told so by its pipeline."""
    folder = with_settings(tiny_pipeline(), tmp_path / "sd", "tokenizer/tokenizer_config.json", padding_side="left")
    with pytest.raises(UserError, match=r"tokenizer: padding_side=left: must be right"):
        load_encoder(folder, load_denoiser(folder / "unet"))
    folder = with_settings(
        tiny_sana_pipeline(), tmp_path / "sana", "tokenizer/tokenizer_config.json", padding_side="left"
    )
    assert load_encoder(folder, load_denoiser(folder / "transformer")).tokenizers[0].padding_side == "right"


@pytest.mark.parametrize("has_t5", [True, False])
@torch.no_grad()
def test_stable_diffusion_3s_texts(has_t5):
    """Two CLIPs, pooled texts, and T5 or zeros; texts that are too long are cut."""
    pipeline = tiny_sd3_pipeline(has_t5)
    states, negative, pooled, negative_pooled = pipeline.encode_prompt(TEXTS, None, None, negative_prompt="blurred")
    encoder = three_texts(pipeline)
    torch.testing.assert_close(
        encoder.condition(TEXTS), {"encoder_hidden_states": states, "pooled_projections": pooled}
    )
    found = encoder.negative(["blurred"])
    torch.testing.assert_close(found["encoder_hidden_states"], negative[:1])
    torch.testing.assert_close(found["pooled_projections"], negative_pooled[:1])
    assert encoder.embed(TEXTS).shape == (3, 77 + LENGTHS[T5] * has_t5 + 1, 56)  # no zeros in the cache


@pytest.mark.parametrize(("letter", "most"), [("a", 75), ("é", 37)])
def test_what_is_cut_is_told(letter, most, capsys):
    """By tokens, of which the tiny tokenizer has one for each byte, and two that begin and end the text."""
    encoder = three_texts(tiny_sd3_pipeline(has_t5=False))
    encoder.embed(["", letter * most])
    assert capsys.readouterr().out == ""
    encoder.embed(["", letter * (most + 1)])
    assert capsys.readouterr().out == f"cut to 77 tokens, as all such texts: {letter * (most + 1)}\n"


@torch.no_grad()
def test_sanas_texts():
    """After the instruction, with the attention mask; a negative text and the empty caption have no instruction."""
    pipeline = tiny_sana_pipeline()
    texts = [TEXTS[0], TEXTS[2]]
    states, mask, negative, negative_mask = pipeline.encode_prompt(
        texts, negative_prompt="Blurred", complex_human_instruction=INSTRUCTION
    )
    encoder = instructed(pipeline)
    for found, expected, its_mask in (
        (encoder.condition(texts), states, mask),
        (encoder.negative(["Blurred"] * 2), negative, negative_mask),
    ):
        torch.testing.assert_close(found["encoder_hidden_states"], expected)
        assert torch.equal(found["encoder_attention_mask"], its_mask.float())
    empty = encoder.condition([""])
    torch.testing.assert_close(empty, encoder.negative([""]))
    assert empty["encoder_attention_mask"].sum() == 1


@torch.no_grad()
def test_wans_texts():
    """Whitespace and HTML entities are replaced, and what follows a text is zeros."""
    pipeline, texts = tiny_wan_pipeline(), ["a  &amp;amp; b\n c ", "", "x" * 600]
    states, negative = pipeline.encode_prompt(texts, ["blurred"] * 3, max_sequence_length=LENGTHS[UMT5])
    encoder = of_frames(pipeline)
    torch.testing.assert_close(encoder.condition(texts), {"encoder_hidden_states": states})
    torch.testing.assert_close(encoder.negative(["blurred"]), {"encoder_hidden_states": negative[:1]})


@torch.no_grad()
def test_the_channels_of_wans_latents_have_mean_and_deviation():
    """As its pipeline decodes them, and the same encoded; a frame alone is encoded as it is in a video."""
    pipeline = tiny_wan_pipeline()
    encoder, settings = of_frames(pipeline), pipeline.vae.config
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    latents, _ = encoder.encode(Captioned(pixels, TEXTS[:2]))
    assert latents.shape[1:] == encoder.shape_of(8) == (4, 4, 4)
    torch.manual_seed(5)
    plain, _ = Pixels(1).encode(pixels)
    raw = pipeline.vae.encode(plain[:, :, None]).latent_dist.sample()
    mean, deviation = (torch.tensor(settings[key])[:, None, None] for key in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (raw[:, :, 0] - mean) / deviation)
    decoded = pipeline.video_processor.postprocess_video(pipeline.vae.decode(raw).sample, output_type="pt")[:, 0]
    assert ((decoded * 255).round() - encoder.decode(latents)).abs().max() <= 1


@pytest.mark.parametrize(("make", "wrap"), [(tiny_sd3_pipeline, three_texts), (tiny_sana_pipeline, instructed)])
@torch.no_grad()
def test_latents_are_shifted_and_scaled(make, wrap):
    """(z − shift) · scale, and back; SANA's autoencoder has no posterior."""
    pipeline = make()
    encoder, vae = wrap(pipeline), pipeline.vae
    pixels = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    latents, _ = encoder.encode(Captioned(pixels, TEXTS[:2]))
    torch.manual_seed(5)
    plain, _ = Pixels(1).encode(pixels)
    raw = vae.encode(plain)
    raw = raw.latent if make is tiny_sana_pipeline else raw.latent_dist.sample()
    shift = vae.config.get("shift_factor", 0)
    torch.testing.assert_close(latents, (raw - shift) * vae.config.scaling_factor)
    decoded = pipeline.image_processor.postprocess(vae.decode(raw).sample, output_type="pt")
    assert ((decoded * 255).round() - encoder.decode(latents)).abs().max() <= 1


def test_large_text_encoders_are_never_in_fp16():
    """T5 and Gemma overflow in it."""
    encoder = three_texts(tiny_sd3_pipeline())
    encoder.dtype = torch.float16
    assert [encoder._ready(part).dtype for part in encoder.text_encoders] == [torch.float16] * 2 + [torch.bfloat16]
