"""Faults of the system around a run: memory, disks, clocks, limits, signals at a chosen system call."""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import signal
import socket
import string
import subprocess
import time

from tensorboardX.proto import event_pb2

from alexnet_jax.utils import checksums
from tests.faults.faults import PROCESS, TWO, WORKER, WORKERS, expect_saved, flip, prepare_again, truncate
from tests.faults.scene import (
    NotPossibleError,
    Scene,
    SilentError,
    expect,
    expect_noticed,
    last_step,
    require_running,
    small_disk,
)
from tests.helpers import untimed_metrics

_CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <sys/time.h>
#include <time.h>
static time_t shift(void) {  /* 20 s, from the moment when the file CALL is there, which becomes SEEN */
  static time_t back;
  int error = errno;
  if (!back && !rename(CALL, SEEN)) back = 20;
  errno = error;
  return back;
}
int clock_gettime(clockid_t id, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, t);
  if (!code && id == CLOCK_REALTIME) t->tv_sec -= shift();
  return code;
}
time_t time(time_t *out) {
  struct timespec t; clock_gettime(CLOCK_REALTIME, &t); if (out) *out = t.tv_sec;
  return t.tv_sec;
}
int gettimeofday(struct timeval *t, void *zone) {
  struct timespec now; clock_gettime(CLOCK_REALTIME, &now); t->tv_sec = now.tv_sec; t->tv_usec = now.tv_nsec / 1000;
  return 0;
}
"""


def _paused(scene: Scene, child, pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(scene.rng.uniform(0.5, 4))
    require_running(child.poll() is None)
    os.kill(pid, signal.SIGCONT)
    expect(scene.wait_for_exit(child) == 0, scene.log()[-3000:])


def paused_worker(scene: Scene) -> None:
    """SIGSTOP of a decoding worker, then SIGCONT: the run waits."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.wait_for_training(child, workdir)
    worker = scene.random_process(WORKER)
    with contextlib.suppress(ProcessLookupError):
        _paused(scene, child, worker)
    scene.expect_same_result(workdir, *WORKERS)


