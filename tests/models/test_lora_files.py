import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from text_to_image import tiny_conditional_unet, tiny_pipeline

from deme.config.paths import LORA
from deme.errors import UserError
from deme.job.repository import REPOSITORY
from deme.method.lora import Factors, merge_loras, weighted_sum
from deme.models.lora import folded, kohya_names, names_in_files, read_lora, read_loras, write_lora

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV_IN, PROJ_IN = "unet.conv_in", "unet.down_blocks.0.attentions.0.proj_in"  # of 3×3 and 1×1


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[int, ...]]:
    state = tiny_conditional_unet().state_dict()
    weights = {name.removesuffix(".weight"): value for name, value in state.items() if name.endswith(".weight")}
    return {f"unet.{name}": tuple(value.shape) for name, value in weights.items() if value.dim() in (2, 4)}


def trained(seed: int = 0, **settings):
    """A tiny UNet with a PEFT adapter of random factors, whose own arithmetic is what files are held to."""
    settings = {"r": 2, "target_modules": ATTENTION, "lora_alpha": 3} | settings
    unet = tiny_conditional_unet()
    unet.add_adapter(LoraConfig(**settings))
    torch.manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return unet


def changes_of(unet) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight."""
    modules = {name: module for name, module in unet.named_modules() if hasattr(module, "get_delta_weight")}
    return {f"unet.{name}": module.get_delta_weight("default") for name, module in modules.items()}


def saved(unet, folder: Path) -> Path:
    """The file that diffusers writes."""
    unet.save_lora_adapter(folder, weight_name=LORA)
    return folder / LORA


def random_lora(layers, names=(TO_Q, CONV_IN), ranks=(2, 3)) -> dict[str, Factors]:
    torch.manual_seed(5)
    made = {}
    for name, rank in zip(names, ranks, strict=True):
        shape = layers[name]
        made[name] = Factors(torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank))
    return made


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"attn1.to_k": 8}, "rank_pattern": {"attn2.to_q": 1}}, {"r": 3}],
)
def test_what_diffusers_saves_is_read_as_peft_applies_it(tmp_path, layers, settings):
    unet = trained(**settings)
    lora = read_lora(saved(unet, tmp_path), layers)
    expected = changes_of(unet)
    assert lora.keys() == expected.keys()
    for layer, factors in lora.items():
        torch.testing.assert_close(factors.change(), expected[layer], rtol=1e-5, atol=1e-5)


def test_what_peft_saves_is_read_with_the_configuration_beside_it(tmp_path, layers):
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "conv_in"], init_lora_weights=False)
    model = get_peft_model(tiny_conditional_unet(), config)
    model.save_pretrained(tmp_path)
    lora = read_lora(tmp_path / "adapter_model.safetensors", layers)
    expected = changes_of(model.base_model.model)
    assert lora.keys() == expected.keys() >= {CONV_IN, TO_Q}
    for layer, factors in lora.items():
        torch.testing.assert_close(factors.change(), expected[layer], rtol=1e-5, atol=1e-5)


def test_a_renamed_file_of_peft_is_read_with_the_configuration_beside_it_and_refused_without(tmp_path, layers):
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["to_q"], init_lora_weights=False)
    model = get_peft_model(tiny_conditional_unet(), config)
    model.save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").rename(tmp_path / "style.safetensors")
    expected = changes_of(model.base_model.model)[TO_Q]
    torch.testing.assert_close(read_lora(file, layers)[TO_Q].change(), expected, rtol=1e-5, atol=1e-5)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"r": 8}))
    with pytest.raises(UserError, match=rf"{TO_Q}: has the rank 2, but r=8 in its configuration, which may be another"):
        read_lora(file, layers)
    beside.unlink()
    message = r"style\.safetensors: a PEFT adapter of unknown lora_alpha: adapter_config\.json"
    with pytest.raises(UserError, match=message):
        read_lora(file, layers)
    save_file(load_file(file), file, {"lora_alpha": "16"})
    torch.testing.assert_close(read_lora(file, layers)[TO_Q].change(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("header", "is_kohya", "alpha"),
    [
        ({"lora_alpha": "1"}, False, 1),
        ({"network_alpha": "1.0"}, True, 1),
        ({"alpha": "1", "unet.r": "4"}, False, 1),
        ({"unet.lora_alpha": "1"}, False, 1),  # of a part of the pipeline
        ({"text_encoder.lora_alpha": "1", "unet.lora_alpha": "2"}, False, 2),
        ({"ss_network_alpha": "1"}, True, 4),  # kohya's programs take the scale 1
        ({"other.alpha": "1"}, False, 4),
        ({"lora_adapter_metadata": json.dumps({"unet": {"r": 4, "lora_alpha": 1}})}, False, 1),
        ({"lora_adapter_metadata": json.dumps({"default": {"r": 4, "lora_alpha": 1}})}, False, 1),
        ({"lora_adapter_metadata": json.dumps({"lora_alpha": 1, "alpha_pattern": {"attn1.to_q": 3}})}, False, 3),
    ],
)
def test_an_alpha_is_read_from_the_header_where_no_tensor_has_it(tmp_path, layers, header, is_kohya, alpha):
    torch.manual_seed(0)
    down, up = torch.randn(4, 8), torch.randn(8, 4)
    name, ends = (kohya_names(layers)[TO_Q], ("down", "up")) if is_kohya else (TO_Q, ("A", "B"))
    tensors = {f"{name}.lora_{end}.weight": tensor for end, tensor in zip(ends, (down, up), strict=True)}
    for own, expected in ((None, alpha), (8.0, 8)):
        given = {} if own is None else {f"{name}.alpha": torch.tensor(own)}  # counts whatever the header says
        save_file(tensors | given, tmp_path / LORA, header)
        torch.testing.assert_close(read_lora(tmp_path / LORA, layers)[TO_Q].change(), up @ down * expected / 4)


@pytest.mark.parametrize("is_kohya", [False, True])
def test_what_is_written_is_read_again(tmp_path, layers, is_kohya):
    lora = random_lora(layers)
    write_lora(tmp_path / LORA, lora, {"base": "abc"}, kohya_names(layers) if is_kohya else None)
    again = read_lora(tmp_path / LORA, layers)
    assert again.keys() == lora.keys()
    for layer in lora:
        torch.testing.assert_close(again[layer].change(), lora[layer].change())
    names = load_file(tmp_path / LORA)
    if is_kohya:
        name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        assert {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"} <= names.keys()
        assert names["lora_unet_conv_in.lora_up.weight"].shape == (8, 3, 1, 1)
        assert names[f"{name}.alpha"] == len(names[f"{name}.lora_down.weight"]) == 3  # one rank for all layers
    else:
        assert {len(value) for key, value in names.items() if ".lora_A." in key} == {3}  # one rank for all layers


@pytest.mark.parametrize("is_kohya", [False, True])
def test_diffusers_loads_what_is_written(tmp_path, layers, is_kohya):
    """Layers of different ranks, by a pipeline's load_lora_weights; its UNet gives what the changed weights give."""
    names = [layer for layer in layers if layer.endswith(tuple(ATTENTION))]
    lora = random_lora(layers, names, [1 + k % 3 for k in range(len(names))])
    write_lora(tmp_path / LORA, lora, {}, kohya_names(layers) if is_kohya else None)
    pipeline, changed = tiny_pipeline(), tiny_pipeline().unet
    inputs = torch.randn(1, 4, 4, 4), 500, torch.randn(1, 3, 16)
    with torch.no_grad():
        before = pipeline.unet(*inputs).sample
        for layer, factors in lora.items():
            changed.get_submodule(layer.removeprefix("unet.")).weight.add_(factors.change())
        pipeline.load_lora_weights(tmp_path / LORA)
        loaded, expected = pipeline.unet(*inputs).sample, changed(*inputs).sample
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, rtol=1e-2)


