"""The variants of the suites and what each changes."""

import math

import alexnet_jax
from alexnet_jax.core import architecture
from alexnet_jax.core.config import model_from_config
from alexnet_jax.experiments import ablations
from tests import helpers


def _paper():
    return alexnet_jax.get_config('paper')


def _post_ops(config):
    return [layer.post for layer in config.model.layers.values()]


def test_variants_change_what_they_name():
    base = _paper()
    variants = {variant.name: ablations.with_changes(base, variant.changes) for variant in ablations.ablations(base)}
    assert not any('lrn' in post for post in _post_ops(variants['no normalization']))
    assert variants['no dropout'].model.dropout_rate == variants['no color'].data.color_std == 0
    assert variants['no weight decay'].optim.weight_decay == 0
    assert (variants['no crops or reflections'].data.random_crop, variants['no crops or reflections'].data.reflect) == (
        False,
    ) * 2
    assert base.to_dict() == _paper().to_dict() == variants['base'].to_dict()  # the base is unchanged
    for name, config in variants.items():
        architecture.infer_shapes(model_from_config(config.model), 224, towers=config.mesh.tower), name


def test_removed_layer_keeps_sizes_of_layers_above():
    """The sizes stay 55 - 27 - 13 - 13 - 13 - 6; the stride and pooling of the removed layer move to a neighbor."""
    base = _paper()
    last = {}
    convs = ['conv1', 'conv2', 'conv3', 'conv4', 'conv5']
    for name in convs:
        config = ablations.with_changes(base, {'model.layers': ablations.without_layer(name)})
        left = [other for other in convs if other != name]
        sizes = architecture.infer_shapes(model_from_config(config.model), 224)
        assert list(sizes) == [*left, 'fc6', 'fc7', 'fc8']
        last[name] = sizes[left[-1]].outputs[:2]
        strides = math.prod(config.model.layers[other].stride for other in left)
        assert (strides, sum(post.split().count('pool') for post in _post_ops(config))) == (4, 3)
    # Without conv1, the 5 px window of conv2 fits in 56 times, not 55: 56 - 28 - 14 - 7.
    assert last == {'conv1': (7, 7), **dict.fromkeys(convs[1:], (6, 6))}


def test_new_first_layer_gets_weights_for_pixels():
    """Weights that suit activations of about 1 are a hundred times too large for values up to 255."""
    base = helpers.digits_config()
    base.model.layers.conv2.features = 16
    changed = ablations.with_changes(base, {'model.layers': ablations.without_layer('conv1')}).model.layers
    assert base.model.layers.conv2.init == 'normal(0.17)'
    assert (changed.conv2.features, changed.conv2.stride, changed.conv2.init) == (16, 1, 'normal(0.003)')
    kept = ablations.with_changes(base, {'model.layers': ablations.without_layer('conv2')}).model.layers
    assert kept.conv1.init == 'normal(0.003)'


def test_variants_work_for_small_networks():
    base = helpers.digits_config()
    for variant in ablations.ablations(base):
        config = ablations.with_changes(base, variant.changes)
        architecture.infer_shapes(model_from_config(config.model), config.data.image_size, towers=config.mesh.tower)


def test_names_of_variants_can_be_given_to_only():
    """--only has names separated by commas."""
    names = [variant.name for suite in ablations.SUITES.values() for variant in suite(_paper())]
    assert len(names) > 20 and not [name for name in names if ',' in name or name != name.strip()]


def test_large_batches_differ_only_in_batch_rate_and_warmup():
    quickstart = alexnet_jax.get_config('quickstart')
    configs = [ablations.with_changes(quickstart, variant.changes) for variant in ablations.large_batch(quickstart)]
    assert [config.batch_size for config in configs] == [64, 1024, 1024, 1024, 4096]
    assert [config.optim.learning_rate for config in configs] == [0.01, 0.04, 0.16, 10.0, 10.0]
    assert [config.optim.trust_coefficient for config in configs] == [0.0, 0.0, 0.0, 0.001, 0.001]
    assert [config.optim.warmup_epochs for config in configs] == [0.0, 2.0, 2.0, 2.0, 2.0]
    base, *large = configs
    # Microbatches of the base's size: activations take no more memory.
    assert [config.batch_size // config.grad_accum_steps for config in configs] == [64] * 5
    for config in large:  # the rest is the base's: also the schedule and the number of epochs
        config.update(batch_size=64, grad_accum_steps=1, log_every_steps=base.log_every_steps)
        config.optim.update(learning_rate=0.01, trust_coefficient=0.0, warmup_epochs=0.0, warmup_start=0.0)
        assert config.to_dict() == base.to_dict() and base.optim.schedule == 'poly'


def test_cifar10_variants_name_their_sources():
    """The sources are files in layers/layers-cifar of the release, and section 3.3."""
    variants = {variant.name: variant for variant in ablations.cifar10(_paper())}
    files = ('layers-80sec.cfg', 'layers-19pct.cfg', 'layers-18pct.cfg', 'layers-conv-local-13pct.cfg')
    for name, file in zip(('80sec', '19pct', '18pct', '13pct'), files, strict=True):
        assert file in variants[name].source
    assert variants['13pct'].paper == variants['13pct'].log == (13.0, None)
    assert variants['11pct'].paper == (-2.0, None) and '11%' in variants['11pct'].source
