"""What is done to a run. Each function makes one fault and raises `LostError` where something promised did not hold."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import time

from alexnet_jax.utils import checksums
from tests.faults.scene import Scene, expect, filled, in_time, lines, noticed, small_disk, step_of

WORKERS = ('--config.data.num_workers=2', '--config.eval_every_steps=30')  # each validation starts two more
_PROCESS = b'-m\0alexnet_jax.main'
TWO = ('--config.mesh.data=2',)  # over two processes of one device each


def killed(scene: Scene, *options: str) -> None:
    """kill -9, once to three times, at any moment."""
    workdir = scene.folder / 'run'
    for again in range(scene.rng.integers(1, 4)):
        child = scene.start(workdir, *options)
        scene.any_moment(child, workdir)
        if again and child.poll() is not None:
            break
        scene.stop(child, signal.SIGKILL)
    scene.expect_same_end(workdir, *options)
    expect(not list(workdir.glob('checkpoints/*.damaged')), 'a kill is taken for damage')


def killed_with_workers(scene: Scene) -> None:
    """The same where processes decode: none is left, and no shared memory."""
    killed(scene, *WORKERS)


def killed_worker(scene: Scene) -> None:
    """kill -9 of a process that decodes, as the system does when memory is short: one clear error, then on."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.await_training(child, workdir)
    workers = scene.alive(b'spawn_main')
    in_time(workers)
    with contextlib.suppress(ProcessLookupError):  # it had ended
        os.kill(workers[scene.rng.integers(len(workers))], signal.SIGKILL)
    code = scene.end_of(child)
    in_time(code != 0)  # else it had no more to do
    expect(code == 2 and 'Traceback' not in scene.printed(), f'ends with {code}: {scene.printed()[-3000:]}')
    expect('a decoding process died' in scene.printed(), scene.printed()[-3000:])
    scene.expect_nothing_left()
    scene.expect_same_end(workdir, *WORKERS)


def killed_on_two_towers(scene: Scene) -> None:
    """The same on a mesh of two devices, a tower each."""
    killed(scene, '--config.mesh.tower=2', '--cpu_devices=2')


def killed_one_process_of_two(scene: Scene) -> None:
    """kill -9 of one of two processes: the launcher ends the other, and both start again."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    scene.any_moment(child, workdir)
    processes = scene.alive(_PROCESS)
    in_time(processes)
    before = step_of(workdir)
    os.kill(scene.rng.choice(processes), signal.SIGKILL)
    code = scene.end_of(child)
    noticed(code, before)
    expect(code == 137, f'the launcher ends with {code}')
    scene.expect_nothing_left()
    scene.expect_same_end(workdir, *TWO, processes=2)


def expect_saved(scene: Scene, workdir) -> None:
    """The step that it says it has saved lies there."""
    said = re.search(r'SIGTERM: step (\d+) of \d+ is saved; run the same command to resume', scene.printed())
    expect(said, scene.printed()[-2000:])
    expect((workdir / 'checkpoints' / said[1] / checksums.FILE_NAME).exists(), f'step {said[1]} is not there')


def _terminated(scene: Scene, workdir, child, *, group: bool) -> None:
    before = step_of(workdir)
    code = scene.stop(child, group=group)
    noticed(code, before)
    # Before the loop has begun it ends at once, as any program.
    expect(code == 143 or (code == -signal.SIGTERM and not before), f'ends with {code}: {scene.printed()[-2000:]}')
    if code == 143:
        expect_saved(scene, workdir)


def terminated(scene: Scene) -> None:
    """SIGTERM at any moment: what is done is saved, exit code 143."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir)
    scene.any_moment(child, workdir)
    _terminated(scene, workdir, child, group=False)
    scene.expect_same_end(workdir)


