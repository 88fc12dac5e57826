"""Runs commands in forks of one process that has imported the package, so that each need not import JAX again."""

import functools
import multiprocessing
import os
import pathlib
import subprocess
import sys

_PRELOAD = (
    'alexnet_jax.benchmark.throughput',
    'alexnet_jax.convert.convert',
    'alexnet_jax.experiments.finetune',
    'alexnet_jax.prepare.prepare',
    __name__,
)


@functools.cache
def _context():
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(list(_PRELOAD))
    return context


def run_command(words: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess:
    """Like `helpers.run_command`; `folder` receives the files that the command's output is written to."""
    files = [folder / name for name in ('stdout.txt', 'stderr.txt')]
    process = _context().Process(target=_main, args=(words, files))
    process.start()
    process.join(300)
    return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in files))


def _main(words: list[str], files: list[pathlib.Path]) -> None:
    from alexnet_jax import __main__

    for stream, path in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = ['alexnet_jax', *words]
    __main__.main()
