"""Faults injected into a run. Each function injects one fault and raises `LostError` if a promise does not hold."""

import json
import os
import pathlib
import re
import signal
import subprocess
import time

from alexnet_jax.utils import checksums
from tests.faults.scene import (
    Scene,
    SilentError,
    TooLateError,
    expect,
    expect_noticed,
    full_disk,
    last_step,
    require_running,
    small_disk,
)
from tests.helpers import untimed_metrics

WORKERS = ('--config.data.num_workers=2', '--config.eval_every_steps=60')  # the validation starts two more
WORKER = b'spawn_main'  # in the command lines of workers, and of processes of a run
PROCESS = b'-m\0alexnet_jax.main'
TWO = ('--config.mesh.data=2',)  # two processes with one device each


def killed(scene: Scene, *options: str) -> None:
    """SIGKILL, one to three times, at any moment."""
    workdir = scene.folder / 'run'
    for again in range(scene.rng.integers(1, 4)):
        child = scene.start(workdir, *options)
        scene.wait_random(child, workdir)
        if again and child.poll() is not None:
            break
        scene.stop(child, signal.SIGKILL)
    scene.expect_same_result(workdir, *options)
    expect(not list(workdir.glob('checkpoints/*.damaged')), 'a kill is taken for damage')


def killed_with_workers(scene: Scene) -> None:
    """SIGKILL with decoding workers: no process and no shared memory is left."""
    killed(scene, *WORKERS)


def killed_worker(scene: Scene) -> None:
    """SIGKILL of a decoding worker, as when memory is short: one clear error, then the run resumes."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.wait_for_training(child, workdir)
    worker, before = scene.random_process(WORKER), last_step(workdir)
    try:
        os.kill(worker, signal.SIGKILL)
    except ProcessLookupError:
        raise TooLateError from None
    code = scene.wait_for_exit(child)
    expect_noticed(code, before)
    expect(code == 2 and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    expect('a decoding process died' in scene.log(), scene.log()[-3000:])
    scene.expect_clean_exit()
    scene.expect_same_result(workdir, *WORKERS)


def killed_on_two_towers(scene: Scene) -> None:
    """SIGKILL on a mesh of two devices, one tower each."""
    killed(scene, '--config.mesh.tower=2', '--cpu_devices=2')


def killed_one_process_of_two(scene: Scene) -> None:
    """SIGKILL of one of two processes: the launcher stops the other, and both start again."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    scene.wait_random(child, workdir)
    process, before = scene.random_process(PROCESS), last_step(workdir)
    os.kill(process, signal.SIGKILL)
    code = scene.wait_for_exit(child)
    expect_noticed(code, before)
    expect(code == 137, f'the launcher ends with {code}')
    scene.expect_clean_exit()
    scene.expect_same_result(workdir, *TWO, processes=2)


def expect_saved(scene: Scene, workdir) -> None:
    """Checks that the step reported as saved exists."""
    said = re.search(r'SIGTERM: step (\d+) of \d+ is saved; run the same command to resume', scene.log())
    expect(said, scene.log()[-2000:])
    expect((workdir / 'checkpoints' / said[1] / checksums.FILE_NAME).exists(), f'step {said[1]} is not there')


def _terminated(scene: Scene, workdir, child, *, group: bool) -> None:
    before = last_step(workdir)
    code = scene.stop(child, group=group)
    expect_noticed(code, before)
    # Before the training loop starts, the program exits at once.
    expect(code == 143 or (code == -signal.SIGTERM and not before), f'ends with {code}: {scene.log()[-2000:]}')
    if code == 143:
        expect_saved(scene, workdir)


def terminated(scene: Scene) -> None:
    """SIGTERM at any moment: completed steps are saved, exit code 143."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir)
    scene.wait_random(child, workdir)
    _terminated(scene, workdir, child, group=False)
    scene.expect_same_result(workdir)


def terminated_with_workers(scene: Scene) -> None:
    """SIGTERM to the whole process group, including workers, as schedulers send it."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.wait_random(child, workdir)
    _terminated(scene, workdir, child, group=True)
    scene.expect_same_result(workdir, *WORKERS)