def terminated_with_workers(scene: Scene) -> None:
    """SIGTERM to the whole group, workers and all, as schedulers do."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.any_moment(child, workdir)
    _terminated(scene, workdir, child, group=True)
    scene.expect_same_end(workdir, *WORKERS)


def terminated_one_process_of_two(scene: Scene) -> None:
    """SIGTERM to one of two processes: both save the same step."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    scene.await_training(child, workdir)
    time.sleep(scene.rng.uniform(0, 1.5))
    processes = scene.alive(_PROCESS)
    in_time(processes)
    before = step_of(workdir)
    os.kill(scene.rng.choice(processes), signal.SIGTERM)
    code = scene.end_of(child)
    noticed(code, before)
    expect(code == 143, f'the launcher ends with {code}: {scene.printed()[-2000:]}')
    said = [line for line in scene.printed().splitlines() if 'SIGTERM: step' in line]
    expect(len(said) == 2 and len(set(said)) == 1, f'two processes say {said}')
    expect_saved(scene, workdir)
    scene.expect_nothing_left()
    scene.expect_same_end(workdir, *TWO, processes=2)


def interrupted_in_two_processes(scene: Scene) -> None:
    """The same where the launcher has started two."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    if scene.rng.uniform() < 0.3:
        time.sleep(scene.rng.uniform(0.5, 4))  # while they start
    else:
        scene.await_training(child, workdir)
        time.sleep(scene.rng.uniform(0, 1.0))
    before = step_of(workdir)
    code = scene.stop(child, signal.SIGINT, group=True)
    noticed(code, before)
    expect(code in (130, 137), f'ends with {code}: {scene.printed()[-2000:]}')
    scene.expect_same_end(workdir, *TWO, processes=2)


def disk_full_in_two_processes(scene: Scene) -> None:
    """One of them cannot write: both end, soon, and go on when there is room."""
    with small_disk(scene.folder / 'disk', '12m') as disk:
        workdir = disk / 'run'
        child = scene.start(workdir, *TWO, processes=2)
        scene.await_training(child, workdir, more=int(scene.rng.integers(1, 8)))
        before = step_of(workdir)
        with filled(disk):
            code = scene.end_of(child)
        noticed(code, before)
        expect(code in (2, 137), f'ends with {code}: {scene.printed()[-3000:]}')
        expect('No space left on device' in scene.printed(), scene.printed()[-3000:])
        scene.expect_same_end(workdir, *TWO, processes=2)


def interrupted(scene: Scene) -> None:
    """Ctrl-C: SIGINT to the whole group."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.await_training(child, workdir)
    time.sleep(scene.rng.uniform(0, 1.5))
    before = step_of(workdir)
    code = scene.stop(child, signal.SIGINT, group=True)
    noticed(code, before)
    expect(code == 130, f'ends with {code}: {scene.printed()[-2000:]}')
    scene.expect_same_end(workdir, *WORKERS)


def _any_file(scene: Scene, folder: pathlib.Path) -> pathlib.Path:
    """Each as likely as it is large, and the list of digests too."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    sizes = [path.stat().st_size for path in files]
    return files[scene.rng.choice(len(files), p=[size / sum(sizes) for size in sizes])]


def _flip(scene: Scene, path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[scene.rng.integers(len(content))] ^= 1 << int(scene.rng.integers(8))
    path.write_bytes(content)


def _truncate(scene: Scene, path: pathlib.Path) -> None:
    os.truncate(path, scene.rng.integers(path.stat().st_size))


def _damaged_checkpoint(scene: Scene, damage) -> None:
    workdir = scene.copy_of_reference()
    steps = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    path = _any_file(scene, workdir / 'checkpoints' / str(steps[-1]))
    damage(path)
    code, printed = scene.run(None, command=('verify', str(workdir)))
    expect(code == 1 and 'damaged: ' in printed, f'verify ends with {code}: {printed}')
    expect(path.name in printed or path.name == checksums.FILE_NAME, f'{path} is not named in {printed}')
    code, printed = scene.run(None, command=('evaluate', f'--checkpoint={workdir}/checkpoints/{steps[-1]}',
                                             '--data=digits', '--cpu_devices=1'))  # fmt: skip
    # Evaluation does not read the optimizer's state: with a change in there it may go on, if it says what it ever said.
    error = lines(workdir)[-1]['top1_error']
    right = code == 0 and 'training' in path.parts and f'top-1 error {error:.2f}%' in printed
    expect(right or (code == 2 and 'damaged' in printed), f'evaluate ends with {code}: {printed}')
    scene.expect_same_end(workdir, written='ignoring a checkpoint')
    expect('Resuming from step 56 of 60' in scene.printed(), scene.printed())


def bit_flipped_in_a_checkpoint(scene: Scene) -> None:
    """One bit, anywhere in the last step: named; training goes on from the step before."""
    _damaged_checkpoint(scene, lambda path: _flip(scene, path))


def file_of_a_checkpoint_truncated(scene: Scene) -> None:
    """Cut off anywhere."""
    _damaged_checkpoint(scene, lambda path: _truncate(scene, path))


def file_of_a_checkpoint_missing(scene: Scene) -> None:
    """Any file but the list of digests: without that the step does not count, see the next."""
    _damaged_checkpoint(scene, lambda path: path.unlink() if path.name != checksums.FILE_NAME else _flip(scene, path))


def half_written_step(scene: Scene) -> None:
    """What a kill leaves of a save: no list of digests, or orbax's own temporary folder."""
    workdir = scene.copy_of_reference()
    step = workdir / 'checkpoints' / '60'
    if scene.rng.uniform() < 0.5:
        (step / checksums.FILE_NAME).unlink()
    else:
        step.rename(step.with_name('60.orbax-checkpoint-tmp'))
    scene.expect_same_end(workdir, written='Resuming from step 56 of 60')
    expect(re.search('checkpoints/60.*: incomplete step', scene.printed()), f'not named: {scene.printed()[-2000:]}')