def test_old_names_of_diffusers_are_read(tmp_path, layers):
    out = TO_Q.replace("to_q", "to_out.0")
    down, up = torch.randn(2, 8), torch.randn(8, 2)  # of both
    old = {"to_q": TO_Q, "to_out": out}
    tensors = {}
    for short in old:
        processor = TO_Q.replace(".to_q", ".processor.") + short
        tensors |= {f"{processor}_lora.down.weight": down.clone(), f"{processor}_lora.up.weight": up.clone()}
    save_file(tensors, tmp_path / LORA)
    lora = read_lora(tmp_path / LORA, layers)
    assert lora.keys() == {TO_Q, out}
    torch.testing.assert_close(lora[out].change(), up @ down)


@pytest.mark.parametrize("adapter", ["default", "default_0"])
def test_the_names_of_pefts_own_modules_are_read(tmp_path, layers, adapter):
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    save_file({f"{TO_Q}.lora_A.{adapter}.weight": down, f"{TO_Q}.lora_B.{adapter}.weight": up}, tmp_path / LORA)
    torch.testing.assert_close(read_lora(tmp_path / LORA, layers)[TO_Q].change(), up @ down)


@pytest.mark.parametrize("layer", [TO_Q, PROJ_IN])
@pytest.mark.parametrize("is_convolution", [False, True])
def test_a_linear_layer_and_a_1x1_convolution_take_each_others_factors(tmp_path, layers, layer, is_convolution):
    down, up, ones = torch.randn(2, 8), torch.randn(8, 2), (1, 1) * is_convolution
    tensors = {f"{layer}.lora_A.weight": down.reshape(2, 8, *ones), f"{layer}.lora_B.weight": up.reshape(8, 2, *ones)}
    save_file(tensors, tmp_path / LORA)
    change = read_lora(tmp_path / LORA, layers)[layer].change()
    torch.testing.assert_close(change, (up @ down).reshape(layers[layer]))


