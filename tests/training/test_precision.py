"""bfloat16 against float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import alexnet_jax
from alexnet_jax.core import augment, model, sharding, train_step
from alexnet_jax.training import build
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _quickstart(**changes):
    config = alexnet_jax.get_config('quickstart')
    config.update_from_flattened_dict({'mesh.tower': 1, 'mesh.data': 1, **changes})
    return build.build(config)


@pytest.mark.slow
def test_bfloat16_gradients_agree_with_float32():
    found = {}
    for dtype in ('float32', 'bfloat16'):
        run = _quickstart(**{'model.dtype': dtype})
        state, batch = run.steps.init(jax.random.key(0)), helpers.first_batch(run)
        x = augment.preprocess(batch, run.image_stats, run.augmentation)
        masks = model.dropout_masks(run.network, jax.random.key(1), len(x), 32)
        forward = sharding.forward(run.network, run.mesh)
        loss = jax.jit(jax.grad(train_step.loss_and_sums, has_aux=True), static_argnames='forward')
        found[dtype], sums = loss(state.params, x, batch, masks, forward=forward)
        assert sums['loss'].dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, found[dtype]))} == {jnp.dtype('float32')}
    for a, b in zip(*map(jax.tree.leaves, found.values()), strict=True):
        a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
        assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)
        assert abs(np.linalg.norm(b) / np.linalg.norm(a) - 1) < 0.05
        assert (a != b).any()  # the precisions do differ


def test_bfloat16_over_two_cpu_towers_is_refused():
    """XLA's compiler would abort the process."""
    changes = {'model.dtype': 'bfloat16', 'mesh.data': 1}
    for mesh in ({'mesh.tower': 2}, {'mesh.tower': 1, 'mesh.data': 2, 'mesh.dense': 'split'}):
        with pytest.raises(UserError, match=r"'bfloat16' with mesh.tower=2 or mesh.dense='split': .*; use --config"):
            build.build(helpers.run_config(**{**changes, **mesh}))
    build.build(helpers.run_config(**changes, **{'mesh.tower': 1}))


@pytest.mark.slow
def test_training_in_bfloat16_tracks_float32():
    """60 updates of the quickstart: from 2.3 (guessing) to about 1.2 in both; two seeds differ by as much."""
    means = {}
    for dtype in ('float32', 'bfloat16'):
        run = _quickstart(**{'model.dtype': dtype})
        state, key, batches, losses = (
            run.steps.init(jax.random.key(0)),
            jax.random.key(0),
            run.train_batches(0),
            [],
        )
        for _ in range(60):
            state, report = run.steps.train_step(state, run.to_mesh(next(batches)), run.image_stats, key)
            losses.append(report['loss'] / report['weight'])
        batches.close()
        means[dtype] = np.mean(jax.device_get(losses[-15:]))
    assert max(means.values()) < 1.6
    assert abs(means['bfloat16'] - means['float32']) < 0.3, means
