"""ONNX files, run by ONNX Runtime in this process."""

import numpy as np
import pytest

from alexnet_jax.export import check, onnx_model, portable
from alexnet_jax.utils.errors import UserError
from tests import helpers
from tests.export import cases

onnx = pytest.importorskip('onnx', reason="needs pip install 'alexnet_jax[onnx]'")
onnxruntime = pytest.importorskip('onnxruntime', reason="needs pip install 'alexnet_jax[onnx]'")


def _run(source, images, views):
    session = onnxruntime.InferenceSession(onnx_model.onnx_model(source, views), providers=['CPUExecutionProvider'])
    (given,) = session.get_inputs()
    assert (given.name, given.type) == ('image', 'tensor(uint8)')
    assert given.shape == ['N', source.record_size, source.record_size, 3]
    names = ['probabilities', 'logits']
    assert [output.name for output in session.get_outputs()] == names
    return [dict(zip(names, session.run(names, {'image': part}), strict=True)) for part in (images[:1], images)]


@pytest.mark.parametrize(('name', 'views'), [('authors', 1), ('caffe', 10), ('torchvision', 1)])
def test_onnx_runtime_gives_the_same_logits(name, views):
    source = cases.SMALL[name]()
    images = cases.images(source)
    one, all_ = _run(source, images, views)
    expected = check.reference(source, images, views, 'float32')
    assert np.ptp(expected['logits'], axis=0).max() > 0.05 * np.abs(expected['logits']).max()  # the image matters
    for key, scale in (('logits', np.abs(expected['logits']).max()), ('probabilities', 1)):
        np.testing.assert_allclose(all_[key], expected[key], rtol=0, atol=1e-5 * scale)
        np.testing.assert_allclose(one[key], all_[key][:1], rtol=0, atol=1e-6 * scale)


def test_the_file_states_versions_and_class_names():
    model = onnx.load_from_string(onnx_model.onnx_model(cases.SMALL['tiny']()))
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [('', 13)] and model.ir_version == 7
    assert {p.key: p.value for p in model.metadata_props} == {'class_names': '["class 0", "class 1", "class 2"]'}


def test_networks_that_cannot_be_written_are_refused():
    even = helpers.network(lrn_n=4)
    with pytest.raises(UserError, match=r'--formats=onnx: model.lrn_n=4: conv1 cannot be written as onnx, whose LRN'):
        portable.check_network(even, ['onnx'])
    portable.check_network(even, ['pytorch', 'safetensors'])
