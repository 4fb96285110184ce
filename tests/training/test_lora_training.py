"""Trainings of LoRAs: what is trained, kept and shared."""

from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file
from text_to_image import tiny_conditional_unet

from benchmarks.trainers import make_trainer
from deme.config.trainings import Finetune
from deme.errors import UserError
from deme.method.losses import Experts
from deme.models.adapters import chosen_layers, load_denoisers, lora_of, new_lora, with_trained_lora
from deme.models.lora import folded, layers_of, read_lora, write_lora
from deme.models.pipelines import denoiser_folder
from deme.models.weights import weights_hash
from deme.training.session import Objective
from deme.training.state import list_checkpoints
from deme.training.trainer import Trainer

OBJECTIVE = Objective("test", (0, 2, 250, 500), [(250, 500)], global_probability=0.3, consistency_weight=1.0)
SETTINGS = {"max_steps": 6, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 1e-2, "log_every": 1}

pytestmark = pytest.mark.usefixtures("one_thread")


def trainer(folder, **settings) -> Trainer:
    """Of a network with dropout, which the teacher must not have."""
    AcceleratorState._reset_state(reset_partial_state=True)
    pixels = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    training = Finetune(**(SETTINGS | {"lora_rank": 2} | settings))
    folder.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True, mixed_precision=training.mixed_precision)
    return make_trainer(accelerator, tiny_unet(dropout=0.1), list(pixels), training, folder, OBJECTIVE, projected=False)


def factors(network) -> dict[str, torch.Tensor]:
    lora = lora_of(network)
    return {f"{name}.{kind}": tensor for name, part in lora.items() for kind, tensor in vars(part).items()}


def bytes_of(*networks) -> int:
    """Bytes of all parameters, each counted once."""
    unique = {id(tensor): tensor for tensor in chain.from_iterable(network.parameters() for network in networks)}
    return sum(tensor.nbytes for tensor in unique.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_targets": ["*.to_q", "*.conv1"], "lora_alpha": 8},
        {"mixed_precision": "bf16", "base_precision": "bf16", "gradient_checkpointing": True},
    ],
)
def test_a_resumed_training_ends_with_the_same_lora_and_leaves_the_base_alone(tmp_path, settings):
    whole = trainer(tmp_path / "whole", checkpoint_every=3, **settings)
    before = {name: tensor.clone() for name, tensor in whole.teacher.state_dict().items()}
    assert whole.run()
    expected = factors(whole.student)
    assert max(tensor.abs().max() for name, tensor in expected.items() if name.endswith(".up")) > 1e-3

    half = trainer(tmp_path / "half", checkpoint_every=3, **settings)
    assert not half.run(deadline=0)
    for file in list_checkpoints(tmp_path / "half" / "checkpoints")[0].glob("*.safetensors"):
        assert all(".lora_A." in name or ".lora_B." in name for name in load_file(file)), file
    resumed = trainer(tmp_path / "half", checkpoint_every=3, **settings)
    assert resumed.run()
    for name, tensor in factors(resumed.student).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)
    for name, tensor in whole.teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_the_teacher_is_the_base_without_the_lora_and_without_dropout(tmp_path):
    run = trainer(tmp_path, lora_targets="all-linear")
    for _ in range(3):
        run.step()
    torch.manual_seed(0)
    images, times = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        expected = tiny_unet(dropout=0.1)(images, times).sample
        torch.testing.assert_close(run.teacher(images, times, return_dict=False)[0], expected)
        assert not torch.allclose(run.student.eval()(images, times).sample, expected, atol=1e-4)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_step_holds_one_base_and_the_lora(tmp_path, precision):
    """Student and teacher together are the network and the adapter; EMA, gradients and moments are the adapter's."""
    mixed = {"mixed_precision": precision, "base_precision": precision} if precision else {}
    run = trainer(tmp_path, **mixed)
    run.step()
    adapter = sum(parameter.nbytes for parameter in run.state.weights)
    layers = [m for m in tiny_unet().modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    halved = sum(parameter.nbytes for m in layers for parameter in m.parameters()) / 2 if precision else 0
    base = bytes_of(tiny_unet())
    assert adapter < base / 10
    assert bytes_of(run.student, run.teacher) == base - halved + adapter
    assert all(weight.dtype == torch.float32 for weight in run.state.weights)
    held = sum(tensor.nbytes for file in run.state.tensors().values() for tensor in file.values())
    steps = 4 * len(run.state.weights)  # AdamW's own counters
    assert held == 4 * adapter + steps  # student, EMA, two moments
    gradients = [parameter for parameter in run.student.parameters() if parameter.grad is not None]
    assert {*map(id, gradients)} <= {*map(id, run.state.weights)}


@pytest.fixture
def pipeline(tmp_path):
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("targets", ["attention", "all-linear", ["*.conv1", "*.to_k"]])
def test_loras_from_files_share_one_base_and_predict_as_merged_weights(tmp_path, pipeline, targets):
    """As an ensemble and as teachers of a distillation; a single one is added to the weights."""
    files, expected = [], []
    images, times = torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 700])
    for seed, alpha in ((0, None), (1, 6.0), (2, None)):
        torch.manual_seed(seed)
        network = new_lora(tiny_unet(), Finetune(lora_rank=3, lora_alpha=alpha, lora_targets=targets)).eval()
        for parameter in filter(lambda parameter: parameter.requires_grad, network.parameters()):
            torch.nn.init.normal_(parameter, std=0.3)
        files.append(tmp_path / f"{seed}.safetensors")
        write_lora(files[-1], lora_of(network), {})
        with torch.no_grad():
            expected.append(network(images, times).sample)
    networks = list(load_denoisers(pipeline, files))
    [alone] = load_denoisers(pipeline, files[:1])
    merged = tiny_unet()
    merged.load_state_dict(folded(merged.state_dict(), read_lora(files[1], layers_of(pipeline))))
    with torch.no_grad():
        for network, prediction in zip([*networks, alone, merged], [*expected, expected[0], expected[1]], strict=True):
            torch.testing.assert_close(network(images, times).sample, prediction, rtol=1e-4, atol=1e-5)
        together = Experts(networks)(images, times)[0]
        torch.testing.assert_close(
            together, torch.cat([p[k : k + 1] for k, p in enumerate(expected)]), rtol=1e-4, atol=1e-5
        )
    adapters = sum(factors.up.nbytes + factors.down.nbytes for n in networks for factors in lora_of(n).values())
    assert bytes_of(*networks) == bytes_of(tiny_unet()) + adapters
    assert bytes_of(alone) == bytes_of(tiny_unet())


