"""Entry point of `alexnet_jax COMMAND ...` and `python -m alexnet_jax COMMAND ...`. Without a command, lists all."""

import ast
import importlib
import pathlib
import sys

from alexnet_jax.commands import app
from alexnet_jax.utils.errors import did_you_mean

COMMANDS = (
    'train', 'finetune', 'prepare', 'evaluate', 'predict', 'activations', 'figures', 'experiments', 'convert', 'export',
    'benchmark', 'verify', 'env',
)  # fmt: skip


def purpose(command: str) -> str:
    """Returns the first line of a command's docstring."""
    source = pathlib.Path(__file__).parent.joinpath('commands', f'{command}.py').read_text(encoding='utf-8')
    return str(ast.get_docstring(ast.parse(source))).splitlines()[0]


def main() -> None:
    """Runs the command named by the first word of the command line. Without one, lists all commands."""
    name, words = (sys.argv[1:2] or [''])[0], sys.argv[2:]
    if name in ('', '-h', '--help', 'help'):
        lines = [f'alexnet_jax {command:12} {purpose(command)}' for command in COMMANDS]
        print('\n'.join([*lines, 'For details, add --help to a command.']))
    elif name in COMMANDS:
        app.run(importlib.import_module(f'alexnet_jax.commands.{name}'), words)
    else:
        print(f'error: unknown command {name!r}.{did_you_mean(name, COMMANDS)}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main()
