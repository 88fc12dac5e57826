"""What all commands share: flags, and errors a user can put right as one line and exit code 2."""

import contextlib
import errno
import inspect
import os
import re
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from logging import getLogger

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from alexnet_jax import processes
from alexnet_jax.errors import DivergedError, TerminatedError, UserError, did_you_mean, first_line, local

_configs = {}  # flags that are config files, and the file where none is given
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)


def run(main: Callable[..., None], *, required: Sequence[str], arguments: str | None = None) -> None:
    """Parses the flags, sees that the required ones are there, and calls `main()`; never returns.

    arguments: what the words are that come without --, and how many; then `main(words)` is called, with one at least.

    Exit codes: 0; 1 when training diverged or the program is wrong (with its traceback); 2 for a user's error; 130 and
    143 when it was told to stop, by SIGINT and SIGTERM.
    """
    logging.set_verbosity(logging.FATAL)  # orbax logs with their tracebacks errors that it raises too
    getLogger('asyncio').setLevel('CRITICAL')
    threading.excepthook, sys.unraisablehook = _tell_of_thread, _tell_of_lost
    sys.argv = _configs_first(sys.argv)
    app.run(lambda argv: _call(main, argv[1:], required, arguments), flags_parser=_parse)


def define_config(name: str, default: str | None, help: str) -> None:
    """A flag for a config file, whose keys are flags too: --config=FILE --config.KEY=VALUE, in any order."""
    config_flags.DEFINE_config_file(name, None, f'{help} Default: {default}.' if default else help)
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    _configs[name] = default


def define_cpu_devices() -> None:
    """--cpu_devices, which `set_up_jax` reads."""
    flags.DEFINE_integer(
        'cpu_devices', 0, 'Run on the CPU, as this many devices; 0 uses what JAX finds.', lower_bound=0
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['cpu_devices'])  # so that --help shows it


def define_views() -> None:
    """--views, 1 or 10."""
    flags.DEFINE_integer('views', 1, '1: centre crop; 10: the ten views of section 4.1, softmax averaged.')
    wanted = 'expected 1 (centre) or 10 (corners and centre, with reflections).'
    flags.register_validator('views', lambda views: views in (1, 10), message=wanted)
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS['views'])  # so that --help shows it


