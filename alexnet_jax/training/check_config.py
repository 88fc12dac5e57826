"""Validates a whole config: unknown keys, missing keys, ranges and combinations of values."""

from ml_collections import ConfigDict

from alexnet_jax.core.augment import Augmentation
from alexnet_jax.core.config import MODEL_FIELDS, OPTIM_CHECKS, augmentation_from_config, model_from_config
from alexnet_jax.core.model import AlexNet
from alexnet_jax.utils.checks import check_values, is_nonnegative, is_nonnegative_int, is_number, is_positive_int
from alexnet_jax.utils.errors import UserError, did_you_mean

_RUN_CHECKS = (
    ('on_nonfinite', ('stop', 'skip').__contains__, "'stop' or 'skip'"),
    ('stop_at_error', lambda value: is_nonnegative(value) and value < 100, '0 (never) or a percentage below 100'),
    ('seed', lambda value: is_nonnegative_int(value, maximum=2**31 - 1), 'an integer, 0 to 2^31 - 1'),
    ('batch_size grad_accum_steps', is_positive_int, 'a positive integer'),
    ('max_nonfinite num_steps', is_nonnegative_int, 'an integer of 0 or more'),
    ('log_every_steps eval_every_steps checkpoint_every_steps', is_nonnegative_int, 'an integer of 0 or more'),
)
_DATA_CHECKS = (
    ('cache', ('', 'host', 'device').__contains__, "'', 'host' or 'device'"),
    ('fraction', lambda value: is_number(value, maximum=1) and value > 0, 'a number above 0 and at most 1'),
    ('num_threads max_unreadable', is_nonnegative_int, 'an integer of 0 or more'),
    ('mixup_alpha', is_nonnegative, 'a number of 0 or more'),
    ('num_workers', lambda value: is_number(value, minimum=-1, kind=int), 'an integer of -1 or more'),
)


def _keys(checks: tuple) -> list[str]:
    return [key for keys, _, _ in checks for key in keys.split()]


_KEYS = {  # keys of every config; configs/paper.py explains the values
    '': (
        *_keys(_RUN_CHECKS), 'num_epochs', 'init_from', 'init_fresh', 'debug', 'deterministic',
        'data', 'model', 'mesh', 'optim',
    ),
    'data.': ('path', *_keys(_DATA_CHECKS), *Augmentation._fields),
    'model.': MODEL_FIELDS,
    'mesh.': ('data', 'tower', 'dense'),
    'optim.': (*_keys(OPTIM_CHECKS), 'rate_in_velocity', 'trust_clip', 'layer_rates', 'layer_decays', 'stages'),
}  # fmt: skip


def network_and_augmentation(config: ConfigDict) -> tuple[AlexNet, Augmentation]:
    """Validates a config, without data or devices. Returns its network and augmentation. Raises UserError."""
    _check_keys(config)
    check_values(_RUN_CHECKS, config, '{}={!r}')
    check_values(_DATA_CHECKS, config.data, 'data.{}={!r}')
    if config.num_steps == 0 and not (is_nonnegative(config.num_epochs) and config.num_epochs > 0):
        raise UserError(
            f'num_epochs={config.num_epochs}, num_steps={config.num_steps}: expected one of them above 0 and finite.'
        )
    if config.mesh.tower not in (1, 2):
        raise UserError(f'mesh.tower={config.mesh.tower}: expected 1 or 2.')
    if config.mesh.dense not in ('replicated', 'split'):
        raise UserError(f"mesh.dense={config.mesh.dense!r}: expected 'replicated' or 'split'.")
    if config.init_fresh and not config.init_from:
        raise UserError(
            f'init_fresh={config.init_fresh}: init_from is empty, so all layers are new; set init_from or remove '
            'init_fresh.'
        )
    if config.data.cache == 'device' and config.data.crop_area:
        raise UserError("data.cache='device' cannot resize crops; use data.cache='host' with data.crop_area.")
    return model_from_config(config.model), augmentation_from_config(config.data)


def _check_keys(config: ConfigDict) -> None:
    """Raises UserError for an unknown or missing key. Fields of layers are not checked here: some have defaults."""
    for prefix, known in _KEYS.items():
        section = config[prefix[:-1]] if prefix else config
        if not isinstance(section, ConfigDict):
            raise UserError(f'{prefix[:-1]}={section!r}: expected a section of keys, as in configs/paper.py.')
        given = section.keys()
        for key in given:
            if key not in known:
                raise UserError(f'unknown config key {prefix + key!r}.{did_you_mean(key, known)}')
        for key in known:
            if key not in given:
                raise UserError(f'missing config key {prefix + key!r}; copy it from configs/paper.py.')