def terminated_one_process_of_two(scene: Scene) -> None:
    """SIGTERM to one of two processes: both save the same step."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    scene.wait_into_training(child, workdir)
    process, before = scene.random_process(PROCESS), last_step(workdir)
    os.kill(process, signal.SIGTERM)
    code = scene.wait_for_exit(child)
    expect_noticed(code, before)
    expect(code == 143, f'the launcher ends with {code}: {scene.log()[-2000:]}')
    said = [line for line in scene.log().splitlines() if 'SIGTERM: step' in line]
    expect(len(said) == 2 and len(set(said)) == 1, f'two processes say {said}')
    expect_saved(scene, workdir)
    scene.expect_clean_exit()
    scene.expect_same_result(workdir, *TWO, processes=2)


def interrupted_in_two_processes(scene: Scene) -> None:
    """Ctrl-C if the launcher has started two processes."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    if scene.rng.uniform() < 0.3:
        time.sleep(scene.rng.uniform(0.5, 4))  # while they start
    else:
        scene.wait_into_training(child, workdir)
    before = last_step(workdir)
    code = scene.stop(child, signal.SIGINT, group=True)
    expect_noticed(code, before)
    expect(code in (130, 137), f'ends with {code}: {scene.log()[-2000:]}')
    scene.expect_same_result(workdir, *TWO, processes=2)


def disk_full_in_two_processes(scene: Scene) -> None:
    """One of two processes cannot write: both exit soon, and resume once there is space."""
    with small_disk(scene.folder / 'disk', '12m') as disk:
        workdir = disk / 'run'
        child = scene.start(workdir, *TWO, processes=2)
        scene.wait_for_training(child, workdir, more=int(scene.rng.integers(1, 8)))
        before = last_step(workdir)
        with full_disk(disk):
            code = scene.wait_for_exit(child)
        expect_noticed(code, before)
        expect(code in (2, 137), f'ends with {code}: {scene.log()[-3000:]}')
        expect('No space left on device' in scene.log(), scene.log()[-3000:])
        scene.expect_same_result(workdir, *TWO, processes=2)


def interrupted(scene: Scene) -> None:
    """Ctrl-C: SIGINT to the whole process group."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.wait_into_training(child, workdir)
    before = last_step(workdir)
    code = scene.stop(child, signal.SIGINT, group=True)
    expect_noticed(code, before)
    expect(code == 130, f'ends with {code}: {scene.log()[-2000:]}')
    scene.expect_same_result(workdir, *WORKERS)


def _random_file(scene: Scene, folder: pathlib.Path) -> pathlib.Path:
    """Returns a file with probability proportional to its size; includes the list of checksums."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    sizes = [path.stat().st_size for path in files]
    return files[scene.rng.choice(len(files), p=[size / sum(sizes) for size in sizes])]


