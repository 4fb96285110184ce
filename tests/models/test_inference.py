import copy

import pytest
import torch
from conftest import tiny_unet

from deme.models.inference import LEAST_PACKED_WIDTH, PackedConv2d, freeze


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("width", [16, LEAST_PACKED_WIDTH])
def test_a_frozen_network_predicts_the_same(precision, width):
    """As the network itself under the same autocast; also with another batch size or memory format than the first."""
    plain = tiny_unet(block_out_channels=[8, width])
    frozen = freeze(copy.deepcopy(plain), "cpu", precision)
    packed = any(isinstance(module, PackedConv2d) for module in frozen.modules())
    can_pack = torch.ops.mkldnn._is_mkldnn_bf16_supported() if precision == "bf16" else True
    assert packed == (torch.backends.mkldnn.is_available() and can_pack and width == LEAST_PACKED_WIDTH)
    for size, layout in ((4, torch.contiguous_format), (1, torch.contiguous_format), (4, torch.channels_last)):
        images = torch.randn(size, 1, 8, 8).contiguous(memory_format=layout)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected, found = (network(images, torch.tensor(3)).sample for network in (plain, frozen))
        torch.testing.assert_close(found, expected, atol=1e-5 if precision == "no" else 2e-2, rtol=0)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
