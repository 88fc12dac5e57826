"""Prints versions, devices, commit, cores and XLA flags for a bug report.

alexnet_jax env [--json]
"""

import json

from absl import flags

from alexnet_jax.commands.flag import CPU_DEVICES, Flag

FLAGS = (Flag('json', False, 'Print one JSON object.'), CPU_DEVICES)


def main(args: flags.FlagValues) -> None:
    from alexnet_jax.utils.environment import describe_environment

    environment = describe_environment()
    if args.json:
        print(json.dumps(environment))
        return
    for key, value in environment.items():
        if key == 'versions':
            for name, version in value.items():
                print(f'{name}: {version or "not installed"}')
        elif key != 'command':
            print(f'{key}: {", ".join(value) if isinstance(value, list) else value}')
