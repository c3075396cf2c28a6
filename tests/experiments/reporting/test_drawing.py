"""What all pictures share: bands of errors, and heat maps in per cent."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.reporting.drawing import draw_accuracies, draw_band, legend_below


def axes():
    return Figure().add_subplot()


def test_a_heat_map_is_in_per_cent_and_has_no_colour_for_tasks_that_come_later():
    panel = axes()
    draw_accuracies(panel, [[0.9, 0.1], [0.4, 0.8]])
    (image,) = panel.images
    drawn = image.get_array()
    assert np.ma.getmaskarray(drawn).tolist() == [[False, True], [False, False]]
    assert drawn.compressed().tolist() == pytest.approx([90, 40, 80])
    assert image.get_clim() == (0, 100)
    assert [text.get_text() for text in panel.texts] == ["90", "10", "40", "80"]
    assert panel.texts[1].get_color() != panel.texts[2].get_color()
    bar = panel.figure.axes[1]
    assert bar.get_ylabel() == "test accuracy in %"


def test_a_heat_map_of_many_tasks_has_no_numbers():
    panel = axes()
    draw_accuracies(panel, np.eye(13).tolist())
    assert len(panel.texts) == 0


def test_a_band_is_a_standard_error_up_and_down():
    panel = axes()
    draw_band(panel, [1, 2], [10.0, 20.0], [1.0, 3.0])
    (band,) = panel.collections
    corners = {(x, y) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(1, 9), (1, 11), (2, 17), (2, 23)}


def test_a_single_seed_has_no_band():
    panel = axes()
    draw_band(panel, [1, 2], [10.0, 20.0], [None, None])
    assert len(panel.collections) == 0
    assert len(panel.lines) == 1


def test_a_legend_has_every_curve_once():
    figure = Figure()
    for panel in figure.subplots(1, 2):
        panel.plot([1, 2], label="ewc")
    legend_below(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ewc"]


def test_a_legend_of_long_names_stays_within_the_figure():
    name = "ewc, strength 30, optimizer Adam, lr 0.001, tail_average 0.2, betas [0.9, 0.999]"
    figure = Figure(figsize=(4.4, 3.0), layout="constrained")
    figure.subplots().plot([1, 2], label=name)
    legend_below(figure, columns=4, size=8.5)
    (legend,) = figure.legends
    FigureCanvasAgg(figure).draw()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert legend.get_texts()[0].get_text().replace("\n", " ") == name
