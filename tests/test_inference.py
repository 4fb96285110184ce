import copy

import pytest
import torch
from conftest import tiny_unet

from deme.inference import PackedConv2d, freeze


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_frozen_network_predicts_the_same(precision):
    """As the network itself under the same autocast; also with another batch size than the first."""
    plain = tiny_unet().to(memory_format=torch.channels_last)
    frozen = freeze(copy.deepcopy(plain), "cpu", precision)
    packed = any(isinstance(module, PackedConv2d) for module in frozen.modules())
    assert packed == torch.backends.mkldnn.is_available()
    for size in (4, 1):
        images = torch.randn(size, 1, 8, 8).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            expected, found = (network(images, torch.tensor(3)).sample for network in (plain, frozen))
        torch.testing.assert_close(found, expected, atol=1e-5 if precision == "no" else 1e-2, rtol=0)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
