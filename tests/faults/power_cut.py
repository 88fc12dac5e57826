"""Cuts the power at every moment of a training run or of `prepare`: python -m tests.faults.power_cut [--output=FILE].

strace records every change of files. For each prefix of these changes, three disks are built: all changes arrived; none
arrived that was not forced to disk (fsync of the file for its content, of the folder for its names); or a random choice
for each file and folder, whose content may also be torn. On each disk, the run must continue from a whole step that is
at least the last one that counted, with all its metrics; prepared data must be whole or absent.

--without_syncs takes the syncs of folders, metrics and events out of the recordings, so that some disks must be lost.
"""

import argparse
import ast
import collections
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator

import numpy as np
from absl import logging

from alexnet_jax.checkpoints import manager, repair, verify
from alexnet_jax.training import metric_writer
from alexnet_jax.utils import checksums
from alexnet_jax.utils.environment import describe_environment
from tests import ROOT, helpers
from tests.faults.scene import LostError, NotPossibleError, Scene, expect

_CALLS = (
    'openat creat write pwrite64 writev pwritev ftruncate truncate rename renameat renameat2 mkdir mkdirat unlink '
    'unlinkat rmdir link linkat symlink symlinkat fsync fdatasync fallocate copy_file_range sendfile splice msync'
).split()
_STEPS = 24  # of the recorded run: three saves and two validations
_STRING = r'"((?:\\x[0-9a-f]{2})*)"'


@dataclasses.dataclass(eq=False)
class Node:
    """A file (bytes) or a folder ({name: Node}), as programs see it and as it is on disk for certain."""

    live: bytes | dict
    durable: bytes | dict

    def sync(self) -> None:
        self.durable = dict(self.live) if isinstance(self.live, dict) else self.live


class Disk:
    """Applies recorded changes to a folder that is empty at first."""

    def __init__(self, folder: str):
        self._folder, self.root = folder.rstrip('/'), Node({}, {})

    def owns(self, path: str) -> bool:
        return path.startswith(self._folder + '/') or path == self._folder

    def find(self, path: str) -> Node:
        node = self.root
        for name in filter(None, path.removeprefix(self._folder).split('/')):
            node = node.live[name]
        return node

    def _place(self, path: str) -> tuple[dict, str]:
        parent, _, name = path.rpartition('/')
        return self.find(parent).live, name

    def apply(self, kind: str, *values) -> None:
        if kind in ('create', 'mkdir'):
            names, name = self._place(values[0])
            empty: bytes | dict = {} if kind == 'mkdir' else b''
            names[name] = Node(empty, empty)
        elif kind == 'remove':
            names, name = self._place(values[0])
            del names[name]
        elif kind == 'rename':
            old, name = self._place(values[0])
            node = old.pop(name)
            new, name = self._place(values[1])
            new[name] = node
        elif kind == 'append':
            self.find(values[0]).live += values[1]
        elif kind == 'write':
            node, (offset, data) = self.find(values[0]), values[1:]
            node.live = node.live[:offset].ljust(offset, b'\0') + data + node.live[offset + len(data) :]
        elif kind == 'truncate':
            node = self.find(values[0])
            node.live = node.live[: values[1]].ljust(values[1], b'\0')
        elif kind == 'sync':
            self.find(values[0]).sync()

    def build(self, folder: pathlib.Path, choose: Callable[[Node], bytes | dict]) -> None:
        """Writes the tree, with the content that `choose` returns for each file and folder."""

        def write(node: Node, path: pathlib.Path) -> None:
            content = choose(node)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.mkdir()
                for name, child in content.items():
                    write(child, path / name)

        write(self.root, folder)


def choices(rng: np.random.Generator) -> dict[str, Callable[[Node], bytes | dict]]:
    """Returns three ways to choose what a power cut leaves."""

    def mixed(node: Node) -> bytes | dict:
        content = node.live if rng.integers(2) else node.durable
        if isinstance(content, bytes) and rng.integers(2):  # torn: the last of the new bytes did not arrive
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(content, node.durable, strict=False))
            arrived = sum(1 for _ in same)
            content = content[: rng.integers(arrived, len(content) + 1)]
        return content

    return {'all arrived': lambda node: node.live, 'unsynced dropped': lambda node: node.durable, 'random': mixed}


