import numpy as np
import pytest

from lctrain.evaluation.recall_pictures import by_depth, heatmap


def result(num_lengths, num_depths):
    depths = np.linspace(0, 1, num_depths).round(3)
    grid = {str(512 * (i + 1)): {str(depth): i / num_lengths for depth in depths} for i in range(num_lengths)}
    return {"by_depth": grid, "num_examples": 3 * num_depths}


@pytest.mark.parametrize("shape", [(1, 5), (4, 5), (10, 10), (40, 41)])
def test_heatmaps_have_one_colour_scale_and_numbers_that_fit(shape):
    figure = heatmap("needle", "after", result(*shape))
    axes, scale = figure.axes
    assert axes.collections[0].get_clim() == (0, 1)
    assert axes.collections[0].get_array().shape == shape[::-1]
    assert len(axes.texts) == (shape[0] * shape[1] if max(shape) <= 10 else 0)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the start is on top
    assert scale.get_ylabel() == "recalled of 3 a cell"
    assert max(len(axes.get_xticks()), len(axes.get_yticks())) <= 21


def test_a_heatmap_shows_each_cell_where_it_is():
    grid = {"512": {"0.0": 1.0, "1.0": 0.25}, "1024": {"0.0": 0.5, "1.0": 0.0}}
    axes = heatmap("needle", "after", {"by_depth": grid, "num_examples": 8}).axes[0]
    shown = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert shown == {((0.5, 0.5), "100%"), ((0.5, 1.5), "25%"), ((1.5, 0.5), "50%"), ((1.5, 1.5), "0%")}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "100%"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "1k"]


@pytest.mark.parametrize(("num_lengths", "num_lines"), [(1, 1), (4, 4), (40, 10)])
def test_the_curve_has_a_line_per_length(num_lengths, num_lines):
    lines = by_depth("needle", {"model": result(num_lengths, 5)}).axes[0].lines
    assert len(lines) == num_lines
    assert [*lines[0].get_xdata()] == [0, 0.25, 0.5, 0.75, 1]
    assert [*lines[-1].get_ydata()] == [(num_lengths - 1) / num_lengths] * 5


def test_the_curve_of_several_labels_is_their_mean():
    lines = by_depth("needle", {"before": result(1, 3), "after": result(4, 3)}).axes[0].lines
    assert [[*line.get_ydata()] for line in lines] == [[0.0] * 3, [0.375] * 3]