def flip(scene: Scene, path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[scene.rng.integers(len(content))] ^= 1 << int(scene.rng.integers(8))
    path.write_bytes(content)


def truncate(scene: Scene, path: pathlib.Path) -> None:
    os.truncate(path, scene.rng.integers(path.stat().st_size))


def _damaged_checkpoint(scene: Scene, damage) -> None:
    workdir = scene.copy_reference()
    steps = sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
    path = _random_file(scene, workdir / 'checkpoints' / str(steps[-1]))
    damage(path)
    code, printed = scene.run(None, command=('verify', str(workdir)))
    expect(code == 1 and 'damaged: ' in printed, f'verify ends with {code}: {printed}')
    expect(path.name in printed or path.name == checksums.FILE_NAME, f'{path} is not named in {printed}')
    code, printed = scene.run(None, command=('evaluate', f'--checkpoint={workdir}/checkpoints/{steps[-1]}',
                                             '--data=digits', '--cpu_devices=1'))  # fmt: skip
    # Evaluation does not read the optimizer state: if that or its checksum changed, it may succeed with the same error.
    error = untimed_metrics(workdir)[-1]['top1_error']
    unused = 'training' in path.parts or path.name == checksums.FILE_NAME
    right = code == 0 and unused and f'top-1 error {error:.2f}%' in printed
    expect(right or (code == 2 and 'damaged' in printed), f'evaluate ends with {code}: {printed}')
    scene.expect_same_result(workdir, written='ignoring a checkpoint')
    expect('Resuming from step 56 of 60' in scene.log(), scene.log())


def bit_flipped_in_a_checkpoint(scene: Scene) -> None:
    """A flipped bit in the last step: the file is named, and training resumes from the previous step."""
    _damaged_checkpoint(scene, lambda path: flip(scene, path))


def file_of_a_checkpoint_truncated(scene: Scene) -> None:
    """A file of the last step is truncated at a random position."""
    _damaged_checkpoint(scene, lambda path: truncate(scene, path))


def file_of_a_checkpoint_missing(scene: Scene) -> None:
    """A missing file, except the list of checksums: without it the step does not count, see `half_written_step`."""
    _damaged_checkpoint(scene, lambda path: path.unlink() if path.name != checksums.FILE_NAME else flip(scene, path))


def half_written_step(scene: Scene) -> None:
    """A save interrupted by a kill: no list of checksums, or orbax's temporary folder."""
    workdir = scene.copy_reference()
    step = workdir / 'checkpoints' / '60'
    if scene.rng.uniform() < 0.5:
        (step / checksums.FILE_NAME).unlink()
    else:
        step.rename(step.with_name('60.orbax-checkpoint-tmp'))
    scene.expect_same_result(workdir, written='Resuming from step 56 of 60')
    expect(re.search('checkpoints/60.*: incomplete step', scene.log()), f'not named: {scene.log()[-2000:]}')


def bit_flipped_in_prepared_data(scene: Scene) -> None:
    """`verify` names the file. Training refuses the data, names the record, or never reads the flipped bit."""
    copy = scene.folder / 'prepared'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    path = _random_file(scene, copy)
    flip(scene, path)
    code, printed = scene.run(None, command=('verify', str(copy)))
    expect(code == 1, f'verify ends with {code}: {printed}')
    expect(path.name in printed or path.name == checksums.FILE_NAME, f'{path} is not named in {printed}')
    workdir = scene.folder / 'run'
    code, printed = scene.run(workdir, f'--config.data.path={copy}')
    expect(code in (0, 2) and 'Traceback' not in printed, f'ends with {code}: {printed[-3000:]}')
    expect(code == 0 or str(copy) in printed or 'record' in printed, f'what is damaged is not named: {printed[-3000:]}')
    if code == 0 and 'warning: unreadable image: ' not in printed:
        whole = scene.reference(f'--config.data.path={scene.prepared()}')
        same = untimed_metrics(workdir) == untimed_metrics(whole)
        expect(same, f'other metrics, and nothing is said: {printed[-3000:]}', SilentError)


def damaged_record(scene: Scene) -> None:
    """Damaged training records are named and get weight 0; a run killed in between ends the same."""
    copy = scene.folder / 'prepared'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    shard = scene.rng.choice(sorted(copy.glob('*train*array_record*')))
    content = bytearray(shard.read_bytes())
    places = [found.start() for found in re.finditer(b'\xff\xd8\xff\xe0', content)]  # start of its JPEGs
    place = scene.rng.choice(places) + scene.rng.integers(0, 300)
    content[place : place + 40] = bytes(40)
    shard.write_bytes(content)
    options = (f'--config.data.path={copy}', '--config.num_steps=50')  # two epochs, so that every record is read
    whole = scene.reference(*options)
    expect('warning: unreadable image: record' in scene.log(), f'no record is named: {scene.log()[-2000:]}')
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *options)
    scene.wait_random(child, workdir)
    scene.stop(child, signal.SIGKILL)
    scene.expect_same_result(workdir, *options)
    code, printed = scene.run(scene.folder / 'strict', *options, '--config.data.max_unreadable=0')
    expect(code == 2 and 'cannot be read (named above)' in printed, f'ends with {code}: {printed}')
    subprocess.run(['rm', '-r', str(whole)], check=True)  # specific to this damage


