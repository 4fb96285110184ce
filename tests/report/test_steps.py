from dataclasses import replace

import pytest
from matplotlib.container import ErrorbarContainer

from deme.measure.scores import Difference, Score
from deme.report.figures import MODELS
from deme.report.steps import Point, distance_by_steps, points_of, styles_of

ROW = Score("a/merged@ddim-20", None, 4, 2.0, [2.0, 3.0], 2.5, 0.7, differences={"pretrained": Difference(-1, 0.25, 5)})


def test_points_are_read_from_the_names_of_folders():
    """One that names no schedule has none."""
    rows = [ROW, replace(ROW, samples="a/merged"), replace(ROW, samples="a/x@y@dpmsolver++-5", differences={})]
    points = points_of(rows, "inception")
    assert points[0] == Point("FID", "ddim", 20, "merged", 2.0, pytest.approx(0.25 * 2.5706, abs=1e-4))
    assert points[1:] == [Point("FID", "dpmsolver++", 5, "x@y", 2.0, None)]


def test_a_line_for_each_row_in_a_panel_for_each_sampler_and_distance():
    """In the order of the steps; the legend names each row once, though one of them has no point in a panel."""
    values = {("ddim", 20, "a"): 2.0, ("ddim", 5, "a"): 7.0, ("ddim", 20, "b"): 1.0, ("euler", 10, "b"): 3.0}
    points = [Point(judge, *key, value, 0.5) for judge in ("FID", "KID") for key, value in values.items()]
    figure = distance_by_steps(points)
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["ddim", "euler"] * 2
    assert [axes.get_ylabel() for axes in panels] == ["FID", "", "KID", ""]
    drawn = [{line.get_label(): points_drawn(line) for line in axes.containers} for axes in panels]
    assert drawn[0] == drawn[2] == {"a": [(4.545, 7.0), (18.182, 2.0)], "b": [(22.0, 1.0)]}  # beside each other
    assert drawn[1] == {"a": [], "b": [(11.0, 3.0)]}
    assert all(isinstance(line, ErrorbarContainer) for line in panels[0].containers)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [{text.get_text() for text in axes.get_xticklabels()} for axes in panels[2:]] == [{"5", "20"}, {"10"}]
    assert panels[0].get_yscale() == "log"
    assert panels[0].get_ylim() == panels[1].get_ylim() == pytest.approx((1 / 1.1, 7 * 1.1))


def test_distances_are_relative_to_those_of_the_pretrained_network():
    """Bars, too. Its own stand below the steps; without one of them all stay what they are."""
    values = {(20, "pretrained"): 2.0, (50, "pretrained"): 1.25, (20, "a"): 3.0, (50, "a"): 1.0}
    points = [Point("FID", "ddim", *key, value, 0.5) for key, value in values.items()]
    [axes] = distance_by_steps(points).axes
    pretrained, line = axes.containers
    assert points_drawn(pretrained) == [(18.182, 1.0), (45.455, 1.0)]
    assert points_drawn(line) == [(22.0, 1.5), (55.0, 0.8)]
    [bars] = line.lines[2]
    assert [end - start for (_, start), (_, end) in bars.get_segments()] == pytest.approx([0.5, 0.8])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["20\n2", "50\n1.25"]
    assert (axes.get_ylabel(), axes.get_yscale()) == ("FID, relative to pretrained", "linear")
    [axes] = distance_by_steps(points[1:]).axes
    assert (axes.get_ylabel(), axes.get_yscale()) == ("FID", "log")
    assert points_drawn(axes.containers[1])[0][1] == 3


def points_drawn(line: ErrorbarContainer) -> list[tuple[float, float]]:
    return [(round(float(x), 3), float(y)) for x, y in zip(*line.lines[0].get_data(), strict=True)]


def test_no_two_rows_look_the_same():
    """By colour and dashes alone; a model keeps its colour, undashed."""
    names = [*MODELS, *map(str, range(20))]
    lines = [(style["color"], style["linestyle"]) for style in styles_of(names).values()]
    assert len(set(lines)) == len(names)
    assert lines[: len(MODELS)] == [(colour, "-") for colour in MODELS.values()]