def set_up_jax() -> None:
    """--cpu_devices, other processes of the same run, and compiled programs kept for the next start.

    Call it before anything touches a device. For several processes, each has the same JAX_COORDINATOR_ADDRESS and
    JAX_NUM_PROCESSES in its environment and its own JAX_PROCESS_ID (`launch/local.sh` sets them). A process takes all
    GPUs it sees, or those of JAX_LOCAL_DEVICE_IDS.
    """
    import jax  # not above: the processes of alexnet_jax.prepare do without

    if flags.FLAGS.cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', flags.FLAGS.cpu_devices)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ:
        try:
            number, count = (int(os.environ[name]) for name in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES'))
        except (KeyError, ValueError) as error:
            raise UserError(
                f'JAX_COORDINATOR_ADDRESS is set, but {error}; set JAX_NUM_PROCESSES and JAX_PROCESS_ID to numbers too.'
            ) from error
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without it
        # Where JAX finds Slurm by itself it gives each process one GPU, although ours has all of its node.
        jax.distributed.initialize(num_processes=count, process_id=number, cluster_detection_method='deactivate')
    # JAX_COMPILATION_CACHE_DIR puts it elsewhere. On several machines only there: the first process writes, so of those
    # with a home of their own the others would compile what it need not, and wait for its part of the autotuning.
    if jax.config.jax_compilation_cache_dir is None and not processes.on_several_machines():
        base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
        cache = os.path.join(base, 'alexnet_jax')
        with contextlib.suppress(OSError):  # a home that cannot be written: every start compiles
            os.makedirs(cache, exist_ok=True)
            jax.config.update('jax_compilation_cache_dir', cache)


def _call(main, words, required, arguments) -> None:
    try:
        if words and arguments is None:
            raise UserError(f'unexpected argument {words[0]!r}; options start with --.')
        for word in sys.argv[1:]:
            local(word.partition('=')[2] or word)
        for name in required:
            if not flags.FLAGS[name].value:
                raise UserError(f'--{name} is missing; see --help.')
        if arguments is None:
            main()
        elif words:
            main(words)
        else:
            raise UserError(f'nothing to work on: give {arguments}.')
        sys.stdout.flush()  # while an error can still be told
    except UserError as error:
        _fail(str(error), 2)
    except DivergedError as error:
        _fail(str(error), 1)
    except TerminatedError as error:
        _fail(str(error), 143)
    except KeyboardInterrupt:
        _fail('interrupted.', 130)
    except BrokenPipeError:
        _nobody_reads()
    except OSError as error:
        if error.errno not in _DISK:
            raise
        if not error.filename:
            _drop_output()
        _fail(f'{error.filename or "the output"} cannot be written or read: {error.strerror}.', 2)
    except Exception as error:
        full = isinstance(error, MemoryError) or re.search('RESOURCE_EXHAUSTED|Out of memory alloc', str(error))
        if full and 'os_error_code' not in str(error):  # XLA, numpy; tensorstore means the disk
            _fail(
                f'there is not enough memory ({first_line(error)[:200]}); lower the batch size, or in '
                'training --config.accumulate=N, which computes a batch in N parts with the same result.',
                2,
            )
        if _without_device(error):
            said = f': {first_line(error)[:200]}' if str(error) else ''
            _fail(
                f'JAX cannot open its devices (JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")!r}{said}); '
                '--cpu_devices=1 computes on the CPU.',
                2,
            )
        if 'JAX_COORDINATOR_ADDRESS' not in os.environ:
            raise
        if re.search('Gloo|NCCL|[Cc]oordination|heartbeat', str(error)):
            _fail(f'another process of this run has ended, and says why ({first_line(error)[:200]}).', 1)
        traceback.print_exc()
        _fail('the program is wrong; the other processes end with it.', 1)


def _without_device(error: Exception) -> bool:
    """Whether that is JAX, where a device does not open, or none is there of those asked for: that it only asserts."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    asserted = isinstance(error, AssertionError) and last.filename.endswith('xla_bridge.py')
    return asserted or 'Unable to initialize backend' in str(error)


def _nobody_reads():
    """Ends without a word where the reader has closed the pipe, as in `... | head`."""
    _drop_output()
    sys.exit(141)


def _drop_output():
    """Discards what still waits to be written: the flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        arguments = flags.FLAGS(argv)
    except SystemExit:
        if not any(word.lstrip('-').startswith('help') for word in argv[1:]):
            raise
        sys.exit(0)  # absl ends --help with 1
    except BrokenPipeError:  # of `--help | head`
        _nobody_reads()
    except IndexError as error:
        if not any('[' in word for word in argv):  # of a config file
            raise
        _fail(f'{_one_line(str(error))}; a tuple is given whole: --config.KEY="((...), ...)".', 2)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
        _fail(_config_error(argv) or _one_line(str(error)), 2)
    for name in _configs:
        if not isinstance(flags.FLAGS[name].value, ConfigDict | None):
            _fail(_config_error(argv) or 'the config cannot be loaded.', 2)
    return arguments


def _configs_first(argv: Sequence[str]) -> list[str]:
    """--config=FILE before all --config.KEY=VALUE, as absl wants it, and with its default where it is not given."""
    words = ['--help' if word == '-h' else word for word in argv[1:]]
    for name, default in _configs.items():
        for i in [i for i, word in enumerate(words[:-1]) if word in (f'-{name}', f'--{name}')][:1]:
            words[i : i + 2] = [f'{words[i]}={words[i + 1]}']
        first = [word for word in words if re.match(rf'--?{name}=', word)]
        if default and not first and f'--{name}' not in words:
            first = [f'--{name}={default}']
        words = [*first, *(word for word in words if word not in first)]
    return [argv[0], *words]


def _one_line(text: str) -> str:
    """absl and ml_collections wrap a config file's own error in several lines: the innermost, without its kind."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        if found := re.match(r'(?:[\w.]+: )?\w+(?:Error|Exception): (.*)', line):
            return found[1]
    return ' '.join(lines)


def _config_error(argv: Sequence[str]) -> str | None:
    """What is wrong with --config or a --config.KEY, with the nearest right name; None if that is not the matter."""
    words = [word.lstrip('-') for argument in argv[1:] for word in argument.split('=', 1)]
    flag = next((name for name in _configs if name in words[:-1]), None)
    if flag is None:
        return None
    path, _, variant = words[words.index(flag) + 1].partition(':')
    if not os.path.isfile(path):
        names = [os.path.join(os.path.dirname(path), n) for n in _python_files(os.path.dirname(path) or '.')]
        return f'there is no config file {path!r}.' + (did_you_mean(path, names) if names else '')
    try:
        get_config = runpy.run_path(path).get('get_config')
        if not callable(get_config):
            return f'{path!r} has no function get_config(); configs/paper.py shows one.'
        if variant and not inspect.signature(get_config).parameters:
            return f'{path!r} has no variants; expected --{flag}={path} without {":" + variant!r}.'
        config = get_config(*([variant] if variant else []))
    except ValueError as error:  # of the config's own making: no such variant
        return first_line(error)
    except Exception as error:
        return f'{path!r} cannot be loaded ({type(error).__name__}: {first_line(error)}).'
    if not isinstance(config, ConfigDict):
        return f'get_config() of {path!r} returns {type(config).__name__}; expected an ml_collections.ConfigDict.'
    known = []
    for key, value in config.items():
        known += [f'{key}.{name}' for name in value] if isinstance(value, ConfigDict) else [key]
    for word in words:
        key = word.removeprefix(f'{flag}.')
        if key != word and key not in known:
            return f'the config has no key {key!r}.{did_you_mean(key, known)}'
    return None


def _python_files(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith('.py')] if os.path.isdir(folder) else []


def _tell_of_thread(failure) -> None:
    """Prints in one line what ended a thread; whoever waits for its result gets the error too, and tells the remedy."""
    print(f'error in the background: {" ".join(str(failure.exc_value).split())[:300]}', file=sys.stderr, flush=True)


def _tell_of_lost(failure) -> None:
    """The default hook, but without tensorstore's 'Event loop is closed', which follows a save that failed."""
    if str(failure.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(failure)


def _fail(message: str, code: int):
    with contextlib.suppress(OSError):
        print('error:', ' '.join(message.split()), file=sys.stderr, flush=True)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ and code != 143:
        os._exit(code)  # `jax.distributed` would wait five minutes for the others, and they for this one
    # Where the folder of a save cannot be made, threads of orbax wait for it twenty minutes, and the exit for them.
    watch = threading.Timer(10, os._exit, [code])
    watch.daemon = True
    watch.start()
    sys.exit(code)
