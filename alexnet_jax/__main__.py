"""Entry point of `alexnet_jax COMMAND ...` and `python -m alexnet_jax COMMAND ...`. Without a command, lists all."""

import importlib
import sys
from types import ModuleType

from alexnet_jax.commands import app
from alexnet_jax.utils.errors import did_you_mean

COMMANDS = (
    'train', 'finetune', 'prepare', 'evaluate', 'predict', 'activations', 'figures', 'report', 'experiments', 'convert',
    'export', 'weights', 'benchmark', 'verify', 'env',
)  # fmt: skip


def _load(command: str) -> ModuleType:
    return importlib.import_module(f'alexnet_jax.commands.{command}')


def main() -> None:
    """Runs the command named by the first word of the command line. Without one, lists all commands."""
    name, words = (sys.argv[1:2] or [''])[0], sys.argv[2:]
    if name in ('', '-h', '--help', 'help'):
        lines = [f'alexnet_jax {command:12} {str(_load(command).__doc__).splitlines()[0]}' for command in COMMANDS]
        app.report_errors(lambda: print('\n'.join([*lines, 'For details, add --help to a command.'])))
    elif name in COMMANDS:
        app.run(_load(name), words)
    else:
        print(f'error: unknown command {name!r}.{did_you_mean(name, COMMANDS)}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
