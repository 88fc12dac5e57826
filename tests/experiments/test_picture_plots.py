"""Rows of pictures, and receptive fields on an image, as matplotlib figures."""

import dataclasses
import logging

import matplotlib
import numpy as np
import pytest

from alexnet_jax.experiments import picture_plots
from tests.visualize import tiny


def test_pictures_keep_images_and_center_signs():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    signed = np.array([[[-2.0, 0.0, 1.0]]])
    rows = {'image': [image, image], 'deconvnet': [signed], 'map': [image[..., 0] * 2.0]}
    figure = picture_plots.pictures(rows)
    shown = [[axes.images[0].get_array() for axes in figure.axes[2 * i : 2 * i + 2] if axes.images] for i in range(3)]
    assert [len(row) for row in shown] == [2, 1, 1]
    np.testing.assert_array_equal(shown[0][1], image)
    np.testing.assert_allclose(shown[1][0], [[[0.0, 0.5, 0.75]]])
    np.testing.assert_array_equal(shown[2][0], image[..., 0] * 2.0)
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == list(rows)


def test_a_picture_of_zeros_is_gray():
    figure = picture_plots.pictures({'guided': [np.zeros((2, 2, 3))]})
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), 0.5)


def test_constant_maps_are_bright_unless_they_are_zero():
    figure = picture_plots.pictures({'occlusion': [np.ones((2, 2)), np.zeros((2, 2)), np.array([[0.5, 1.0]])]})
    colors = [axes.images[0].to_rgba(axes.images[0].get_array())[0, 0].tolist() for axes in figure.axes]
    lowest, highest = (matplotlib.colormaps['cividis'](share) for share in (0.0, 1.0))
    assert colors == [list(highest), list(lowest), list(lowest)]


def test_receptive_fields_are_outlined_and_named():
    fields = {'conv1': (3, 0, 10, 7), 'fc6': (0, 0, 28, 28)}
    figure = picture_plots.receptive_fields(np.zeros((28, 28, 3), np.uint8), fields)
    boxes = [
        (p.get_y(), p.get_x(), p.get_y() + p.get_height(), p.get_x() + p.get_width()) for p in figure.axes[0].patches
    ]
    assert boxes == [fields['conv1']] * 2 + [fields['fc6']] * 2  # each on a white line
    assert [text.get_text() for text in figure.legends[0].texts] == ['conv1: 7\u00d77', 'fc6: 28\u00d728']
    colors = [patch.get_edgecolor() for patch in figure.axes[0].patches]
    assert colors[0] == colors[2] == (1, 1, 1, 1) and len({*colors}) == 3
    assert figure.axes[0].images[0].get_extent() == [0, 28, 28, 0]  # pixel i covers i to i + 1


@pytest.mark.slow
def test_pictures_of_a_network_are_of_its_most_active_maps():
    checkpoint, images = tiny.checkpoint(), tiny.images(10)
    records = [{'image': image, 'label': 0} for image in images]
    drawn = {name: (figure, lines) for name, figure, lines in picture_plots.draw(checkpoint, records, range(9, -1, -1))}
    assert list(drawn) == ['classes', 'receptive_fields', 'visualizations', 'patches']
    inputs = [tiny.network_input(checkpoint, image) for image in images[:1:-1]]
    units = [tiny.forward(checkpoint, x, 'conv2.relu')[1].max((0, 1)).argmax() for x in inputs]
    figure, lines = drawn['visualizations']
    assert lines[0] == f'maps of conv2.relu: {", ".join(map(str, units))}' and len(units) == 8
    covered = [axes.images[0].get_array().min() for axes in figure.axes[4 * 8 :]]
    assert lines[1].endswith(f': {", ".join(f"{lowest:.3f}" for lowest in covered)}') and len(covered) == 8
    titles = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert titles == ['center crop', 'deconvnet', 'guided\nbackpropagation', 'Grad-CAM', 'occlusion']
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), images[9, 1:20, 1:20])
    assert len(drawn['classes'][0].axes) == 5 and len(drawn['patches'][0].axes) == 6 * 9
    legend = [text.get_text() for text in drawn['receptive_fields'][0].legends[0].texts]
    assert [text.partition(':')[0] for text in legend] == ['conv1', 'conv2']


@pytest.mark.slow
def test_pictures_that_a_network_cannot_have_are_named(caplog):
    records = [{'image': image, 'label': 0} for image in tiny.images(3)]
    conv1 = dataclasses.replace(tiny.LAYERS['conv1'], post='tanh pool')
    tanh = tiny.checkpoint(layers={**tiny.LAYERS, 'conv1': conv1})
    with caplog.at_level(logging.INFO):
        drawn = {name: figure for name, figure, _ in picture_plots.draw(tanh, records, [0, 1, 2])}
    titles = [text.get_text() for axes in drawn['visualizations'].axes for text in axes.texts]
    assert 'deconvnet' not in titles and 'Grad-CAM' in titles
    assert 'No pictures of deconvnet: conv1.tanh cannot be reversed' in caplog.text
