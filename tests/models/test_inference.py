import copy

import pytest
import torch
from conftest import tiny_unet

from deme.models.denoisers import LEAST_PACKED_WIDTH, PackedConv2d, compute_in, freeze


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("width", [16, LEAST_PACKED_WIDTH])
def test_a_frozen_network_predicts_the_same(precision, width):
    """As the network itself does under autocast; also with another batch size or memory format, or as a copy."""
    plain = tiny_unet(block_out_channels=[8, width])
    frozen = freeze(copy.deepcopy(plain), "cpu", precision)
    packed = any(isinstance(module, PackedConv2d) for module in frozen.modules())
    can_pack = torch.ops.mkldnn._is_mkldnn_bf16_supported() if precision == "bf16" else True
    assert packed == (torch.backends.mkldnn.is_available() and can_pack and width == LEAST_PACKED_WIDTH)
    for size, layout in ((4, torch.contiguous_format), (1, torch.contiguous_format), (4, torch.channels_last)):
        images = torch.randn(size, 1, 8, 8).contiguous(memory_format=layout)
        with torch.inference_mode():
            found = frozen(images, torch.tensor(3)).sample
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                expected = plain(images, torch.tensor(3)).sample
        torch.testing.assert_close(found.float(), expected.float(), atol=1e-5 if precision == "no" else 2e-2, rtol=0)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    if not packed:
        another = copy.deepcopy(frozen)
        for parameter in another.parameters():
            parameter.zero_()
        assert not another(images, torch.tensor(3)).sample.any()  # its own weights, not the original's


def test_a_network_that_is_half_throughout():
    """As on a GPU: images are cast and timesteps are not; autocast around it changes nothing."""
    plain = tiny_unet()
    half = copy.deepcopy(plain).eval()
    compute_in(torch.bfloat16, half, whole=True)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    images, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([999.0, 998.0, 501.0, 3.0])
    with torch.inference_mode():
        expected, found = (network(images, timesteps, return_dict=False)[0] for network in (plain, half))
        with torch.autocast("cpu", torch.bfloat16):
            again = half(images, timesteps, return_dict=False)[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=3e-2, rtol=0)
    assert torch.equal(again, found)
    seen = []
    half.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    half(images, timesteps)
    assert torch.equal(seen[0], timesteps)
