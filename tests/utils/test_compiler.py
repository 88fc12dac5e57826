"""The cache of compiled programs: damaged entries are removed."""

import subprocess
import sys
import warnings
import zlib

import pytest

from alexnet_jax.utils import compiler

_PROGRAM = """
import sys
import jax
from alexnet_jax.utils import compiler
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
compiler.cache_programs(sys.argv[1])
print(jax.jit(lambda x: x * 3)(2.0))
"""


@pytest.mark.slow
def test_damaged_programs_are_compiled_again(tmp_path):
    def run():
        ended = subprocess.run([sys.executable, '-c', _PROGRAM, tmp_path], capture_output=True, text=True, check=True)
        assert ended.stdout == '6.0\n'
        return ended.stderr, {path: path.read_bytes() for path in tmp_path.glob('*-cache')}

    said, entries = run()
    assert said == '' and entries
    (path, content), *_ = entries.items()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 16
    for damaged in (b'', bytes(flipped)):
        path.write_bytes(damaged)
        said, _ = run()
        assert said.count('removed damaged compiled programs from') == 1 and '(1); they are compiled again' in said
        said, entries = run()
        assert said == '' and zlib.decompress(entries[path])


def test_only_damaged_programs_are_removed(tmp_path):
    good, bad, other = (tmp_path / f'{name}-cache' for name in ('jit_step-1', 'jit_other-2', 'jit_step-3'))
    for path in (good, bad, other):
        path.write_bytes(zlib.compress(b'program'))
    bad.write_bytes(b'half')
    assert compiler._remove_damaged(str(tmp_path), 'jit_step') == 1
    assert good.exists() and other.exists() and not bad.exists()
    assert compiler._remove_damaged(str(tmp_path), 'jit_step') == 2  # JAX could not load one of these


def test_warnings_that_are_not_of_a_damaged_program_are_shown(tmp_path, monkeypatch):
    """Also if nothing could be removed, as from a folder of others."""
    shown = []
    monkeypatch.setattr(warnings, 'showwarning', lambda message, *_: shown.append(str(message)))
    monkeypatch.setattr(compiler.jax.config, 'update', lambda *_: None)
    compiler.cache_programs(str(tmp_path))
    damaged = "Error reading persistent compilation cache entry for 'jit_step': error: x"
    for message in ('something else', damaged):
        warnings.showwarning(UserWarning(message), UserWarning, 'file', 1)
    assert shown == ['something else', damaged]
    (tmp_path / 'jit_step-1-cache').write_bytes(b'half')
    warnings.showwarning(UserWarning(damaged), UserWarning, 'file', 1)
    assert len(shown) == 2 and not list(tmp_path.iterdir())
