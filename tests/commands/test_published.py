import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import old_name
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from robustness.forked import Run

from deme.errors import UserError
from deme.method.projection import PROJECTION_SUFFIX
from deme.models.denoisers import load_denoiser, with_projections
from deme.projection import ProjectedUNet2DModel
from scripts.published import read_published, rename_projections

FORK = """
import torch
from diffusers import UNet2DModel

print("the fork's code runs")

class OldAttention(torch.nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.group_norm, self.proj_attn = attention.group_norm, attention.to_out[0]
        self.query, self.key, self.value = attention.to_q, attention.to_k, attention.to_v

class ForkedUNet(UNet2DModel):
    pass
"""


@pytest.fixture
def projected(pretrained):
    """A finetuned UNet whose projections are all different."""
    unet = with_projections(UNet2DModel.from_pretrained(pretrained / "unet")).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def blocks(unet) -> list:
    return [*unet.down_blocks, unet.mid_block, *unet.up_blocks]


@pytest.fixture
def state_dict_file(projected, tmp_path):
    """A finetuned network as published: adapter_list.{i}.weight and the old attention names."""
    renamed = {f"adapter_list.{i}.weight": block.projection.weight.data for i, block in enumerate(blocks(projected))}
    for name, tensor in projected.state_dict().items():
        if not name.endswith(PROJECTION_SUFFIX):
            renamed[old_name(name)] = tensor
    torch.save(renamed, tmp_path / "diffusion_pytorch_model.bin")
    return tmp_path / "diffusion_pytorch_model.bin"


@pytest.fixture
def module_file(projected, tmp_path, monkeypatch):
    """A merged network as published: a whole pickled module of classes that exist only where it was written."""
    (tmp_path / "fork").mkdir()
    (tmp_path / "fork" / "forked_diffusers.py").write_text(FORK)
    monkeypatch.syspath_prepend(tmp_path / "fork")
    import forked_diffusers

    unet = forked_diffusers.ForkedUNet.from_config(projected.config)
    unet.load_state_dict({k: v for k, v in projected.state_dict().items() if not k.endswith(PROJECTION_SUFFIX)})
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, forked_diffusers.OldAttention(child))
    unet.adapter_list = torch.nn.ModuleList([block.projection for block in blocks(projected)])
    torch.save(unet, tmp_path / "merged.bin")
    del sys.modules["forked_diffusers"]
    return tmp_path / "merged.bin"


def import_published(weights, pretrained, output, status=0) -> Run:
    options = ["--weights", str(weights), "--pretrained", str(pretrained), "--output", str(output)]
    forked = Run("scripts/import_published.py", options, output.parent)
    assert forked.wait() == status, forked.stdout + forked.stderr
    return forked


@pytest.mark.parametrize("kind", ["state_dict_file", "module_file"])
def test_both_kinds_become_a_pipeline_of_the_same_network(kind, projected, pretrained, tmp_path, request):
    weights, output = request.getfixturevalue(kind), tmp_path / "imported"
    result = import_published(weights, pretrained, output)
    assert "the fork's code runs" not in result.stdout
    found, noisy = load_denoiser(output / "unet"), torch.randn(2, 1, 8, 8)
    assert isinstance(found, ProjectedUNet2DModel)
    with torch.no_grad():
        assert torch.equal(found(noisy, 500).sample, projected(noisy, 500).sample)
    scheduler = "scheduler/scheduler_config.json"
    assert (output / scheduler).read_bytes() == (pretrained / scheduler).read_bytes()
    again = import_published(weights, pretrained, output, status=2)
    assert f"--output={output}: exists already" in again.stderr


def test_what_can_not_be_imported_is_refused_in_one_line(state_dict_file, pretrained, tmp_path):
    """A pretrained pipeline without block types, a tensor that no file can name; no file is left behind."""
    shutil.copytree(pretrained, tmp_path / "copy")
    config = tmp_path / "copy" / "unet" / "config.json"
    settings = json.loads(config.read_text())
    for types in (None, 1, "DownBlock2D"):
        config.write_text(json.dumps(settings | {"down_block_types": types}))
        result = import_published(state_dict_file, tmp_path / "copy", tmp_path / "out", status=2)
        assert result.stderr.endswith("copy: its config.json names no down_block_types or up_block_types\n")
        assert result.stderr.count("\n") == 1
    torch.save({"a\ud800": torch.ones(1)}, tmp_path / "surrogate.bin")
    result = import_published(tmp_path / "surrogate.bin", pretrained, tmp_path / "out", status=2)
    assert result.stderr.endswith("surrogate.bin: holds a tensor named 'a\\ud800'\n")
    assert not (tmp_path / "out").exists()


