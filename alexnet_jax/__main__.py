"""`python -m alexnet_jax` lists the commands; `python -m alexnet_jax main ...` is `python -m alexnet_jax.main ...`."""

import ast
import pathlib
import runpy
import sys

from alexnet_jax.errors import did_you_mean

COMMANDS = (
    'main', 'tune', 'prepare', 'evaluate', 'predict', 'features', 'figures', 'experiments', 'convert', 'export',
    'benchmark', 'verify',
)  # fmt: skip


def purpose(command: str) -> str:
    """The first line of a command's docstring."""
    source = pathlib.Path(__file__).with_name(f'{command}.py').read_text(encoding='utf-8')
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def main(words: list[str]) -> None:
    """Runs the command that `words` begin with, or lists them all."""
    if not words or words[0] in ('-h', '--help', 'help'):
        lines = [f'python -m alexnet_jax.{name:11} {purpose(name)}' for name in COMMANDS]
        print('\n'.join([*lines, 'Each tells more with --help.']))
    elif words[0] in COMMANDS:
        sys.argv = words
        runpy.run_module(f'alexnet_jax.{words[0]}', run_name='__main__', alter_sys=True)
    else:
        print(f'error: there is no command {words[0]!r}.{did_you_mean(words[0], COMMANDS)}', file=sys.stderr)
        sys.exit(2)


if __name__ == '__main__':
    main(sys.argv[1:])