def bit_flipped_in_prepared_data(scene: Scene) -> None:
    """One bit, anywhere: `verify` names the file. Training refuses it, names the record, or has not read that bit."""
    copy = scene.folder / 'prepared'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    path = _any_file(scene, copy)
    _flip(scene, path)
    code, printed = scene.run(None, command=('verify', str(copy)))
    expect(code == 1, f'verify ends with {code}: {printed}')
    expect(path.name in printed or path.name == checksums.FILE_NAME, f'{path} is not named in {printed}')
    workdir = scene.folder / 'run'
    code, printed = scene.run(workdir, f'--config.data.path={copy}')
    expect(code in (0, 2) and 'Traceback' not in printed, f'ends with {code}: {printed[-3000:]}')
    expect(code == 0 or str(copy) in printed or 'record' in printed, f'what is damaged is not named: {printed[-3000:]}')
    if code == 0 and 'warning: unreadable image: ' not in printed:
        whole = scene.reference(f'--config.data.path={scene.prepared()}')
        expect(lines(workdir) == lines(whole), f'other metrics, and nothing is said: {printed[-3000:]}')


def damaged_record(scene: Scene) -> None:
    """Some bytes of the training records: named, counted with weight 0, the run ends the same when killed between."""
    copy = scene.folder / 'prepared'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    shard = scene.rng.choice(sorted(copy.glob('*train*array_record*')))
    content = bytearray(shard.read_bytes())
    places = [found.start() for found in re.finditer(b'\xff\xd8\xff\xe0', content)]  # where its JPEGs begin
    place = scene.rng.choice(places) + scene.rng.integers(0, 300)
    content[place : place + 40] = bytes(40)
    shard.write_bytes(content)
    options = (f'--config.data.path={copy}', '--config.num_steps=50')  # two passes, so that every record is read
    whole = scene.reference(*options)
    expect('warning: unreadable image: record' in scene.printed(), f'no record is named: {scene.printed()[-2000:]}')
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *options)
    scene.any_moment(child, workdir)
    scene.stop(child, signal.SIGKILL)
    scene.expect_same_end(workdir, *options)
    code, printed = scene.run(scene.folder / 'strict', *options, '--config.data.max_unreadable=0')
    expect(code == 2 and 'cannot be read (named above)' in printed, f'ends with {code}: {printed}')
    subprocess.run(['rm', '-r', str(whole)], check=True)  # of this damage alone


def disk_full_in_training(scene: Scene) -> None:
    """One clear error, earlier steps whole, and the same command goes on when there is room."""
    with small_disk(scene.folder / 'disk', '12m') as disk:
        workdir = disk / 'run'
        child = scene.start(workdir)
        scene.await_training(child, workdir, more=int(scene.rng.integers(1, 12)))
        before = step_of(workdir)
        with filled(disk):
            code = scene.end_of(child)
            noticed(code, before)
            expect(code == 2, f'ends with {code}: {scene.printed()[-3000:]}')
            expect('No space left on device' in scene.printed().splitlines()[-1], scene.printed()[-3000:])
            expect('Traceback' not in scene.printed(), scene.printed()[-3000:])
        scene.expect_same_end(workdir)


