"""Rows of pictures, and receptive fields on an image, as matplotlib figures."""

import numpy as np

from alexnet_jax.experiments import picture_plots


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
