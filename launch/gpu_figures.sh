#!/usr/bin/env bash
# Measures what the GPU rows of docs/performance.md and docs/experiments.md lack, one stage after the other.
#
#     launch/gpu_figures.sh STAGE...       step, train, inference, resume, learn, cifar, suites; in the root of a clone
#
# The environment needs '.[cuda13,oracle]'. Settings are environment variables:
#   TINY, CIFAR: folders of tiny_imagenet_20 and CIFAR-10, as for `alexnet_jax prepare` (stages train,
#     resume, learn and suites; cifar). CLASSES: number of classes of TINY (20)
#   OUT: the folder of the results (gpu_figures), STAGE.json and STAGE.log; WORK: of data and runs ($OUT/work)
#   BUDGET: seconds for all stages together (none); a command that does not fit is not started
#   SMALL=1: everything at toy size, to try this script on a CPU
# Every command has its own time limit. A failure ends that command only, and is in the JSON. Runs resume.
set -u
python=${PYTHON:-python}
out=${OUT:-gpu_figures} small=${SMALL:-} budget=${BUDGET:-}
work=${WORK:-$out/work}
mkdir -p "$out" "$work"

pick() { if [ "$small" ]; then echo "$1"; else echo "$2"; fi; } # toy size, full size

# run SECONDS COMMAND...: runs `alexnet_jax COMMAND...` and adds a line to the stage's results. The result is the file of
# a benchmark, the last line of JSON that the command prints, or the last validation of a training run.
run() {
  local limit=$1 began=$SECONDS status=0
  shift
  rm -f "$work/record.json"
  if [ "$budget" ] && ((SECONDS + limit > budget)); then
    echo "no time left for: $*"
    status=skipped
    : >"$work/stdout"
  else
    echo "+ alexnet_jax $*"
    timeout -k 10 "$limit" "$python" -m alexnet_jax "$@" | tee "$work/stdout"
    status=${PIPESTATUS[0]}
  fi
  "$python" - "$results" "$status" $((SECONDS - began)) "$work" "$@" <<'P'
import json, pathlib, sys
from alexnet_jax.benchmark.record import command
results, status, seconds, work, *words = sys.argv[1:]
stdout, record = pathlib.Path(work, 'stdout'), pathlib.Path(work, 'record.json')
found = [line for line in stdout.read_text().splitlines() if line.startswith('{')]
workdir = next((word.partition('=')[2] for word in words if word.startswith('--workdir=')), None)
if not found and workdir and pathlib.Path(workdir, 'metrics.jsonl').exists():
    lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
    found = [line for line in lines if '"split": "val"' in line]
if record.exists():
    found = [record.read_text()]
row = {'command': command(words), 'exit': status, 'seconds': int(seconds)}
with open(results, 'a') as file:
    file.write(json.dumps({**row, 'result': json.loads(found[-1]) if found else None}) + '\n')
P
}

bench() { # SECONDS MODE OPTIONS...
  local limit=$1 mode=$2
  shift 2
  local toy=(--config=quickstart --repeats=1)
  run "$limit" benchmark "$mode" ${small:+"${toy[@]}"} "$@" --output="$work/record.json"
}

train_run() { run "$1" train --workdir="$work/runs/$2" --config="$3" "${@:4}"; } # SECONDS NAME CONFIG OPTIONS...

prepared() { # FOLDER INPUT OPTIONS...
  [ -d "$work/$1" ] || run 600 prepare --input="${2:?set TINY and CIFAR, see the head of this script}" --output="$work/$1" "${@:3}"
}

tiny=(--config.model.num_classes="${CLASSES:-20}" --config.data.path="$work/tiny256")
same_bits() { # NAME NAME: whether the last checkpoints of two runs are equal
  "$python" - "$results" "$work/runs/$1" "$work/runs/$2" <<'P'
import json, sys
import jax, numpy as np
import alexnet_jax
results, *paths = sys.argv[1:]
a, b = (jax.tree.leaves(alexnet_jax.load_checkpoint(path).params) for path in paths)
row = {'same_bits': all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))}
row['largest_relative_difference'] = max(float(np.abs(x - y).max() / np.abs(x).max()) for x, y in zip(a, b, strict=True))
print(row)
with open(results, 'a') as file:
    names = ' '.join(path.rpartition('/')[2] for path in paths)
    file.write(json.dumps({'command': f'compare {names}', 'result': row}) + '\n')
P
}

