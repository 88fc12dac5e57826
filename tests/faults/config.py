"""A network so small that a fault costs seconds."""

from tests import helpers


def get_config():
    return helpers.resume_config(num_steps=60)