def disk_full_in_training(scene: Scene) -> None:
    """One clear error, earlier steps stay complete, and the same command resumes once there is space."""
    with small_disk(scene.folder / 'disk', '12m') as disk:
        workdir = disk / 'run'
        child = scene.start(workdir)
        scene.wait_for_training(child, workdir, more=int(scene.rng.integers(1, 12)))
        before = last_step(workdir)
        with full_disk(disk):
            code = scene.wait_for_exit(child)
            expect_noticed(code, before)
            expect(code == 2, f'ends with {code}: {scene.log()[-3000:]}')
            expect('No space left on device' in scene.log().splitlines()[-1], scene.log()[-3000:])
            expect('Traceback' not in scene.log(), scene.log()[-3000:])
        scene.expect_same_result(workdir)


def disk_full_in_prepare(scene: Scene) -> None:
    """One clear error, nothing is left, and the same command prepares the data once there is space."""
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
    """The checkpoint folder becomes read-only: one clear error; the run resumes once it is writable."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, limited=True)
    scene.wait_for_training(child, workdir, more=int(scene.rng.integers(1, 8)))
    saved = workdir / 'checkpoints'
    before = last_step(workdir)
    os.chmod(saved, 0o555)
    code = scene.wait_for_exit(child)
    os.chmod(saved, 0o755)
    expect_noticed(code, before)
    expect(code == 2, f'ends with {code}: {scene.log()[-3000:]}')
    expect('Permission denied' in scene.log().splitlines()[-1], scene.log()[-3000:])
    expect('Traceback' not in scene.log(), scene.log()[-3000:])
    scene.expect_same_result(workdir)


def permission_lost_in_two_processes(scene: Scene) -> None:
    """The same with two processes: neither waits for the other."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2, limited=True)
    scene.wait_for_training(child, workdir, more=int(scene.rng.integers(1, 8)))
    before = last_step(workdir)
    os.chmod(workdir / 'checkpoints', 0o555)
    code = scene.wait_for_exit(child)
    os.chmod(workdir / 'checkpoints', 0o755)
    expect_noticed(code, before)
    expect(code in (2, 137), f'ends with {code}: {scene.log()[-3000:]}')
    expect('Permission denied' in scene.log(), scene.log()[-3000:])
    scene.expect_same_result(workdir, *TWO, processes=2)