def test_every_type_and_stride_is_read_as_torch_reads_it(tmp_path):
    base = torch.arange(24).reshape(4, 6)
    tensors = {str(dtype): base.to(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.bool)}
    tensors |= {"transposed": base.t(), "part": base[1:3, ::2], "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    tensors |= {"shared": base[2], "parameter": torch.nn.Parameter(torch.ones(2))}
    torch.save(tensors, tmp_path / "a.bin")
    found = read_published(tmp_path / "a.bin")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class Reduce:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_objects(marker: str) -> dict[str, object]:
    make, code = Reduce(os.mkdir, marker), f"__import__('os').mkdir({marker!r})"
    return {
        "a call": make,
        "a call among tensors": {"a": torch.ones(1), "b": make},
        "eval": {"a": Reduce(eval, code)},
        "exec": {"a": Reduce(exec, code)},
        "getattr": {"a": Reduce(getattr, make, "x")},
        "a subprocess": {"a": Reduce(subprocess.Popen, ["mkdir", marker])},
        "a nested pickle": {"a": Reduce(pickle.loads, pickle.dumps(make))},
        "torch.load": {"a": Reduce(torch.load, marker)},
        "a key": {Reduce(str, make): torch.ones(1)},
    }


@pytest.mark.parametrize("name", list(hostile_objects("")))
def test_hostile_pickles_run_nothing(name, tmp_path):
    """Refused, with the file's name; had it been unpickled, the folder `executed` would exist."""
    marker = tmp_path / "executed"
    torch.save(hostile_objects(str(marker))[name], tmp_path / "hostile.bin")
    with pytest.raises(UserError, match=r"hostile\.bin"):
        read_published(tmp_path / "hostile.bin")
    assert not marker.exists()


def test_a_hostile_module_is_data(tmp_path):
    """A call hidden in a module's attribute is not made, and the tensors beside it are read."""
    module = torch.nn.Linear(2, 2)
    module.secret = Reduce(os.mkdir, str(tmp_path / "executed"))
    torch.save(module, tmp_path / "module.bin")
    assert read_published(tmp_path / "module.bin").keys() == {"weight", "bias"}
    assert not (tmp_path / "executed").exists()


def archive(path, program: bytes, storage: bytes = bytes(16)) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", storage)


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ"  # a tuple of arguments begins; its first is the storage


@pytest.mark.parametrize(
    "program",
    [
        b"(dVa\n" + TENSOR + STORAGE + b"I0\n(I5\nt(I1\nttRs.",  # five elements of a storage of four
        b"(dVa\n" + TENSOR + STORAGE + b"I3\n(I2\nt(I1\nttRs.",  # the last one lies beyond it
        b"(dVa\n" + TENSOR + STORAGE + b"I0\n(I2\nt(I-1\nttRs.",  # backwards
        b"(dVa\n" + TENSOR + b"(I7\nI0\n(I1\nt(I1\nttRs.",  # a number instead of a storage
        TENSOR + b"(NdV__call__\nI1\nstb.",  # changes the function that rebuilds tensors
        b"(dVa\n(Vother\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQs.",  # another kind of reference
        b"cos\nsystem\n(Vtrue\ntR.",
        b"\x80\x02garbage",
        b"",
    ],
)
def test_impossible_tensors_and_tricks_are_refused(tmp_path, program):
    archive(tmp_path / "a.bin", program)
    with pytest.raises(UserError, match=r"a\.bin"):
        read_published(tmp_path / "a.bin")


def test_the_hand_written_tensor_is_read_where_it_is_possible(tmp_path):
    """The counterpart of the cases above: four elements of four."""
    archive(tmp_path / "a.bin", b"(dVa\n" + TENSOR + STORAGE + b"I0\n(I4\nt(I1\nttRs.")
    assert torch.equal(read_published(tmp_path / "a.bin")["a"], torch.zeros(4))


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.bin").write_text("no zip")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": 1}, tmp_path / "number.bin")
    for name in ("text.bin", "plain.bin", "number.bin", "absent.bin"):
        with pytest.raises(UserError, match=name):
            read_published(tmp_path / name)


def test_projections_must_fit_the_blocks():
    tensors = {f"adapter_list.{i}.weight": torch.ones(1) for i in range(13)}
    names = list(rename_projections(tensors, 6, 6))
    assert names[0] == "down_blocks.0.projection.weight"
    assert names[6] == "mid_block.projection.weight"
    assert names[12] == "up_blocks.5.projection.weight"
    with pytest.raises(UserError, match="13 projections for the pretrained UNet's 9 blocks"):
        rename_projections(tensors, 4, 4)


def test_unfit_weights_are_refused_in_one_line(pretrained, tmp_path):
    torch.save({"conv_in.weight": torch.ones(1)}, tmp_path / "other.bin")
    result = import_published(tmp_path / "other.bin", pretrained, tmp_path / "out", status=2)
    assert "weights and config.json do not fit each other" in result.stderr or "size mismatch" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