def test_ranks_may_differ_between_layers():
    lora = lora_of(new_lora(tiny_unet(), Finetune(lora_rank=2, lora_targets=["*.to_q", "*.conv1"])))
    given = {name: part.padded(2 + number) for number, (name, part) in enumerate(lora.items())}
    found = lora_of(with_trained_lora(tiny_unet(), given))
    for name, part in given.items():
        torch.testing.assert_close(found[name].change(), part.change())
        assert found[name].rank == part.rank


def test_a_lora_of_another_base_is_refused_by_its_hash(tmp_path, pipeline):
    lora, file = lora_of(new_lora(tiny_unet(), Finetune(lora_rank=2))), tmp_path / "a.safetensors"
    right = weights_hash(denoiser_folder(pipeline))
    for given, refused in (({"sha256": right}, False), ("anything", False), ({"sha256": "0" * 64}, True)):
        write_lora(file, lora, {"pretrained": given})
        if refused:
            with pytest.raises(UserError, match=r"a\.safetensors: its header names another base .* 0{64}"):
                list(load_denoisers(pipeline, [file]))
        else:
            assert len(list(load_denoisers(pipeline, [file]))) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "finetune.lora_rank=0: must be above 0"),
        ({"lora_alpha": 2.0}, "finetune.lora_alpha=2.0: needs finetune.lora_rank"),
        ({"lora_targets": "all-linear"}, "finetune.lora_targets=all-linear: needs finetune.lora_rank"),
        ({"lora_rank": 2, "lora_targets": "convolutions"}, "must be attention, all-linear, or a list"),
        ({"lora_rank": 2, "lora_targets": []}, r"finetune.lora_targets=\[\]: must be attention"),
        ({"lora_rank": 2, "lora_targets": ["*.to_q", "nothing.*"]}, r"nothing\.\* fits no linear layer"),
        ({"lora_rank": 9, "lora_targets": ["*.conv1"]}, "lora_rank=9: above 8, the smallest side of down_blocks.0"),
        ({"lora_rank": 2, "base_precision": "bf16"}, "base_precision=bf16: finetune.mixed_precision=no must be"),
        ({"lora_rank": 2, "snapshot_every": 2}, "snapshot_every=2: keeps whole networks"),
    ],
)
def test_mistakes_name_the_setting(settings, message):
    with pytest.raises(UserError, match=message):
        chosen_layers(tiny_unet(), Finetune(**settings))


def test_targets_of_a_text_to_image_network():
    """Each attention has four layers, cross-attention too; all-linear has the time embedding as well."""
    network = tiny_conditional_unet()
    attention, linear, everything = (
        chosen_layers(network, Finetune(lora_rank=1, lora_targets=targets))
        for targets in ("attention", "all-linear", ["*"])
    )
    count = sum(name.endswith((".attn1", ".attn2")) for name, _ in network.named_modules())
    assert len(attention) == 4 * count
    assert {*attention} < {*linear} < {*everything}
    assert {"time_embedding.linear_1", "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"} <= {*linear}
    assert {"conv_in", "down_blocks.0.resnets.0.conv1"} <= {*everything} - {*linear}