def data_vanish(scene: Scene) -> None:
    """The prepared data disappear before or during training or evaluation, then return."""
    copy, away = scene.folder / 'prepared', scene.folder / 'away'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    options = (f'--config.data.path={copy}', '--config.num_steps=60')
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *options)
    scene.wait_random(child, workdir)
    copy.rename(away)
    code = scene.wait_for_exit(child)  # open files can be read to the end
    expect(code in (0, 2) and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    code, printed = scene.run(workdir, *options)
    expect(code == 2 and 'there is no data directory' in printed, f'ends with {code}: {printed[-2000:]}')
    code, printed = scene.run(None, command=('evaluate', f'--checkpoint={scene.reference()}', f'--data={copy}'))
    expect(code == 2 and 'there is no data directory' in printed, f'evaluate ends with {code}: {printed[-2000:]}')
    away.rename(copy)
    child = scene.start(None, command=('evaluate', f'--checkpoint={scene.reference()}', f'--data={copy}'))
    time.sleep(scene.rng.uniform(1, 6))  # while it starts or reads
    copy.rename(away)
    code = scene.wait_for_exit(child)
    expect(code in (0, 2) and 'Traceback' not in scene.log(), f'evaluate ends with {code}: {scene.log()[-3000:]}')
    away.rename(copy)
    scene.expect_same_result(workdir, *options)


def second_run_on_a_workdir(scene: Scene) -> None:
    """The second run is refused; the first is not affected."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir)
    while not (workdir / '.lock').exists() and child.poll() is None:
        time.sleep(0.05)
    code, printed = scene.run(workdir)
    require_running(code == 2 or child.poll() is None)
    expect(code == 2 and 'another process is training in' in printed, f'ends with {code}: {printed[-2000:]}')
    expect(scene.wait_for_exit(child) == 0, scene.log()[-2000:])
    scene.expect_same_result(workdir)


def killed_in_prepare(scene: Scene) -> None:
    """SIGKILL of `prepare` at any moment; the same command then writes the same data."""
    raw, out = scene.raw(), scene.folder / 'out'
    command = ('prepare', f'--input={raw}', f'--output={out}', '--size=32')
    child = scene.start(None, command=command)
    scene.wait_into_prepare()
    scene.stop(child, signal.SIGKILL)
    if not out.exists():
        code, printed = scene.run(None, command=command)
        expect(code == 0, f'ends with {code}: {printed[-2000:]}')
    found = [json.loads((folder / 'metadata.json').read_text())['fingerprint'] for folder in (out, scene.prepared())]
    expect(found[0] == found[1], f'other data: {found}')
    expect(scene.run(None, command=('verify', str(out)))[0] == 0, 'verify finds damage')


def prepare_again(scene: Scene, command, out: pathlib.Path, code: int, remedy) -> None:
    """After a fault in `prepare`: one line, no partial output; after `remedy` the same command writes all data."""
    expect(code in (0, 2) and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    expect(out.exists() == (code == 0), f'ends with {code}, and {out} is {"" if out.exists() else "not "}there')
    remedy()
    if code:
        code, printed = scene.run(None, command=command)
        expect(code == 0, f'ends with {code}: {printed[-2000:]}')
    found = [json.loads((folder / 'metadata.json').read_text())['fingerprint'] for folder in (out, scene.prepared())]
    expect(found[0] == found[1], f'other data: {found}')
    expect(scene.run(None, command=('verify', str(out)))[0] == 0, 'verify finds damage')


def permission_lost_in_prepare(scene: Scene) -> None:
    """The output folder of `prepare` becomes read-only."""
    place = scene.folder / 'place'
    place.mkdir()
    command = ('prepare', f'--input={scene.raw()}', f'--output={place}/out', '--size=32')
    child = scene.start(None, command=command, limited=True)
    scene.wait_into_prepare()
    require_running(child.poll() is None)
    os.chmod(place, 0o555)
    prepare_again(scene, command, place / 'out', scene.wait_for_exit(child), lambda: os.chmod(place, 0o755))


def images_vanish_in_prepare(scene: Scene) -> None:
    """The images disappear while `prepare` reads them."""
    raw, away = scene.folder / 'raw', scene.folder / 'away'
    subprocess.run(['cp', '-r', str(scene.raw()), str(raw)], check=True)
    command = ('prepare', f'--input={raw}', f'--output={scene.folder}/out', '--size=32')
    if scene.rng.uniform() < 0.5:  # missing files are not damaged: they do not count against this limit
        command += ('--max_unreadable=10000',)
    child = scene.start(None, command=command)
    scene.wait_into_prepare()
    require_running(child.poll() is None)
    raw.rename(away)
    prepare_again(scene, command, scene.folder / 'out', scene.wait_for_exit(child), lambda: away.rename(raw))


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