def paused_process_of_two(scene: Scene) -> None:
    """SIGSTOP of one of two processes, then SIGCONT: the other waits."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *TWO, processes=2)
    scene.wait_for_training(child, workdir)
    _paused(scene, child, scene.random_process(PROCESS))
    scene.expect_same_result(workdir, *TWO, processes=2)


@contextlib.contextmanager
def _memory_limit(scene: Scene):
    """Makes a memory cgroup; yields its folder."""
    group = pathlib.Path('/sys/fs/cgroup/memory') / f'faults-{scene.mark}'
    try:
        group.mkdir()
    except OSError as error:
        raise NotPossibleError(f'needs the right to make a memory cgroup ({error})') from None
    try:
        yield group
    finally:
        deadline = time.monotonic() + 20
        while (group / 'cgroup.procs').read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        group.rmdir()


def _out_of_memory(group: pathlib.Path) -> bool:
    """Whether the out-of-memory killer has ended a process of the cgroup."""
    return bool(re.search(r'^oom_kill [1-9]', (group / 'memory.oom_control').read_text(), re.M))


def out_of_memory_in_a_worker(scene: Scene) -> None:
    """The kernel's out-of-memory killer ends a decoding worker: one clear error, then the run resumes."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir, *WORKERS)
    scene.wait_for_training(child, workdir)
    worker = scene.random_process(WORKER)
    with _memory_limit(scene) as group:
        (group / 'memory.limit_in_bytes').write_text('65536')
        with contextlib.suppress(ProcessLookupError):
            (group / 'cgroup.procs').write_text(str(worker))
        while not (ended := _out_of_memory(group)) and child.poll() is None:
            time.sleep(0.02)
        before = last_step(workdir)
        code = scene.wait_for_exit(child)
    require_running(ended or code)  # otherwise the worker had finished, or needed no more memory
    expect_noticed(code, before)
    expect(code == 2 and 'a decoding process died' in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    scene.expect_clean_exit()
    scene.expect_same_result(workdir, *WORKERS)


def out_of_memory(scene: Scene) -> None:
    """The out-of-memory killer ends the training process, at any moment."""
    workdir = scene.folder / 'run'
    with _memory_limit(scene) as group:
        child = scene.start(workdir)
        (group / 'cgroup.procs').write_text(str(child.pid))
        scene.wait_random(child, workdir)
        require_running(child.poll() is None)
        used = int((group / 'memory.usage_in_bytes').read_text())
        with contextlib.suppress(OSError):  # busy, if nothing can be reclaimed
            (group / 'memory.limit_in_bytes').write_text(str(used + (1 << 20)))
        code = scene.wait_for_exit(child)
        require_running(code or _out_of_memory(group))
    expect(code == -signal.SIGKILL, f'ends with {code}: {scene.log()[-3000:]}')
    scene.expect_same_result(workdir)


def _strace(log: pathlib.Path, calls: str, fault: str, *paths: pathlib.Path) -> tuple[str, ...]:
    """Returns the words that start a program under strace with a fault in system calls, on all paths or on some.

    Of the two paths of `rename`, strace 6.1 looks only at the first.
    """
    words = ['strace', '-f', '-o', str(log), '-e', f'trace={calls}', '-e', f'inject={calls}:{fault}']
    # With --seccomp-bpf, which is faster, strace 6.1 misses calls on these paths after a call on another path.
    return (*words, *(word for path in paths for word in ('-P', str(path)))) if paths else (*words, '--seccomp-bpf')


def slow_disk(scene: Scene) -> None:
    """Every seventh write or sync takes up to a tenth of a second longer: the run ends the same."""
    delay = int(scene.rng.integers(1_000, 100_000))
    calls = 'write,writev,pwrite64,fsync,rename'
    workdir, log = scene.folder / 'run', scene.folder / 'strace.txt'
    traced = _strace(log, calls, f'delay_exit={delay}:when=20+7')
    code = scene.wait_for_exit(scene.start(workdir, through=traced), 400)
    require_running(code or '(DELAYED)' in log.read_text())
    expect(code == 0, f'ends with {code}: {scene.log()[-3000:]}')
    scene.expect_same_result(workdir)


def read_error(scene: Scene) -> None:
    """A read of a record fails: it is read again. If that fails too, the record is named and has weight 0."""
    copy = scene.folder / 'prepared'
    subprocess.run(['cp', '-r', str(scene.prepared()), str(copy)], check=True)
    shard = scene.rng.choice(sorted(copy.glob('*train*array_record*')))
    first, twice = int(scene.rng.integers(1, 16)), bool(scene.rng.integers(2))
    workdir, log = scene.folder / 'run', scene.folder / 'strace.txt'
    # strace counts the calls of each thread. In one epoch, two threads read each record of the shard at most once.
    traced = _strace(log, 'pread64' if twice else 'read,pread64', f'error=EIO:when={first}..{first + twice}', shard)
    options = ('--config.num_steps=22', '--config.data.num_threads=2', '--config.data.num_workers=0')
    code = scene.wait_for_exit(scene.start(workdir, *options, f'--config.data.path={copy}', through=traced), 400)
    require_running(code or '(INJECTED)' in log.read_text())
    if code == 2 and 'cannot be opened as a prepared dataset: [Errno 5]' in scene.log():  # it came at the start
        twice = False
        code, _ = scene.run(workdir, *options, f'--config.data.path={copy}')
    offsets = re.findall(r', (\d+)\) = -1 EIO .*\(INJECTED\)', log.read_text()) if twice else []
    expect(code == 0 and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    named = set(re.findall(r'unreadable image: (record \d+) in train.*Input/output error', scene.log()))
    right = len(offsets) == 2 * len(named) and bool(named) == twice
    expect(right, f'reads at {offsets} failed, named are {named}: {scene.log()[-3000:]}')
    content = bytearray(shard.read_bytes())
    for offset in map(int, set(offsets)):  # damaged, so that the undisturbed run cannot read these records either
        content[offset] ^= 255
    shard.write_bytes(content)
    whole = scene.folder / 'whole'
    code, printed = scene.run(whole, *options, f'--config.data.path={copy}')
    expect(code == 0, f'ends with {code}: {printed[-3000:]}')
    expect(set(re.findall(r'unreadable image: (record \d+) in train', printed)) == named, f'others than {named}')
    expect(untimed_metrics(workdir) == untimed_metrics(whole), f'the metrics differ; named: {named}', SilentError)


def inodes_used_up(scene: Scene) -> None:
    """No more files can be made: one clear error, and the same command resumes once there are inodes."""
    with small_disk(scene.folder / 'disk', '60m,nr_inodes=1200') as disk:
        workdir = disk / 'run'
        child = scene.start(workdir)
        scene.wait_for_training(child, workdir, more=int(scene.rng.integers(1, 12)))
        before = last_step(workdir)
        filler = disk / 'filler'
        filler.mkdir()
        with contextlib.suppress(OSError):
            for i in range(2000):
                (filler / str(i)).touch()
        code = scene.wait_for_exit(child)
        shutil.rmtree(filler)
        expect_noticed(code, before)
        expect(code == 2 and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
        expect('No space left on device' in scene.log().splitlines()[-1], scene.log()[-3000:])
        scene.expect_same_result(workdir)


def every_printable_character_in_a_path(scene: Scene) -> None:
    """A workdir and data whose path has every printable character; those that Orbax cannot take are refused."""
    refused, allowed = '[*?\\', set(string.printable) - set('/[*?\\\r\n\x0b\x0c\t')
    name = ''.join(scene.rng.permutation(sorted(allowed)))
    place = scene.folder / f'a{name}'
    place.mkdir()
    subprocess.run(['cp', '-r', str(scene.prepared()), str(place / 'data')], check=True)
    options = (f'--config.data.path={place}/data',)
    workdir = place / 'run'
    child = scene.start(workdir, *options)
    scene.wait_random(child, workdir)
    scene.stop(child, signal.SIGKILL)
    scene.expect_same_result(workdir, *options)
    code, printed = scene.run(None, command=('verify', str(workdir), str(place / 'data')))
    expect(code == 0, f'verify ends with {code}: {printed}')
    bad = scene.folder / f'b{scene.rng.choice(list(refused))}'
    code, printed = scene.run(bad)
    expect(code == 2 and 'checkpoints cannot be saved below' in printed, f'ends with {code}: {printed}')


def clock_jumps_back(scene: Scene) -> None:
    """The wall clock jumps back 20 s during training: the run ends the same, all rates positive.

    If the clock jumps in the tens of milliseconds in which TensorStore merges the files of a step, the save waits until
    the clock has caught up.
    """
    compiler = shutil.which('gcc') or shutil.which('cc')
    if compiler is None:
        raise NotPossibleError('needs a C compiler')
    source, library = scene.folder / 'clock.c', scene.folder / 'clock.so'
    call, seen = scene.folder / 'call', scene.folder / 'seen'
    source.write_text(_CLOCK)
    names = [f'-DCALL="{call}"', f'-DSEEN="{seen}"']
    subprocess.run([compiler, '-shared', '-fPIC', *names, '-o', str(library), str(source), '-ldl'], check=True)
    workdir = scene.folder / 'run'
    child = scene.start(workdir, environment={'LD_PRELOAD': str(library)})
    scene.wait_for_training(child, workdir, more=int(scene.rng.integers(1, 12)))
    call.touch()
    code = scene.wait_for_exit(child)
    expect(code == 0, f'ends with {code}: {scene.log()[-3000:]}')
    times = _times_of_events(workdir)
    require_running(any(later < time - 10 for time, later in itertools.pairwise(times)))
    expect(not re.search(r' -\d+ images/s|ETA -', scene.log()), scene.log()[-3000:])
    scene.expect_same_result(workdir)


def _times_of_events(workdir: pathlib.Path) -> list[float]:
    times = []
    with open(*workdir.glob('events.*'), 'rb') as file:
        while header := file.read(12):
            record = file.read(int.from_bytes(header[:8], 'little') + 4)[:-4]
            times.append(event_pb2.Event.FromString(record).wall_time)
    return times


def shared_memory_full(scene: Scene) -> None:
    """/dev/shm is full: one clear error, or the workers do without it; then the run resumes."""
    workdir = scene.folder / 'run'
    size = int(scene.rng.integers(4, 400))
    inner = f'mount -t tmpfs -o size={size}k none /dev/shm && exec "$@"'
    through = ('unshare', '--mount', 'sh', '-c', inner, 'sh')
    code = scene.wait_for_exit(scene.start(workdir, *WORKERS, through=through))
    expect(code in (0, 2) and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    expect(code == 0 or '/dev/shm' in scene.log().splitlines()[-1], f'the cause is not named: {scene.log()[-3000:]}')
    scene.expect_clean_exit()
    scene.expect_same_result(workdir, *WORKERS)


def few_open_files(scene: Scene) -> None:
    """At most 256 open files: the run is not affected."""
    workdir = scene.folder / 'run'
    code = scene.wait_for_exit(scene.start(workdir, *WORKERS, through=('prlimit', '--nofile=256:256')))
    expect(code == 0, f'ends with {code}: {scene.log()[-3000:]}')
    scene.expect_same_result(workdir, *WORKERS)


def home_not_writable(scene: Scene) -> None:
    """No compiled programs can be kept: the run is not affected."""
    home = scene.folder / 'home'
    home.mkdir()
    home.chmod(0o555)
    workdir = scene.folder / 'run'
    child = scene.start(workdir, limited=True, environment={'HOME': str(home), 'XDG_CACHE_HOME': ''})
    code = scene.wait_for_exit(child)
    expect(code == 0 and 'Traceback' not in scene.log(), f'ends with {code}: {scene.log()[-3000:]}')
    scene.expect_same_result(workdir)


def damaged_compiled_program(scene: Scene) -> None:
    """A flipped bit or a truncated file in the cache of compiled programs: told once, and compiled again."""
    cache = scene.folder / 'cache'  # its path is part of JAX's keys, so that a copy of the shared one would not do
    environment, options = {'XDG_CACHE_HOME': str(cache)}, ('--config.num_steps=12',)
    code, printed = scene.run(scene.folder / 'first', *options, environment=environment)
    expect(code == 0, f'ends with {code}: {printed[-3000:]}')
    for path in cache.rglob('*-cache'):
        (flip if scene.rng.integers(2) else truncate)(scene, path)
    workdir = scene.folder / 'run'
    code = scene.wait_for_exit(scene.start(workdir, *options, environment=environment))
    expect(code == 0, f'ends with {code}: {scene.log()[-3000:]}')
    told = scene.log().count('removed damaged compiled programs')
    expect(told == 1, f'told {told} times: {scene.log()[-3000:]}')
    code, printed = scene.run(scene.folder / 'again', *options, environment=environment)
    expect(code == 0 and 'removed damaged' not in printed, f'ends with {code}: {printed[-3000:]}')
    scene.expect_same_result(workdir, *options)


def other_data_in_one_process(scene: Scene) -> None:
    """Two machines with different prepared data or configs: both processes are refused before the first step."""
    copy, workdir = scene.folder / 'other', scene.folder / 'run'
    options = [f'--config.data.path={scene.prepared()}', '--config.optim.momentum=0.8']
    if scene.rng.integers(2):
        command = ('prepare', f'--input={scene.raw()}', f'--output={copy}', '--size=32', '--format=raw')
        code, printed = scene.run(None, command=command)
        expect(code == 0, printed[-2000:])
        options[1] = f'--config.data.path={copy}'
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    environment = {'JAX_COORDINATOR_ADDRESS': address, 'JAX_NUM_PROCESSES': '2', 'LOCAL_WORLD_SIZE': '2'}
    children = [
        scene.start(workdir, *TWO, options[0], option, environment={**environment, 'JAX_PROCESS_ID': str(i)})
        for i, option in enumerate(options if scene.rng.integers(2) else options[::-1])
    ]
    codes = [scene.wait_for_exit(child) for child in children]
    expect(codes == [2, 2], f'end with {codes}: {scene.log()[-3000:]}')
    expect('than process 0; give all processes the same' in scene.log(), scene.log()[-3000:])
    expect(not (workdir / 'metrics.jsonl').exists(), 'it has trained')


def other_number_of_processes(scene: Scene) -> None:
    """A run of two processes goes on in one, or the other way around, on the same mesh."""
    if len(os.sched_getaffinity(0)) < 2:
        # XLA then has one thread in each of two processes, but two in a process with two devices.
        raise NotPossibleError('needs two cores: on one, the last bits depend on the number of processes')
    workdir = scene.folder / 'run'
    ways = [{'processes': 2}, {'options': ('--cpu_devices=2', *TWO)}]
    first, second = ways if scene.rng.integers(2) else ways[::-1]
    child = scene.start(workdir, *first.get('options', TWO), processes=first.get('processes', 1))
    scene.wait_random(child, workdir)
    scene.stop(child, signal.SIGKILL, group=True)
    scene.expect_same_result(workdir, *second.get('options', TWO), processes=second.get('processes', 1))


def _saved_steps(workdir: pathlib.Path) -> list[int]:
    names = [path.parent.name for path in workdir.glob(f'checkpoints/*/{checksums.FILE_NAME}')]
    return [int(name) for name in names if name.isdigit()]


def terminated_during_restore(scene: Scene) -> None:
    """SIGTERM while a run checks the digests of its optimizer state, or reads its arrays."""
    workdir, log = scene.folder / 'run', scene.folder / 'strace.txt'
    child, least = scene.start(workdir), scene.rng.choice([8, 16, 24, 32])
    while child.poll() is None and max(_saved_steps(workdir), default=0) < least:
        time.sleep(0.01)
    scene.stop(child, signal.SIGKILL)
    require_running(steps := _saved_steps(workdir))
    files = [path for path in (workdir / 'checkpoints' / f'{max(steps)}/training').rglob('*') if path.is_file()]
    call = scene.rng.choice(['read', 'pread64'])  # of the digests, and of TensorStore
    log.touch()
    child = scene.start(workdir, through=_strace(log, call, 'delay_enter=100000', *files))
    while not (reading := re.search(rf'^(\d+) +{call}\(.*\n', log.read_text(), re.M)) and child.poll() is None:
        time.sleep(0.01)
    require_running(reading and child.poll() is None)
    os.kill(int(reading[1]), signal.SIGTERM)  # of a thread, which stands for its process
    require_running('Resuming from' not in scene.log())
    code = scene.wait_for_exit(child)
    expect(code == 143, f'ends with {code}: {scene.log()[-2000:]}')
    expect(f'Resuming from step {max(steps)} of' in scene.log(), scene.log()[-2000:])
    expect_saved(scene, workdir)
    expect(max(_saved_steps(workdir)) == max(steps) + 1, f'saved are {_saved_steps(workdir)}, after {steps}')
    scene.expect_same_result(workdir)


def terminated_twice(scene: Scene) -> None:
    """A second SIGTERM while the first is obeyed."""
    workdir = scene.folder / 'run'
    child = scene.start(workdir)
    scene.wait_into_training(child, workdir)
    require_running(child.poll() is None)
    before = last_step(workdir)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(scene.rng.uniform(0, 0.5))
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGTERM)
    code = scene.wait_for_exit(child)
    expect_noticed(code, before)
    # The second signal may come after the save, while the program ends.
    expect(code in (143, -signal.SIGTERM), f'ends with {code}: {scene.log()[-2000:]}')
    if code == 143:
        expect_saved(scene, workdir)
    step = max(_saved_steps(workdir), default=0)
    expect(step >= before, f'ends with {code}; step {before} was made, and step {step} is saved')
    scene.expect_same_result(workdir)


def _killed_at(scene: Scene, call: str, path: pathlib.Path, when: int = 1) -> None:
    """SIGKILL as training enters a system call on a path."""
    workdir = scene.folder / 'run'
    traced = _strace(scene.folder / 'strace.txt', call, f'signal=KILL:when={when}', path)
    code = scene.wait_for_exit(scene.start(workdir, through=traced), 400)
    expect(code in (137, -signal.SIGKILL), f'{call} on {path}: ends with {code}: {scene.log()[-3000:]}')
    scene.expect_clean_exit()
    scene.expect_same_result(workdir)
    expect(not list(workdir.glob('checkpoints/*.damaged')), 'a kill is taken for damage')


def killed_in_the_digest(scene: Scene) -> None:
    """SIGKILL while the digests of a step are computed or written."""
    step = scene.folder / 'run' / 'checkpoints' / str(scene.rng.choice([8, 16, 24, 56, 60]))
    temporary = step / f'{checksums.FILE_NAME}.tmp'
    places = [('write', temporary), ('rename', temporary), ('fsync', step)]
    places += [('read', step / '_CHECKPOINT_METADATA'), ('fsync', step / '_CHECKPOINT_METADATA')]
    _killed_at(scene, *places[scene.rng.integers(len(places))])


def killed_in_the_retirement(scene: Scene) -> None:
    """SIGKILL while an old step is removed."""
    checkpoints, step = scene.folder / 'run' / 'checkpoints', str(scene.rng.choice([8, 16]))
    removed = checkpoints / 'removed'
    places = [('rename', checkpoints / step), ('unlinkat', removed / step), ('unlinkat', removed), ('mkdir', removed)]
    _killed_at(scene, *places[scene.rng.integers(len(places))])


def killed_in_join(scene: Scene) -> None:
    """SIGKILL of `prepare --join` at any moment; the same command then joins the same data."""
    out = scene.folder / 'out'
    command = ('prepare', f'--input={scene.raw()}', f'--output={out}', '--size=32')
    for part in ('1/2', '2/2'):
        began = time.monotonic()
        code, printed = scene.run(None, command=(*command, f'--part={part}'))
        expect(code == 0, printed[-2000:])
    seconds = 0.4 * (time.monotonic() - began)  # a join takes about a third of the time of a part
    join = ('prepare', f'--output={out}', '--join')
    child = scene.start(None, command=join)
    time.sleep(scene.rng.uniform(0, seconds))
    require_running(child.poll() is None)
    child.kill()
    child.wait()
    prepare_again(scene, join, out, 0 if out.exists() else 2, lambda: None)  # it may have come just before the exit


ALL = [
    paused_worker, paused_process_of_two, out_of_memory_in_a_worker, out_of_memory, slow_disk, read_error,
    inodes_used_up, every_printable_character_in_a_path, clock_jumps_back, shared_memory_full, few_open_files,
    home_not_writable, damaged_compiled_program, other_data_in_one_process, other_number_of_processes,
    terminated_during_restore, terminated_twice, killed_in_the_digest, killed_in_the_retirement, killed_in_join,
]  # fmt: skip
