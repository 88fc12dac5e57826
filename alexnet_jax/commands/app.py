"""Runs a command: parses its flags, sets up JAX, and prints user errors as one line with exit code 2.

A command is a module with a docstring (purpose and examples, shown by --help), `FLAGS` and `main(args)`. A command with
positional arguments also has `ARGUMENTS` (their description) and `main(args, words)`. If `FLAGS` contains
--cpu_devices, JAX is set up before `main`. A command with subcommands has only a docstring and `SUBCOMMANDS`, a dict
{name: class with the same attributes}. Commands import JAX and modules that use it inside `main`, so that --help and
flag errors are printed without delay.
"""

import contextlib
import errno
import inspect
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from alexnet_jax.utils import logs, processes
from alexnet_jax.utils.errors import DivergedError, TerminatedError, UserError, first_line
from alexnet_jax.utils.files import absolute_local_path, cache_folder

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES)


def run(command: Any, words: Sequence[str] | None = None) -> None:
    """Parses a command's flags from `words` (default: the command line) and calls its `main`. Does not return.

    Exit codes: 0 success, 1 diverged training or a bug (with a traceback), 2 user error, 130 SIGINT, 141 closed output
    pipe, 143 SIGTERM.
    """
    threading.excepthook, sys.unraisablehook = _report_thread, _report_unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and classes may not fit the terminal's encoding
        sys.stdout.reconfigure(errors='backslashreplace')
    logs.escape_stream(sys.stdout)
    words = sys.argv[1:] if words is None else list(words)
    if subcommands := getattr(command, 'SUBCOMMANDS', None):
        if words and words[0] in subcommands:
            command, words = subcommands[words[0]], words[1:]
        elif not any(map(_asks_for_help, words)):
            _fail(f'subcommand {" ".join(words[:1])!r}: expected one of {", ".join(subcommands)}.', 2)
    if any(map(_asks_for_help, words)):
        report_errors(lambda: print(help_text(command)))
        sys.exit(0)

    def parser(_):
        flags.FLAGS.mark_as_parsed()  # absl's global flags; commands use their own FlagValues
        return sys.argv[:1]

    app.run(lambda _: report_errors(lambda: _call(command, words)), argv=sys.argv[:1], flags_parser=parser)


def _asks_for_help(word: str) -> bool:
    return bool(re.fullmatch('--?(h|help|helpfull|helpshort)', word))


def help_text(command: Any) -> str:
    """Returns a command's docstring and its flags or subcommands."""
    if subcommands := getattr(command, 'SUBCOMMANDS', None):
        lines = [f'  {name:8} {str(inspect.getdoc(sub)).splitlines()[0]}' for name, sub in subcommands.items()]
        return '\n'.join([str(inspect.getdoc(command)), '', *lines, '', 'For details, add --help to a subcommand.'])
    values = flags.FlagValues()
    for flag in command.FLAGS:
        flag.define(values)
        values.register_key_flag_for_module(command.__name__, values[flag.name])
    own = values.module_help(command.__name__).partition('\n')[2]
    return f'{inspect.getdoc(command)}\n\nflags:\n{own}'


