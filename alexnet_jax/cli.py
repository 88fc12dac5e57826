"""What all commands share: flags, and errors a user can put right as one line and exit code 2."""

import sys
from collections.abc import Callable, Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

from alexnet_jax.errors import DivergedError, UserError, did_you_mean


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and calls `main(positional arguments)`; never returns.

    Exit codes: 0; 1 when training diverged or the program is wrong (with its traceback); 2 for a user's error.
    """
    logging.set_verbosity(logging.ERROR)  # orbax warns of much that is as it should be
    app.run(lambda argv: _call(main, argv[1:]), flags_parser=_parse)


def define_cpu_devices() -> None:
    flags.DEFINE_integer('cpu_devices', 0, 'Run on the CPU, as this many devices; 0 uses what JAX finds.', lower_bound=0)


def use_cpu_devices() -> None:
    """Call before anything touches a device."""
    if flags.FLAGS.cpu_devices:
        import jax  # not above: the processes of alexnet_jax.prepare do without

        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', flags.FLAGS.cpu_devices)


def _call(main, arguments) -> None:
    try:
        main(arguments)
    except UserError as error:
        _fail(str(error), 2)
    except DivergedError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail('interrupted.', 130)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (KeyError, AttributeError, TypeError) as error:  # config_flags on a key that is not there
        _fail(_bad_override(argv) or f'{type(error).__name__}: {error}', 2)
    except (flags.Error, ValueError, OSError, ImportError, SyntaxError) as error:
        _fail(_bad_override(argv) or _one_line(str(error)), 2)


def _one_line(text: str) -> str:
    """What matters of absl's and ml_collections' messages of several lines: the innermost error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if 'ValueError: ' in line:
            return line.split('ValueError: ', 1)[1]
    return ' '.join(lines)


def _bad_override(argv: Sequence[str]) -> str | None:
    """Names the first --config.KEY that the config does not have, with the nearest it has."""
    if 'config' not in flags.FLAGS or not isinstance(flags.FLAGS['config'].value, ConfigDict):
        return None
    config = flags.FLAGS['config'].value
    known = []
    for key, value in config.items():
        known += [f'{key}.{name}' for name in value] if isinstance(value, ConfigDict) else [key]
    for argument in argv[1:]:
        key = argument.lstrip('-').split('=', 1)[0]
        if key.startswith('config.') and key.removeprefix('config.') not in known:
            key = key.removeprefix('config.')
            return f'the config has no key {key!r}.{did_you_mean(key, known)}'
    return None


def _fail(message: str, code: int):
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(code)