step() { # beside PyTorch (channels-last, autocast, compiled), in the same call. Its compiler alone may take two minutes
  bench 300 step --against=torch --precision=bfloat16 --batch_size="$(pick 8 128)"
  bench 400 step --against=torch --precision=bfloat16 --batch_size="$(pick 8 1024)"
  bench 120 step --precision=bfloat16 --batch_size="$(pick 8 4096)"
  bench 120 step --precision=bfloat16 --batch_size="$(pick 8 1024)" --config.deterministic=True
  for batch in 128 1024; do
    bench 400 step --against=torch --precision=tf32 --batch_size="$(pick 8 $batch)"
  done
  bench 300 step --against=torch --precision=float32 --batch_size="$(pick 8 128)"
}
train() { # real images, decoded by worker processes, or kept on the device
  prepared tiny256 "${TINY:-}" --size=256
  bench 400 train --against=torch --precision=bfloat16 "${tiny[@]}" --batch_size="$(pick 8 1024)"
  bench 120 train --precision=bfloat16 "${tiny[@]}" --config.data.cache=device --batch_size="$(pick 8 1024)"
  bench 120 input "${tiny[@]}" --batch_size="$(pick 8 1024)"
}
inference() { # without other programs: they run on the CPU
  bench 240 inference --batch_sizes="$(pick 1,8 1,8,64,1024)"
}
resume() { # a whole run against a stopped one, with and without deterministic operations
  prepared tiny256 "${TINY:-}" --size=256
  local whole half config deterministic
  whole=$(pick 4 60) half=$(pick 2 30) config=$(pick quickstart paper:init=authors)
  for deterministic in True False; do
    local options=("${tiny[@]}" --config.deterministic="$deterministic" --config.checkpoint_every_steps=20)
    options+=(--config.batch_size="$(pick 8 128)")
    train_run 180 "whole_$deterministic" "$config" "${options[@]}" --config.num_steps="$whole"
    train_run 180 "again_$deterministic" "$config" "${options[@]}" --config.num_steps="$half"
    train_run 180 "again_$deterministic" "$config" "${options[@]}" --config.num_steps="$whole"
    same_bits "whole_$deterministic" "again_$deterministic"
  done
}
learn() { # do the paper's words train? full width, 20 classes, three seeds; and with other biases, and a warm-up
  prepared tiny256 "${TINY:-}" --size=256
  local options=("${tiny[@]}" --config.num_epochs=60 --config.data.cache=device --config.log_every_steps=10)
  options+=(--config.model.dtype="$(pick float32 bfloat16)" --config.mesh.tower=1)
  [ "$small" ] && options+=(--config.num_steps=1 --config.batch_size=2)
  for seed in 0 1 2; do
    for config in paper paper:init=authors authors_2012; do
      train_run 600 "$config-$seed" "$config" "${options[@]}" --config.seed=$seed
    done
    [ "$small" ] && break
  done
  local biases=() layer
  for layer in conv2 conv4 conv5 fc6 fc7; do biases+=("--config.model.layers.$layer.bias=0.1"); done
  train_run 600 paper-biases paper "${options[@]}" "${biases[@]}"
  train_run 600 paper-warmup paper "${options[@]}" --config.optim.warmup_epochs=5
}
cifar() { # all of CIFAR-10
  prepared cifar32 "${CIFAR:-}" --size=32 --format=raw
  local toy=(--scale=0.02 --seeds=1 --base.num_steps=2)
  run 1800 experiments figure1 --data="$work/cifar32" --output="$work/figure1" --base.data.cache=device \
    ${small:+"${toy[@]}"}
  run 900 experiments figure1 --data="$work/cifar32" --output="$work/figure1_wide" --base.data.cache=device \
    --seeds=1 --base.model.layers.conv1.init='normal(0.01)' ${small:+"${toy[@]}"}
  run 900 experiments figure1 --data="$work/cifar32" --output="$work/figure1_80sec" --base=cifar10:80sec \
    --seeds=1 --base.data.cache=device ${small:+"${toy[@]}"}
  for network in 18pct 19pct 11pct 13pct; do
    train_run 3600 "$network" "cifar10:$network" --config.data.path="$work/cifar32" --config.data.cache=device \
      ${small:+--config.num_steps=2 --config.batch_size=8}
    run 120 evaluate --checkpoint="$work/runs/$network" --data="$work/cifar32" --split=test --json
    run 120 evaluate --checkpoint="$work/runs/$network" --data="$work/cifar32" --split=test --views=10 --json
  done
}

suites() { # ablations and the modern recipe at 64 px, four times as long as configs/tiny_imagenet.py
  prepared tiny64 "${TINY:-}" --size=64 --format=raw
  local options=(--data="$work/tiny64" --base=tiny_imagenet --base.data.cache=device --base.num_epochs=60)
  options+=(--base.optim.stages='((0,1.0,1.0,()),(40,0.1,0.1,()),(52,0.01,0.01,()))')
  [ "$small" ] && options+=(--scale=0.02 --seeds=1 --base.num_steps=2)
  local arms='no normalization,non-overlapping pooling,one GPU (half the kernels),no dropout'
  arms+=',no crops or reflections,no weight decay'
  run 3600 experiments ablations "${options[@]}" --output="$work/ablations" --only="$arms"
  run 3600 experiments recipe "${options[@]}" --output="$work/recipe"
}

(($#)) || { echo "usage: launch/gpu_figures.sh step|train|inference|resume|learn|cifar|suites ..." >&2; exit 2; }
for stage in "$@"; do
  case $stage in
    step | train | inference | resume | learn | cifar | suites) ;;
    *)
      echo "unknown stage $stage: expected step, train, inference, resume, learn, cifar or suites" >&2
      exit 2
      ;;
  esac
done
"$python" - "$work/environment.json" <<'P' || exit 2
import json, pathlib, sys
from alexnet_jax.utils.environment import describe_environment
pathlib.Path(sys.argv[1]).write_text(json.dumps({**describe_environment(), 'command': None}))
P
for stage in "$@"; do
  results=$work/$stage.jsonl
  : >"$results"
  "$stage" 2>&1 | tee "$out/$stage.log"
  "$python" - "$stage" "$results" "$out/$stage.json" "$work/environment.json" <<'P'
import json, pathlib, sys
stage, results, output, environment = sys.argv[1:]
rows = [json.loads(line) for line in pathlib.Path(results).read_text().splitlines()]
environment = json.loads(pathlib.Path(environment).read_text())
pathlib.Path(output).write_text(json.dumps({'stage': stage, 'environment': environment, 'commands': rows}, indent=1))
failed = [row['command'] for row in rows if row.get('exit', '0') not in ('0', 'skipped')]
print(f'{output}: {len(rows)} commands, {len(failed)} failed', *failed, sep='\n  ')
P
done
