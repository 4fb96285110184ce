"""What the analyses found, as tables in Markdown."""

from collections.abc import Mapping, Sequence

import numpy as np

from deme.config.sections import range_name
from deme.measure.activation_change import PARTS, change_shares, relative_change
from deme.measure.conflict import corrected_cosines, measured_cosines, pairs_within, products_of_ranges
from deme.measure.landscape import axis
from deme.measure.loss_by_timestep import relative_rows
from deme.measure.task_vector_statistics import cosines, norms, opposed_shares
from deme.report.tables import markdown_table, number

Range = tuple[int, int]
Arrays = Mapping[str, np.ndarray]


def section(title: str, note: str, table: str) -> str:
    """A table below its title, with what it was measured on."""
    return f"### {title}\n\n{note[0].upper()}{note[1:]}.\n\n{table}"


def mean_of(values: np.ndarray) -> float | None:
    """The mean of those that are there; None where none is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else None


def conflict_rows(timesteps: Sequence[int], ranges: Sequence[Range]) -> dict[str, np.ndarray]:
    """Name → mask of the pairs of timesteps s < t: within each range, within the same, in different ones, in the
    lowest and the highest range.
    """
    at = np.array(timesteps)
    within = {f"within {range_name(edges)}": pairs_within(at, *edges) for edges in ranges}
    same = np.any(list(within.values()), axis=0)
    rows = within | {"same range": same}
    if len(ranges) > 1:
        rows["different ranges"] = np.triu(~same, k=1)
        (_, first), (last, _) = ranges[0], ranges[-1]
        rows["lowest and highest range"] = (at < first)[:, None] & (at >= last)[None, :]
    return rows


def gradient_conflict(found: Arrays, timesteps: Sequence[int], ranges: Sequence[Range], note: str) -> str:
    """Mean cosines of the gradients, over pairs of timesteps, and cosines of the ranges' gradients.

    The mean of the noise-corrected ones is left out where less than half of the pairs can be told from noise: those
    that can are no fair sample of all.
    """
    products = found["products"].sum(axis=0)
    measured, corrected = measured_cosines(products), corrected_cosines(products)
    rows = []
    for name, pairs in conflict_rows(timesteps, ranges).items():
        raw, known = measured[pairs], np.isfinite(corrected[pairs])
        mean = mean_of(corrected[pairs]) if known.sum() >= len(known) / 2 else None
        row = [name, number(mean_of(raw), form=".3f"), f"{(raw < 0).mean():.0%}" if len(raw) else "-"]
        rows.append([*row, number(mean, form=".3f"), f"{known.sum():,} of {len(known):,}"])
    titles = ["pairs of timesteps", "mean cosine as measured", "below 0", "noise-corrected", "told from noise"]
    of_pairs = markdown_table(titles, rows)
    by_range = products_of_ranges(products, np.array(timesteps), ranges)
    raw, free = measured_cosines(by_range), corrected_cosines(by_range)
    names = list(map(range_name, ranges))
    rows = []
    for i, name in enumerate(names):
        cells = [f"{raw[i, j]:.2f} ({free[i, j]:.2f})" for j in range(len(names))]
        rows.append([name, *(cell.replace("nan", "-") for cell in cells)])
    of_ranges = markdown_table(["cosine of the ranges' gradients (noise-corrected)", *names], rows)
    return section("Gradient conflict", note, f"{of_pairs}\n\n{of_ranges}")


def loss_by_timestep(
    losses: Mapping[str, np.ndarray], timesteps: np.ndarray, ranges: Sequence[Range], note: str
) -> str:
    """Means of the relative loss in each range and over all timesteps, with standard errors over blocks of images."""
    rows = []
    for name, found in relative_rows(losses, timesteps, ranges).items():
        errors = [None if not np.isfinite(error) else error for error in found.error]
        rows.append([name, *(number(mean, error) for mean, error in zip(found.mean, errors, strict=True))])
    titles = ["loss relative to pretrained", *map(range_name, ranges), "all timesteps"]
    return section("Loss by timestep", note, markdown_table(titles, rows))


def task_vectors(found: Arrays, names: Sequence[str], note: str) -> str:
    """Norms and pairwise cosines of whole task vectors, and how often two of them have opposite signs."""
    products = found["products"].sum(axis=0)
    relative = norms(products) / np.sqrt(found["squares"].sum())
    opposed = opposed_shares(found["opposed"].sum(axis=0), found["moved"].sum(axis=0))
    angles = cosines(products)
    rows = []
    for i, name in enumerate(names):
        row = [name, number(norms(products)[i], form=".3f"), f"{relative[i]:.2%}"]
        rows.append(
            [*row, *("-" if i == j else f"{angles[i, j]:.2f} ({opposed[i, j]:.0%})" for j in range(len(names)))]
        )
    titles = ["task vector", "norm", "of the pretrained weights'", *names]
    return section("Task vectors", f"cosine (share of opposite signs) of {note}", markdown_table(titles, rows))


def landscape(found: Arrays, names: Sequence[str], ranges: Sequence[str], note: str) -> str:
    """Where on the plane the loss is least, overall and of each range."""
    side = axis(len(found["losses"]))
    plane, experts = (100 * (a / found["corners"][0] - 1) for a in (found["losses"], found["corners"][1:]))
    rows = []
    for k, name in enumerate(["mean over the ranges", *ranges]):
        of_plane, of_experts = ((a.mean(-1) if k == 0 else a[..., k - 1]) for a in (plane, experts))
        variances = found["errors"] ** 2
        errors = 100 * np.sqrt(variances.sum(-1) / len(ranges) ** 2 if k == 0 else variances[..., k - 1])
        first, second = np.unravel_index(np.nanargmin(of_plane), of_plane.shape)
        row = [name, f"{side[first]:.2f}, {side[second]:.2f}", f"{of_plane.min():+.2f}"]
        rows.append([*row, *(number(*pair, "+.2f") for pair in zip(of_experts, errors, strict=True))])
    titles = ["loss at timesteps", f"least at the coefficients of {', '.join(names)}", "there, % above pretrained"]
    titles += [f"expert {name}, % above pretrained ± s.e." for name in names]
    return section("Loss landscape", note, markdown_table(titles, rows))


def activation_change(found: Arrays, ranges: Sequence[str], note: str) -> str:
    """The change across channels and across positions, the mean over the blocks of each range."""
    rows = []
    for k, name in enumerate(ranges):
        squares = found["squares"][:, k]
        changes = [mean_of(relative_change(squares, part)) for part in ("channels", "positions")]
        shares = change_shares(squares)
        parts = [mean_of(shares[:, PARTS.index(part)]) for part in ("mean", "channels", "positions", "both")]
        distance = mean_of(found["projections"][:, k])
        cells = [*changes, *parts, distance]
        rows.append([name, *("-" if value is None else f"{value:.2%}" for value in cells)])
    titles = ["mean over the blocks", "channel profile changed by", "position profile changed by"]
    titles += ["share of the change: mean", "channels", "positions", "neither alone", "projection from identity"]
    return section("Channel against spatial change", note, markdown_table(titles, rows))