def parse(command: Any, words: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Defines a command's flags in `values` and parses `words`. Returns the positional arguments.

    Raises UserError if a flag is unknown or its value is invalid.
    """
    for flag in command.FLAGS:
        words = flag.define(values, words)
    try:
        return values([sys.argv[0], *words])[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def set_up_jax(cpu_devices: int) -> None:
    """Selects the devices, connects the processes of a run, and enables the persistent compilation cache.

    Call it before anything uses a device. In a run of several processes, each process needs the same environment
    variables JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, and its own JAX_PROCESS_ID (`launch/local.sh` sets them). A
    process uses all visible GPUs, or those in JAX_LOCAL_DEVICE_IDS. cpu_devices: if not 0, use this many CPU devices.

    Raises UserError if the environment variables are incomplete.
    """
    import jax  # not at the top: the processes of alexnet_jax prepare do not load JAX

    from alexnet_jax.utils import compiler

    if cpu_devices:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', cpu_devices)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ:
        try:
            number, count = (int(os.environ[name]) for name in ('JAX_PROCESS_ID', 'JAX_NUM_PROCESSES'))
        except (KeyError, ValueError) as error:
            raise UserError(
                f'JAX_COORDINATOR_ADDRESS is set: expected numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID ({error}).'
            ) from error
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
        # JAX's detection of Slurm would give each process one GPU, but here a process uses all GPUs of its node.
        jax.distributed.initialize(num_processes=count, process_id=number, cluster_detection_method='deactivate')
        if number:
            logging.set_verbosity(logging.WARNING)  # process 0 logs for all
    # JAX_COMPILATION_CACHE_DIR overrides the default folder. There is no default on several machines, because only the
    # first process writes the cache. Machines with separate home folders would compile programs that the first process
    # finds in its cache, and would wait for its share of the autotuning.
    cache_dir = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if cache_dir is None and not processes.on_several_machines():
        with contextlib.suppress(OSError):  # no cache without a writable home folder
            os.makedirs(cache_folder(), exist_ok=True)
            cache_dir = cache_folder()
    if cache_dir is not None:
        compiler.cache_programs(cache_dir)


def _call(command: Any, words: Sequence[str]) -> None:
    logs.configure()
    if (encoding := sys.getfilesystemencoding()) != 'utf-8':
        logging.warning('file names are read as %s: set PYTHONUTF8=1, or names that are not ASCII fail.', encoding)
    values = flags.FlagValues()
    words = parse(command, words, values)
    arguments = getattr(command, 'ARGUMENTS', None)
    if words and arguments is None:
        raise UserError(f'unexpected argument {words[0]!r}; flags start with --.')
    for word in sys.argv[1:]:
        absolute_local_path(word.partition('=')[2] or word)
    for flag in command.FLAGS:
        if flag.required and not values[flag.name].value:
            raise UserError(f'--{flag.name} is missing; see --help.')
    if arguments and not words:
        raise UserError(f'missing argument: give {arguments}.')
    if 'cpu_devices' in values:
        processes.use_huge_pages()
    # From here on, interpreters that are started do not import modules from the current folder. A restart may need it.
    os.environ['PYTHONSAFEPATH'] = '1'
    if 'cpu_devices' in values:
        set_up_jax(values.cpu_devices)
    command.main(values, *([words] if arguments else []))


def report_errors(function: Callable[[], None]) -> None:
    """Calls a function. Exits with a one-line message for every error that `_describe_error` recognizes."""
    try:
        function()
        sys.stdout.flush()  # at exit, a write error could not be reported
    except SystemExit:
        raise
    except BrokenPipeError:  # the reader closed the pipe, as in `... | head`
        _discard_output()
        sys.exit(141)
    except BaseException as error:
        if 'JAX_COORDINATOR_ADDRESS' in os.environ or isinstance(error, KeyboardInterrupt):
            # A second Ctrl-C must not get in the way of `_fail`. launch/local.sh sends each Ctrl-C twice.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if message_and_code := _describe_error(error):
            _fail(*message_and_code)
        if 'JAX_COORDINATOR_ADDRESS' not in os.environ or not isinstance(error, Exception):
            raise
        traceback.print_exc()
        _fail('Internal error (a bug): stopping all processes.', 1)


def _describe_error(error: BaseException) -> tuple[str, int] | None:
    """Returns (message, exit code) for an expected error, None for a bug."""
    text, reason = str(error), first_line(error)[:200]
    for kind, code in ((UserError, 2), (DivergedError, 1), (TerminatedError, 143)):
        if isinstance(error, kind):
            return text, code
    if isinstance(error, KeyboardInterrupt):
        return 'interrupted.', 130
    if isinstance(error, OSError) and error.errno in _DISK:
        if not error.filename:
            _discard_output()
        return f'{error.filename or "the output"} cannot be read or written: {error.strerror}.', 2
    out_of_memory = isinstance(error, MemoryError) or re.search('RESOURCE_EXHAUSTED|Out of memory alloc', text)
    if out_of_memory and 'os_error_code' not in text:  # this is how tensorstore reports a full disk
        return (
            f'out of memory ({reason}); lower the batch size, or in training use --config.grad_accum_steps=N, which '
            'computes each batch in N parts with the same result.'
        ), 2
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    if 'Unable to initialize backend' in text or (isinstance(error, AssertionError) and last.endswith('xla_bridge.py')):
        platforms = f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")!r}{": " + reason if text else ""}'
        return f'JAX cannot initialize its devices ({platforms}); use --cpu_devices=1 to run on the CPU.', 2
    if 'JAX_COORDINATOR_ADDRESS' in os.environ and re.search('Gloo|NCCL|[Cc]oordination|heartbeat', text):
        return f'another process of this run has failed; see its error message ({reason}).', 1
    return None


def _discard_output():
    """Discards buffered output, because the flush at exit would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report_thread(failure) -> None:
    """Prints the error that ended a thread as one line. The code that waits for the thread also raises it."""
    reason = logs.escape_controls(' '.join(str(failure.exc_value).split()))[:300]
    print('error in a background thread:', reason, file=sys.stderr, flush=True)


def _report_unraisable(failure) -> None:
    """Calls the default hook, except for tensorstore's 'Event loop is closed', which follows a failed save."""
    if str(failure.exc_value) != 'Event loop is closed':
        sys.__unraisablehook__(failure)


def _fail(message: str, code: int):
    with contextlib.suppress(OSError):
        print('error:', logs.escape_controls(' '.join(message.split())), file=sys.stderr, flush=True)
    if 'JAX_COORDINATOR_ADDRESS' in os.environ and code != 143:
        os._exit(code)  # a normal exit of `jax.distributed` would wait five minutes for the other processes
    # If orbax cannot create the folder of a checkpoint, its threads would delay the exit by twenty minutes.
    watch = threading.Timer(10, os._exit, [code])
    watch.daemon = True
    watch.start()
    sys.exit(code)