def disk_full_in_prepare(scene: Scene) -> None:
    """One clear error, nothing left behind, and the same command prepares when there is room."""
    raw = scene.raw()
    with small_disk(scene.folder / 'disk', f'{scene.rng.integers(100, 900)}k') as disk:
        command = ('prepare', f'--input={raw}', f'--output={disk}/out', '--size=32', '--format=raw')
        code, printed = scene.run(None, command=command)
        expect(code == 2 and 'error: cannot write' in printed, f'prepare ends with {code}: {printed[-2000:]}')
        expect('Traceback' not in printed and not os.listdir(disk), f'left: {os.listdir(disk)}, {printed[-2000:]}')
        subprocess.run(['mount', '-o', 'remount,size=50m', str(disk)], check=True)
        code, printed = scene.run(None, command=command)
        expect(code == 0, f'with room it ends with {code}: {printed[-2000:]}')


def permission_lost_in_training(scene: Scene) -> None:
    """The folder of checkpoints cannot be written any more: one clear error, and on when it can."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, limited=True)
    scene.await_training(child, workdir, more=int(scene.rng.integers(1, 8)))
    saved = workdir / 'checkpoints'
    before = step_of(workdir)
    os.chmod(saved, 0o555)
    code = scene.end_of(child)
    os.chmod(saved, 0o755)
    noticed(code, before)
    expect(code == 2, f'ends with {code}: {scene.printed()[-3000:]}')
    expect('Permission denied' in scene.printed().splitlines()[-1], scene.printed()[-3000:])
    expect('Traceback' not in scene.printed(), scene.printed()[-3000:])
    scene.expect_same_end(workdir)


def permission_lost_in_two_processes(scene: Scene) -> None:
    """The same where two train: neither waits for the other."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2, limited=True)
    scene.await_training(child, workdir, more=int(scene.rng.integers(1, 8)))
    before = step_of(workdir)
    os.chmod(workdir / 'checkpoints', 0o555)
    code = scene.end_of(child)
    os.chmod(workdir / 'checkpoints', 0o755)
    noticed(code, before)
    expect(code in (2, 137), f'ends with {code}: {scene.printed()[-3000:]}')
    expect('Permission denied' in scene.printed(), scene.printed()[-3000:])
    scene.expect_same_end(workdir, *TWO, processes=2)


def data_vanish(scene: Scene) -> None:
    """The prepared data are gone, before or in the middle of training or evaluation; then they are back."""
    copy, away = scene.folder / 'prepared', scene.folder / 'away'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    options = (f'--config.data.path={copy}', '--config.num_steps=60')
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *options)
    scene.any_moment(child, workdir)
    copy.rename(away)
    code = scene.end_of(child)  # files that are open can be read to the end
    expect(code in (0, 2) and 'Traceback' not in scene.printed(), f'ends with {code}: {scene.printed()[-3000:]}')
    code, printed = scene.run(workdir, *options)
    expect(code == 2 and 'there is no data directory' in printed, f'ends with {code}: {printed[-2000:]}')
    code, printed = scene.run(None, command=('evaluate', f'--checkpoint={scene.reference()}', f'--data={copy}'))
    expect(code == 2 and 'there is no data directory' in printed, f'evaluate ends with {code}: {printed[-2000:]}')
    away.rename(copy)
    child = scene.start(None, command=('evaluate', f'--checkpoint={scene.reference()}', f'--data={copy}'))
    time.sleep(scene.rng.uniform(3, 9))  # while it starts, or reads
    copy.rename(away)
    code = scene.end_of(child)
    expect(
        code in (0, 2) and 'Traceback' not in scene.printed(), f'evaluate ends with {code}: {scene.printed()[-3000:]}'
    )
    away.rename(copy)
    scene.expect_same_end(workdir, *options)


