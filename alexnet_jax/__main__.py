"""`python -m alexnet_jax` lists the commands."""

import ast
import pathlib

COMMANDS = (
    'main',
    'prepare',
    'evaluate',
    'predict',
    'features',
    'figures',
    'experiments',
    'convert',
    'benchmark',
    'verify',
)


def purpose(command: str) -> str:
    """The first line of a command's docstring."""
    source = pathlib.Path(__file__).with_name(f'{command}.py').read_text(encoding='utf-8')
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


if __name__ == '__main__':
    for name in COMMANDS:
        print(f'python -m alexnet_jax.{name:10} {purpose(name)}')