def test_peft_merges_rslora_adapters_wrongly_where_the_stacked_factors_are_exact(tmp_path, layers):
    """add_weighted_adapter scales by alpha / r, which is not the scale alpha / √r of rsLoRA."""
    unet = trained(use_rslora=True, r=4)
    lora, expected = read_lora(saved(unet, tmp_path), layers)[TO_Q], changes_of(unet)[TO_Q]
    torch.testing.assert_close(weighted_sum([(0.5, lora), (0.5, lora)]).change(), expected)

    model = get_peft_model(
        tiny_conditional_unet(), LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["to_q"])
    )
    layer = model.base_model.model.get_submodule(TO_Q.removeprefix("unet."))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="cat")
    own, theirs = layer.get_delta_weight("default"), layer.get_delta_weight("sum")
    assert not torch.allclose(own, theirs, rtol=0.1)


def test_a_file_that_is_no_lora_of_the_network_is_refused_by_the_name_of_the_tensor(tmp_path, layers):
    kohya = kohya_names(layers)[TO_Q]
    down, up = torch.ones(2, 8), torch.ones(8, 2)
    good = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
    cases = {
        "unet.other.lora_A.weight: the network has no layer unet.other": {"unet.other.lora_A.weight": down},
        "dora_scale: DoRA, which also scales": {f"{kohya}.dora_scale": torch.ones(8, 1)},
        "lora_mid.weight: a product of three": {f"{kohya}.lora_mid.weight": torch.ones(2, 2, 3, 3)},
        "hada_w1_a: LoHa or LoKr": {f"{kohya}.hada_w1_a": torch.ones(2, 2)},
        "lora_B.bias: a trained bias": {f"{TO_Q}.lora_B.bias": torch.ones(8)},
        "diff_b: a trained bias": {f"{kohya}.diff_b": torch.ones(8)},
        "lora_embedding_A: a LoRA of an embedding": {f"{TO_Q}.lora_embedding_A": down},
        "modules_to_save.weight: a layer that was": {**good, f"{TO_Q}.modules_to_save.weight": torch.ones(8, 8)},
        "diff: a layer that was trained as a whole": {f"{kohya}.diff": torch.ones(8, 8)},
        "conv_in.weight: not a factor of a LoRA": {**good, "conv_in.weight": torch.ones(8, 8)},
        "holds no LoRA; a network is named by its folder": tiny_conditional_unet().state_dict(),
        "has one of its two factors": {f"{TO_Q}.lora_A.weight": down},
        r"factors of the shapes \(8, 2\) and \(2, 9\) for a weight of the shape \(8, 8\)": {
            f"{TO_Q}.lora_A.weight": torch.ones(2, 9),
            f"{TO_Q}.lora_B.weight": up,
        },
        r"factors of the shapes \(8, 0\) and \(0, 8\)": {
            f"{TO_Q}.lora_A.weight": torch.ones(0, 8),
            f"{TO_Q}.lora_B.weight": torch.ones(8, 0),
        },
        "a second factor of": {**good, f"{kohya}.lora_down.weight": down.clone()},
        "of the type int64": {f"{TO_Q}.lora_A.weight": down.long(), f"{TO_Q}.lora_B.weight": up},
        "alpha: of the type complex64": {**good, f"{TO_Q}.alpha": torch.tensor(1j)},
        "alpha: holds 0 numbers, not one": {**good, f"{TO_Q}.alpha": torch.ones(0)},
        "alpha is not finite": {**good, f"{TO_Q}.alpha": torch.tensor(torch.inf)},
    }
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=rf"bad\.safetensors: .*{message}"):
            read_lora(tmp_path / "bad.safetensors", layers)
    for config, message in (
        ({"unet.use_dora": True}, "use_dora=true: is not merged"),
        ({"unet.init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4: its base is not"),
        ({"unet.init_lora_weights": "lora_ga"}, "init_lora_weights=lora_ga: its base is not"),
        ({"unet.init_lora_weights": "OLoRA"}, "init_lora_weights=OLoRA: its base is not"),  # PEFT takes both cases
        ({"unet.lora_alpha": "x"}, f"{TO_Q}: lora_alpha of unet is not a finite number"),
        ({"unet.r": 2}, f"{TO_Q}: lora_alpha of unet is missing"),
        ({"text_encoder.lora_alpha": 1}, f"{TO_Q}: lora_alpha of unet is missing"),
        ({}, "lora_adapter_metadata in its header: is empty"),
        ({"a": {"lora_alpha": 1}, "b": {"lora_alpha": 2}}, "b: a second configuration of the same layers"),
    ):
        save_file(good, tmp_path / "bad.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        with pytest.raises(UserError, match=rf"bad\.safetensors: .*{message}"):
            read_lora(tmp_path / "bad.safetensors", layers)
    for header, message in (
        ({"lora_alpha": "x"}, "lora_alpha=x in its header: .*could not convert"),
        ({"lora_alpha": "nan"}, "lora_alpha=nan in its header: it is not a finite number"),
        ({"alpha": "1", "lora_alpha": "2"}, r"lora_alpha=2 in its header, which also has the alpha 1\.0"),
    ):
        save_file(good, tmp_path / "bad.safetensors", header)
        with pytest.raises(UserError, match=rf"bad\.safetensors: {message}"):
            read_lora(tmp_path / "bad.safetensors", layers)
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"bad\.safetensors: cannot be read"):
        read_lora(tmp_path / "bad.safetensors", layers)


@pytest.mark.parametrize("alpha", [torch.tensor(3), torch.tensor([3], dtype=torch.int32), torch.tensor(3.0)])
def test_an_alpha_may_be_an_integer(tmp_path, layers, alpha):
    down, up, name = torch.ones(2, 8), torch.ones(8, 2), kohya_names([TO_Q])[TO_Q]
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alpha}
    save_file(tensors, tmp_path / "lora.safetensors")
    torch.testing.assert_close(read_lora(tmp_path / "lora.safetensors", layers)[TO_Q].change(), up @ down * 3 / 2)


