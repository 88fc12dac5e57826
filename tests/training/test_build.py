"""The run built from a config: its steps, epochs and worker processes."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.core import sharding
from alexnet_jax.data import datasets, pipeline
from alexnet_jax.training import build
from alexnet_jax.utils.errors import UserError
from tests import helpers


def _mesh(platform):
    device = SimpleNamespace(platform=platform)
    return SimpleNamespace(devices=np.array([[device]]), local_devices=[device])


@pytest.mark.parametrize(
    ('platform', 'changes', 'workers'),
    [
        ('gpu', {}, 15), ('cpu', {}, 0), ('gpu', {'data.num_workers': 2}, 2), ('cpu', {'data.num_workers': 2}, 2),
        ('gpu', {'data.num_workers': 0}, 0),
    ],
)  # fmt: skip
def test_workers_decode_if_the_step_uses_an_accelerator(platform, changes, workers, monkeypatch):
    monkeypatch.setattr(pipeline, 'default_workers', lambda rows, row_bytes, devices: 15)
    config, digits = helpers.run_config(), datasets.open_dataset('digits')
    config.update_from_flattened_dict(changes)
    prepared = digits._replace(splits={name: tuple(records) for name, records in digits.splits.items()})
    assert build._num_workers(config, prepared, _mesh(platform), 64) == workers
    if 'data.num_workers' not in changes:
        assert build._num_workers(config, digits, _mesh(platform), 64) == 0  # raw images need no decoding


def test_scripts_without_main_guard_get_no_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, 'default_workers', lambda rows, row_bytes, devices: 15)
    config, digits = helpers.run_config(), datasets.open_dataset('digits')
    prepared = digits._replace(splits={name: tuple(records) for name, records in digits.splits.items()})
    script = tmp_path / 'mine.py'
    monkeypatch.setitem(sys.modules, '__main__', SimpleNamespace(__spec__=None, __file__=str(script)))
    for text, workers in (("if __name__ == '__main__':\n    train()", 15), ('train()', 0)):
        script.write_text(text)
        assert build._num_workers(config, prepared, _mesh('gpu'), 64) == workers
    config.data.num_workers = 2
    with pytest.raises(UserError, match="would run '.*mine.py' again; move its code under if __name__"):
        build._num_workers(config, prepared, _mesh('gpu'), 64)
    for main in (SimpleNamespace(__spec__=None), SimpleNamespace(__spec__='-m', __file__=str(script))):  # a notebook
        monkeypatch.setitem(sys.modules, '__main__', main)
        assert build._num_workers(config, prepared, _mesh('gpu'), 64) == 2


@pytest.mark.slow
def test_steps_follow_the_config():
    """The color settings of `data` reach the jitted step: off after an epoch of 1,437 / 64 = 22.45 updates."""
    on = build.build(helpers.run_config(**{'data.color_std': 5.0, 'data.color_scale': 'std', 'data.color_epochs': 1.0}))
    off = build.build(helpers.run_config(**{'data.color_std': 0.0}))
    batch, key = helpers.first_batch(on), jax.random.key(0)
    quiet = {**batch, 'color': np.zeros_like(batch['color'])}

    def loss(run, batch, updates):
        """The loss after `updates` updates and two skipped batches."""
        state = run.steps.init(key)
        step, count = jax.device_put((jnp.int32(updates + 2), jnp.int32(updates)), sharding.replicated(run.mesh))
        state = state._replace(step=step, opt_state=state.opt_state._replace(count=count))
        return float(run.steps.train_step(state, sharding.to_mesh(run.mesh, batch), run.image_stats, key)[1]['loss'])

    assert loss(on, batch, 22) == loss(off, quiet, 22)
    assert abs(loss(on, batch, 21) - loss(off, quiet, 21)) > 0.1
    # Less than one update.
    never = build.build(helpers.run_config(**{'data.color_std': 5.0, 'data.color_epochs': 0.01}))
    assert loss(never, batch, 0) == loss(off, quiet, 0)


def test_deterministic_reaches_the_compiler(monkeypatch):
    """It applies to every program of a run: validation also decides on rates and on the best checkpoint."""
    options, jit = [], jax.jit
    monkeypatch.setattr(jax, 'jit', lambda *a, **k: options.append(k.get('compiler_options')) or jit(*a, **k))
    for deterministic in (False, True):
        options.clear()
        run = build.build(helpers.run_config(deterministic=deterministic))
        assert len(options) >= 3
        assert all(given.get('xla_gpu_deterministic_ops', False) is deterministic for given in options)
    state, batch = run.steps.init(jax.random.key(0)), run.to_mesh(helpers.first_batch(run))
    run.steps.train_step(state, batch, run.image_stats, jax.random.key(0))  # the CPU compiler accepts the option, too


def test_fraction_determines_the_epoch_length():
    config = helpers.digits_config(**{'data.fraction': 0.25})
    run = build.build(config)
    assert run.num_examples == round(0.25 * 1437) == 359
    assert run.total_steps == -(-359 * 20 // 64)
    for bad in (0.0, 1.5):
        with pytest.raises(UserError, match='data.fraction'):
            build.build(helpers.digits_config(**{'data.fraction': bad}))
