"""Loss by timestep: the denoising loss of all networks at the same timesteps, on the same noisy images."""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import sem

from deme.analysis import Material
from deme.job.records import Arrays, Keep
from deme.measure.noisy import CleanImages
from deme.measure.scores import half_width
from deme.models.variants import ORDER
from deme.report.figures import SEPARATOR, model_style, noted
from deme.report.tables import headed_table, number

MOST_BLOCKS = 8  # of images, whose spread gives the standard errors


def measure(material: Material) -> Arrays:
    """Losses of shape (n, images) by model: whole models first, then the experts."""
    images = cache(lambda: material.clean(material.measured_on, 1))  # not drawn if all losses are kept
    losses = {}
    for name in material.networks:
        make = partial(losses_by_timestep, material, name, images)
        losses[name] = material.keep(f"loss_by_timestep-{name}", [name], make)["losses"]
    experts = np.stack([losses[name] for name in material.range_names])
    losses["ensemble"] = experts[material.inside.argmax(axis=0), np.arange(len(material.timesteps))]
    names = dict.fromkeys((*ORDER, *material.experts, *material.range_names))
    return {name: losses[name] for name in names if name in losses}


@torch.no_grad()
def losses_by_timestep(material: Material, name: str, images: Callable[[], CleanImages], _keep: Keep) -> Arrays:
    """A network's loss of each image at each of n timesteps: float64, shape (n, images)."""
    network, count = material.network, images().count
    network.load_state_dict(material.tensors(name))
    losses = torch.zeros(len(material.timesteps), count, dtype=torch.float64, device=material.processes.device)
    for row, timestep in zip(losses, material.timesteps, strict=True):
        for places, batch in images().at(timestep, range(count)):
            row[places] = batch.losses(network).double()
    return {"losses": material.processes.reduce(losses, "sum").cpu().numpy()}


def relative_loss(losses: np.ndarray, pretrained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The loss (n, images) at each timestep relative to the pretrained network's: of all images, (n,), and by block.

    The spread of up to MOST_BLOCKS blocks of images, (n, blocks), gives the standard errors.
    """
    blocks = np.array_split(np.arange(losses.shape[1]), min(MOST_BLOCKS, losses.shape[1]))
    ratios = [losses[:, part].mean(axis=1) / pretrained[:, part].mean(axis=1) for part in blocks]
    return losses.mean(axis=1) / pretrained.mean(axis=1), np.stack(ratios, axis=1)


def relative_means(losses: np.ndarray, pretrained: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the relative loss over each range, of masks (ranges, n), and over all timesteps: (ranges + 1,).

    These are means of ratios. The ratio of the means would be that of the lowest timesteps, whose loss is largest.
    """
    by_timestep, by_block = relative_loss(losses, pretrained)
    chosen = [*inside, slice(None)]
    errors = [sem(by_block[part].mean(axis=0)) for part in chosen]
    return np.array([by_timestep[part].mean() for part in chosen]), np.array(errors)


def report(arrays: Arrays, material: Material) -> tuple[str, dict[str, Figure]]:
    """The relative loss of whole models, and of each expert in and out of its range; means over the ranges."""
    pretrained, names = arrays["pretrained"], material.range_names
    timesteps, inside = np.array(material.timesteps), material.inside
    images = f"{pretrained.shape[1]} {material.measured_on} images"
    note = f"{len(timesteps)} timesteps × {images}, the same noise for all networks"
    rows = []
    for name, losses in arrays.items():
        means = zip(*relative_means(losses, pretrained, inside), strict=True)
        rows.append([name, *(number(*pair) for pair in means)])
    titles = ["loss relative to pretrained", *names, "all timesteps"]
    table = headed_table("Loss by timestep", note, titles, rows)

    figure = noted(9.2, 7.6, f"{note}; bands: 95 % confidence intervals over blocks of images")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for row, name in enumerate(name for name in arrays if name not in names):
        mean, by_block = relative_loss(arrays[name], pretrained)
        [line] = upper.plot(timesteps, mean, label=name, markersize=3.5, **model_style(name, row))
        band = half_width(sem(by_block, axis=1), by_block.shape[1] - 1)
        upper.fill_between(timesteps, mean - band, mean + band, color=line.get_color(), alpha=0.2, linewidth=0)
    for row, name in enumerate(names):
        mean, _ = relative_loss(arrays[name], pretrained)
        style = {"markersize": 3.5, "linewidth": 2} | model_style(name, row)
        lower.plot(timesteps, mean, color=style["color"], linewidth=1, linestyle="--")
        lower.plot(timesteps[inside[row]], mean[inside[row]], label=f"expert of {name}", **style)
    lower.axhline(1, color="black", linewidth=0.8)
    for axes, title in ((upper, "whole models"), (lower, "experts: thick in their range, dashed outside of it")):
        for low, _ in material.ranges[1:]:
            axes.axvline(low, **SEPARATOR)
        axes.set(title=title, ylabel="denoising loss / pretrained's")
        axes.legend(ncols=3)
    lower.set_xlabel("timestep")
    return table, {"loss-by-timestep": figure}