def second_run_on_a_workdir(scene: Scene) -> None:
    """It is refused; the first goes on as if nothing had been."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir)
    while not (workdir / '.lock').exists() and child.poll() is None:
        time.sleep(0.05)
    code, printed = scene.run(workdir)
    in_time(code == 2 or child.poll() is None)
    expect(code == 2 and 'another process is training in' in printed, f'ends with {code}: {printed[-2000:]}')
    expect(scene.end_of(child) == 0, scene.printed()[-2000:])
    scene.expect_same_end(workdir)


def killed_in_prepare(scene: Scene) -> None:
    """kill -9 of `prepare` at any moment; the same command then writes the same data."""
    raw, out = scene.raw(), scene.folder / 'out'
    command = ('prepare', f'--input={raw}', f'--output={out}', '--size=32')
    child = scene.start(None, command=command)
    time.sleep(scene.rng.uniform(0, 4))
    scene.stop(child, signal.SIGKILL)
    if not out.exists():
        code, printed = scene.run(None, command=command)
        expect(code == 0, f'ends with {code}: {printed[-2000:]}')
    found = [json.loads((folder / 'metadata.json').read_text())['fingerprint'] for folder in (out, scene.prepared())]
    expect(found[0] == found[1], f'other data: {found}')
    expect(scene.run(None, command=('verify', str(out)))[0] == 0, 'verify finds damage')


def _prepare_again(scene: Scene, command, out: pathlib.Path, code: int, remedy) -> None:
    """After a fault in `prepare`: one line, nothing half-written; when it is mended the same command writes it all."""
    expect(code in (0, 2) and 'Traceback' not in scene.printed(), f'ends with {code}: {scene.printed()[-3000:]}')
    expect(out.exists() == (code == 0), f'ends with {code}, and {out} is {"" if out.exists() else "not "}there')
    remedy()
    if code:
        code, printed = scene.run(None, command=command)
        expect(code == 0, f'ends with {code}: {printed[-2000:]}')
    found = [json.loads((folder / 'metadata.json').read_text())['fingerprint'] for folder in (out, scene.prepared())]
    expect(found[0] == found[1], f'other data: {found}')
    expect(scene.run(None, command=('verify', str(out)))[0] == 0, 'verify finds damage')


def permission_lost_in_prepare(scene: Scene) -> None:
    """The folder that the prepared data are to lie in cannot be written any more."""
    place = scene.folder / 'place'
    place.mkdir()
    command = ('prepare', f'--input={scene.raw()}', f'--output={place}/out', '--size=32')
    child = scene.start(None, command=command, limited=True)
    time.sleep(scene.rng.uniform(0, 4))
    in_time(child.poll() is None)
    os.chmod(place, 0o555)
    _prepare_again(scene, command, place / 'out', scene.end_of(child), lambda: os.chmod(place, 0o755))


def images_vanish_in_prepare(scene: Scene) -> None:
    """They are gone while `prepare` reads them."""
    raw, away = scene.folder / 'raw', scene.folder / 'away'
    subprocess.run(['cp', '-r', str(scene.raw()), str(raw)], check=True)
    command = ('prepare', f'--input={raw}', f'--output={scene.folder}/out', '--size=32')
    if scene.rng.uniform() < 0.5:  # they are not damaged: no number of these lets it go on
        command += ('--max_unreadable=10000',)
    child = scene.start(None, command=command)
    time.sleep(scene.rng.uniform(0, 4))
    in_time(child.poll() is None)
    raw.rename(away)
    _prepare_again(scene, command, scene.folder / 'out', scene.end_of(child), lambda: away.rename(raw))


ALL = [
    killed,
    killed_with_workers,
    killed_worker,
    killed_on_two_towers,
    killed_one_process_of_two,
    killed_in_prepare,
    terminated,
    terminated_with_workers,
    terminated_one_process_of_two,
    interrupted,
    interrupted_in_two_processes,
    bit_flipped_in_a_checkpoint,
    file_of_a_checkpoint_truncated,
    file_of_a_checkpoint_missing,
    half_written_step,
    bit_flipped_in_prepared_data,
    damaged_record,
    disk_full_in_training,
    disk_full_in_two_processes,
    disk_full_in_prepare,
    permission_lost_in_prepare,
    images_vanish_in_prepare,
    permission_lost_in_training,
    permission_lost_in_two_processes,
    data_vanish,
    second_run_on_a_workdir,
]
