"""A network so small that a fault costs seconds; 23 updates an epoch, and cadences that do not fall on its end."""

from tests import helpers


def get_config():
    return helpers.digits_config(
        **{
            'num_steps': 60,
            'eval_every_steps': 12,
            'checkpoint_every_steps': 8,
            'log_every_steps': 3,
            'mesh.data': 1,
            'mesh.tower': 1,
            'optim.schedule': 'plateau',
            'optim.patience': 1,
            'optim.min_delta': 50.0,
        }
    )