def test_a_lora_for_another_prediction_than_the_bases_is_refused(tmp_path):
    save_file({"unet.conv_in.lora_A.weight": torch.ones(1)}, tmp_path / LORA, {"ss_v_parameterization": "True"})
    message = rf"{LORA}: ss_v_parameterization=True in its header, but model\.pretrained has prediction_type=epsilon"
    with pytest.raises(UserError, match=message):
        read_loras(REPOSITORY / "assets" / "digits", [tmp_path / LORA])


def test_a_text_encoders_layer_cannot_be_folded_into_the_denoiser():
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    with pytest.raises(UserError, match=rf"changes {layer}\.weight, which is not of the denoiser: merge\.into=lora"):
        folded({}, {layer: Factors(torch.ones(1, 2), torch.ones(3, 1))})


def test_a_transformers_layers_are_read_with_and_without_their_prefix_and_have_no_kohya_names():
    layer = "transformer.transformer_blocks.0.attn1.to_q"
    assert names_in_files([layer]) == {layer: layer, layer.partition(".")[2]: layer}
    with pytest.raises(UserError, match=f"has no known name for {layer}"):
        kohya_names([layer])


def test_a_merge_of_files_in_different_names_is_that_of_the_dense_changes(tmp_path, layers):
    first, second = trained(0), trained(1, r=3, target_modules=["to_q", "conv_in"])
    read = read_lora(saved(second, tmp_path), layers)
    write_lora(tmp_path / "kohya.safetensors", read, {}, kohya_names(layers))
    loras = {"a": read_lora(saved(first, tmp_path), layers), "b": read_lora(tmp_path / "kohya.safetensors", layers)}
    merged, _ = merge_loras(loras, {layer: [0.7, -1.5] for layer in layers})
    dense = [changes_of(first), changes_of(second)]
    for layer, factors in merged.items():
        expected = sum(w * part[layer].double() for w, part in zip([0.7, -1.5], dense, strict=True) if layer in part)
        torch.testing.assert_close(factors.change().double(), expected, rtol=1e-5, atol=1e-5)
