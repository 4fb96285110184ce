"""The statistics of Fisher merging and RegMean, and what the two make of them."""

import pytest
import torch
from accelerate import Accelerator
from noisy_images import probes
from safetensors.torch import save_file
from torch import nn

from deme.errors import UserError
from deme.measure import merge_statistics
from deme.measure.merge_statistics import measure_statistics
from deme.method.merging._statistics import FISHER, PRODUCTS, statistics_file
from deme.method.task_vectors import merge_method, merge_tensors


class Small(nn.Module):
    """A strided and padded convolution, another with circular padding, and a linear layer on each pixel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.strided = nn.Conv2d(1, 2, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2))
        self.circular = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.linear = nn.Linear(4, 4)

    def forward(self, noisy, timesteps, return_dict):
        hidden = self.grouped(self.circular(self.strided(noisy)))
        hidden = self.linear(hidden.movedim(1, -1)).movedim(-1, 1)
        return (nn.functional.interpolate(hidden.mean(1, keepdim=True), noisy.shape[2:]),)


def test_the_fisher_is_the_mean_square_of_each_images_gradient():
    accelerator, network = Accelerator(cpu=True), Small()
    images = probes(accelerator)
    squares, _ = measure_statistics(network, images, 30, accelerator)
    gradients = []
    for batch in images:
        losses = batch.losses(network)
        gradients += [torch.autograd.grad(loss, [*network.parameters()], retain_graph=True) for loss in losses]
    assert len(gradients) == 30
    for (name, _), *values in zip(network.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(squares[name], torch.stack(values).square().mean(0))


def test_products_predict_the_mean_square_of_any_layers_outputs(monkeypatch):
    """Σ of the outputs' squares is tr(W G Wᵀ), whatever W is; so G is right in every direction."""
    accelerator, network = Accelerator(cpu=True), Small()
    images = probes(accelerator)
    _, products = measure_statistics(network, images, 30, accelerator)
    assert products.keys() == {"strided.weight", "circular.weight", "linear.weight"}
    for name in products:
        layer = network.get_submodule(name.removesuffix(".weight"))
        inside: list[torch.Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, inputs, inside=inside: inside.append(inputs[0]))
        for batch in images:
            batch.predict(network)
        hook.remove()
        layer.bias = None
        for seed in range(3):
            torch.manual_seed(seed)
            nn.init.normal_(layer.weight)
            outputs = torch.cat(
                [
                    layer(x).movedim(1 if x.dim() == 4 and name != "linear.weight" else -1, -1).flatten(0, -2)
                    for x in inside
                ]
            )
            matrix = layer.weight.flatten(1)
            torch.testing.assert_close(outputs.square().mean(0), (matrix @ products[name] @ matrix.T).diagonal())
        network = Small()
    monkeypatch.setattr(merge_statistics, "LARGEST", 6)
    assert measure_statistics(Small(), images[:1], 8, accelerator)[1].keys() == {"strided.weight", "linear.weight"}


def merged(tmp_path, name, statistics, base, experts, coefficients, **settings):
    """The tensor w that a method makes with these statistics of each network."""
    hashes = [f"{number:016d}" for number in range(len(experts))]
    for sha256, given in zip(hashes, statistics, strict=True):
        save_file({key: tensor.contiguous() for key, tensor in given.items()}, statistics_file(tmp_path, sha256))
    method = merge_method(name, settings)
    method.check_inputs(hashes, tmp_path)
    named = {sha256: {"w": expert} for sha256, expert in zip(hashes, experts, strict=True)}
    return dict(merge_tensors({"w": base}, named, {"w": coefficients}, method))["w"]


def test_fisher_weights_number_by_number(tmp_path):
    base, experts = torch.tensor([1.0, 1, 1]), [torch.tensor([2.0, 2, 2]), torch.tensor([5.0, 5, 5])]
    statistics = [{f"{FISHER}w": torch.tensor(values)} for values in ([3.0, 0, 0], [1.0, 2, 0])]
    tensor = merged(tmp_path, "fisher", statistics, base, experts, [0.5, 0.5])
    expected = torch.tensor([(3 * 2 + 5) / 4, 5, 3.5])  # where neither has a gradient: the mean
    torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-4)
    tensor = merged(tmp_path, "fisher", statistics, base, experts, [1, 3])
    torch.testing.assert_close(tensor[0], torch.tensor(1 + 4 * (3 * 1 + 3 * 1 * 4) / (3 + 3)))
    scalars = [{key: value[0] for key, value in each.items()} for each in statistics]
    scalar = merged(tmp_path, "fisher", scalars, base[0], [each[0] for each in experts], [1, 3])
    torch.testing.assert_close(scalar, tensor[0])


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_with_equal_statistics_it_is_task_arithmetic(tmp_path, name):
    base, *experts = torch.randn(4, 5, 2, 3, 3)
    inputs = torch.randn(40, 18)
    equal = {f"{FISHER}w": torch.rand(5, 2, 3, 3), f"{PRODUCTS}w": inputs.T @ inputs}
    coefficients = [0.1, 0.7, 0]
    tensor = merged(tmp_path, name, [equal] * 3, base, experts, coefficients)
    expected = base + sum(w * (expert - base) for w, expert in zip(coefficients, experts, strict=True))
    torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4)
    other = merged(tmp_path, name, [{"other": base}] * 3, base, experts, coefficients)  # measured for other weights
    torch.testing.assert_close(other, expected)


def test_regmean_is_the_least_squares_fit_of_the_networks_predictions(tmp_path):
    base, *experts = torch.randn(3, 4, 6)
    inputs = [torch.randn(30, 6), torch.randn(30, 6) * torch.tensor([3.0, 1, 1, 1, 0.1, 0])]  # one input is always 0
    statistics = [{f"{PRODUCTS}w": x.T @ x} for x in inputs]
    tensor = merged(tmp_path, "regmean", statistics, base, experts, [0.5, 0.5], shrink=1)
    targets = torch.cat([x @ expert.T for x, expert in zip(inputs, experts, strict=True)])
    torch.testing.assert_close(tensor, torch.linalg.lstsq(torch.cat(inputs), targets).solution.T, rtol=1e-3, atol=1e-3)


def test_what_is_missing_or_negative_is_told(tmp_path):
    with pytest.raises(
        UserError, match=r"merge.method=fisher: .*0000.safetensors is missing; scripts/merge_statistics"
    ):
        merge_method("fisher", {}).check_inputs(["0" * 64], tmp_path)
    statistics = [{f"{FISHER}w": torch.ones(2)}] * 2
    with pytest.raises(UserError, match=r"merge.method=fisher: \[0.5, -0.1\]: .* must not be negative"):
        merged(tmp_path, "fisher", statistics, torch.zeros(2), [torch.ones(2)] * 2, [0.5, -0.1])
    with pytest.raises(UserError, match=r"shrink=2\.0: must lie in"):
        merge_method("regmean", {"shrink": 2})