def record(words: list[str], folder: str, scene: Scene) -> list[tuple]:
    """Runs a command under strace. Returns its changes below an empty folder, as arguments of `Disk.apply`."""
    if shutil.which('strace') is None:
        raise NotPossibleError('needs strace')
    log = scene.folder / 'strace.txt'
    tracer = [
        'strace',
        '-f',
        '-y',
        '--seccomp-bpf',
        '-xx',
        '-s',
        str(10**8),
        f'--trace={",".join(_CALLS)}',
        '-o',
        str(log),
    ]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    ended = subprocess.run([*tracer, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    expect(ended.returncode == 0, f'{words} ends with {ended.returncode}: {ended.stderr[-2000:]}')
    return list(_changes(_calls(log), Disk(folder)))


def without_syncs(changes: list[tuple], folder: str) -> list[tuple]:
    """Takes out the syncs of folders, metrics and events: Orbax syncs the files of arrays by itself."""
    disk, kept = Disk(folder), []
    for change in changes:
        name = os.path.basename(change[1])
        ours = name == metric_writer._METRICS or name.startswith('events.')
        if change[0] == 'sync' and (ours or isinstance(disk.find(change[1]).live, dict)):
            continue
        disk.apply(*change)
        kept.append(change)
    return kept


def _calls(log: pathlib.Path) -> Iterator[tuple[str, str, int]]:
    """Yields (name, arguments, result) of the successful system calls, in the order in which they returned."""
    begun: dict[str, str] = {}
    with open(log) as file:
        for line in file:
            process, _, text = line.rstrip('\n').partition(' ')
            text = text.strip()
            if text.endswith('<unfinished ...>'):
                begun[process] = text.removesuffix('<unfinished ...>')
                continue
            if resumed := re.match(r'<\.\.\. \w+ resumed>', text):
                text = begun.pop(process) + text[resumed.end() :]
            if match := re.fullmatch(r'(\w+)\((.*)\)\s+= (\d+)(?:<.*>)?', text):
                yield match[1], match[2], int(match[3])


def _changes(calls: Iterator[tuple[str, str, int]], disk: Disk) -> Iterator[tuple]:
    positions: dict[str, int] = {}  # of open files, by path: each file is written by one descriptor at a time
    for name, arguments, result in calls:
        found = [_decode(text) for text in re.findall(_STRING, arguments)]
        opened = [_decode(text) for text in re.findall(r'<((?:\\x[0-9a-f]{2})*)>', arguments)]
        paths = [os.fsdecode(text) for text in opened]
        if name in ('fsync', 'fdatasync', 'write', 'writev', 'pwrite64', 'pwritev', 'ftruncate'):
            path, changes = paths[0], []
            if not disk.owns(path) or path.endswith(' (deleted)'):
                continue
            if name in ('fsync', 'fdatasync'):
                changes = [('sync', path)]
            elif name == 'ftruncate':
                changes = [('truncate', path, int(arguments.rpartition(', ')[2]))]
            else:
                data = b''.join(found)[:result]
                expect(len(data) == result, f'{name} of {path} was recorded incompletely')
                if name.startswith('p'):
                    offset = int(arguments.rpartition(', ')[2])
                else:
                    offset = positions[path]
                    positions[path] += result
                changes = [('write', path, offset, data)]
        else:
            changes = list(_name_changes(name, arguments, found, opened, positions, disk))
        for change in changes:
            disk.apply(*change)
            yield change


def _name_changes(name, arguments, found, opened, positions, disk) -> Iterator[tuple]:
    """Yields the changes of calls that name files: in folders given by descriptors, or relative to the current one."""
    folders = opened if 'at' in name[-3:] else [b''] * len(found)
    paths = [os.fsdecode(os.path.join(folder, path)) for folder, path in zip(folders, found, strict=False)]
    if not any(map(disk.owns, paths)):
        return
    path, *others = paths
    if name == 'openat' and ('O_WRONLY' in arguments or 'O_RDWR' in arguments):
        names, last = disk._place(path)
        if last not in names and 'O_CREAT' in arguments:
            yield 'create', path
        elif 'O_TRUNC' in arguments:
            yield 'truncate', path, 0
        appends = last in names and 'O_APPEND' in arguments
        positions[path] = len(names[last].live) if appends else 0
    elif name in ('mkdir', 'mkdirat'):
        yield 'mkdir', path
    elif name in ('unlink', 'unlinkat', 'rmdir'):
        yield 'remove', path
    elif name in ('rename', 'renameat', 'renameat2'):
        expect(all(map(disk.owns, paths)), f'{paths}: renamed from elsewhere')
        if path in positions:
            positions[others[0]] = positions.pop(path)
        yield 'rename', path, others[0]
    elif name == 'truncate':
        yield 'truncate', path, int(arguments.rpartition(', ')[2])
    elif name != 'openat':
        raise LostError(f'{name} of {paths} is not understood')


def _decode(text: str) -> bytes:
    return ast.literal_eval(f'b"{text}"')


def _check_run(workdir: pathlib.Path, disk: Disk, whole: pathlib.Path) -> str:
    """Checks that training continues from a whole step. Returns the step."""
    folder = str(workdir / manager.FOLDER)
    found = [path for path in (workdir / 'config.json', workdir / 'environment.json') if path.exists()]
    for path in found:
        json.loads(path.read_text())  # written atomically
    repair.repair(folder)
    steps = [step for step in repair.list_steps(folder) if checksums.present(os.path.join(folder, str(step)))]
    step = max(steps, default=0)
    counted = _counted(disk)
    expect(step >= counted, f'step {counted} counted, and the run continues from {step}')
    if steps:
        expect(not verify.verify(str(workdir))[1], verify.verify(str(workdir))[1])
        metric_writer.MetricWriter(str(workdir), step).close()
        lines = [line for line in helpers.read_metrics(whole) if line['step'] <= step]
        expect(helpers.read_metrics(workdir) == lines, f'metrics up to step {step} differ')
        (events,) = {path.name for path in whole.glob('events.*')}
        metric_writer._cut_events(str(shutil.copy(whole / events, workdir / 'expected')), step, True)
        expect((workdir / events).read_bytes() == (workdir / 'expected').read_bytes(), f'events up to {step} differ')
    return str(step)


def _counted(disk: Disk) -> int:
    """Returns the last step whose list of digests is on disk for certain; 0 if there is none."""

    def names(node: Node | None) -> dict:
        return node.durable if node and isinstance(node.durable, dict) else {}

    steps = names(names(names(disk.root).get('run')).get(manager.FOLDER))
    return max(
        (int(name) for name, node in steps.items() if name.isdigit() and checksums.FILE_NAME in names(node)), default=0
    )


def _check_prepared(output: pathlib.Path, disk: Disk, whole: pathlib.Path) -> str:
    """Checks that prepared data are whole or absent."""
    del disk
    if not output.exists():
        return 'absent'
    expect(not verify.verify(str(output))[1], verify.verify(str(output))[1])
    sums = [(folder / checksums.FILE_NAME).read_text() for folder in (output, whole)]
    expect(sums[0] == sums[1], 'other data')
    return 'whole'


def replay(name: str, changes: list[tuple], folder: pathlib.Path, place: pathlib.Path, check, rng, every=1) -> dict:
    """Checks every prefix of the changes, or every nth and the last. Returns the counts."""
    disk, disks, outcomes, lost = Disk(str(folder)), 0, collections.Counter(), []
    chosen = {*range(rng.integers(every), len(changes), every), len(changes)}
    for number in range(len(changes) + 1):
        if number:
            disk.apply(*changes[number - 1])
        for kind, choose in choices(rng).items() if number in chosen else ():
            built = place / 'disk'
            disk.build(built, choose)
            disks += 1
            try:
                outcomes[check(built / name, disk, folder / name)] += 1
            except Exception as error:  # a LostError, or any error of the package
                lost.append(f'{kind}, after change {number} of {len(changes)} ({changes[number - 1][:2]}): {error!r}')
            shutil.rmtree(built)
    return {'changes': len(changes), 'disks': disks, 'lost': len(lost), 'outcomes': dict(outcomes), 'losses': lost}


def continue_one(scene: Scene, changes: list[tuple], folder: pathlib.Path) -> None:
    """Cuts the power at a random moment and runs the command again: it ends as if nothing had happened."""
    disk = Disk(str(folder))
    for change in changes[: scene.rng.integers(len(changes))]:
        disk.apply(*change)
    built = scene.folder / f'continued-{scene.rng.integers(1 << 40)}'
    disk.build(built, choices(scene.rng)['random'])
    scene.expect_same_result(built / 'run', f'--config.num_steps={_STEPS}')


def replay_all(scene: Scene, *, every: int = 1, continued: int = 1, syncs: bool = True) -> dict[str, dict]:
    """Records and replays training and `prepare`; returns the counts of both.

    continued: number of runs to end. syncs: whether to keep all syncs, see `without_syncs`.
    """
    results, python = {}, [sys.executable, '-m']
    train = ['alexnet_jax.main', '--config=tests/faults/config.py', '--cpu_devices=1', f'--config.num_steps={_STEPS}']
    jobs = {
        'run': ([*python, *train, '--workdir={}'], _check_run),
        'out': (
            [*python, 'alexnet_jax', 'prepare', f'--input={scene.raw()}', '--output={}', '--size=32'],
            _check_prepared,
        ),
    }
    for name, (words, check) in jobs.items():
        folder = scene.folder / f'recorded-{name}'
        folder.mkdir()
        changes = record([word.replace('{}', str(folder / name)) for word in words], str(folder), scene)
        if not syncs:
            changes = without_syncs(changes, str(folder))
        results[name] = replay(name, changes, folder, scene.folder, check, scene.rng, every)
        if name == 'run' and syncs:
            results[name]['continued'] = continued
            for _ in range(continued):
                continue_one(scene, changes, folder)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--output')
    parser.add_argument('--without_syncs', action='store_true')
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(pathlib.Path(folder), np.random.default_rng(args.seed), pathlib.Path(folder))
        results = replay_all(scene, continued=10, syncs=not args.without_syncs)
    for counts in results.values() if args.without_syncs else ():
        del counts['losses']  # they are as they should be, and many
    environment = describe_environment()
    command = 'python -m tests.faults.power_cut' + ' --without_syncs' * args.without_syncs
    kept = {key: environment[key] for key in ('commit', 'versions')}
    result = {'name': 'power_cut', 'command': command, **kept, 'seed': args.seed, 'replayed': results}
    text = json.dumps(result, indent=1) + '\n'
    print(text)
    if args.output:
        pathlib.Path(args.output).write_text(text)
    raise SystemExit(any(counts['lost'] for counts in results.values()) != args.without_syncs)


if __name__ == '__main__':
    main()
