#!/usr/bin/env bash
# Measures the CPU tables of docs/performance.md, beside the other programs in the same calls.
#
#     launch/cpu_figures.sh STAGE...       step, inference, loop, input, train, prepare, mesh; in the root of a clone
#
# Afterwards: cp cpu_figures/cpu_*.json docs/results && python docs/tables.py
# The environment needs '.[oracle]' and, for inference, onnx, onnxruntime and openvino. Settings are environment
# variables:
#   IMAGES: original photos, as for `alexnet_jax prepare` (stages input, train and prepare)
#   OUT: the folder of the results (cpu_figures), one file for each measurement; WORK: of prepared data ($OUT/work)
#   SMALL=1: everything at toy size and without other programs, to try this script
# Leave the machine alone meanwhile. A failure ends that measurement only.
python=${PYTHON:-python}
out=${OUT:-cpu_figures} small=${SMALL:-} failed=()
work=${WORK:-$out/work}
mkdir -p "$out" "$work"

torch=(--against=torch) runtimes=('--against=torch,onnxruntime,openvino')
[ "$small" ] && torch=() runtimes=()
pick() { if [ "$small" ]; then echo "$1"; else echo "$2"; fi; } # toy size, full size

repeats=$(pick 1 5)

measure() { # NAME MODE OPTIONS...: writes cpu_NAME.json
  local name=$1 mode=$2
  shift 2
  set -- "$mode" "$@" --repeats="$repeats" --output="$out/cpu_$name.json"
  echo "+ alexnet_jax benchmark $*"
  "$python" -m alexnet_jax benchmark "$@" || failed+=("$name")
}

step() {
  local config all="cifar10:80sec cifar10:19pct cifar10:18pct cifar10:13pct cifar10:11pct tiny_imagenet quickstart paper"
  for config in $(pick "cifar10:80sec" "$all"); do
    measure "step_${config/:/_}" step --config="$config" --batch_size="$(pick 2 128)" "${torch[@]}"
  done
  measure step_two_devices step --config="$(pick quickstart paper)" --batch_size="$(pick 2 128)" --cpu_devices=2
}
inference() {
  local config
  for config in $(pick quickstart "paper torchvision"); do
    measure "inference_$config" inference --config="$config" --batch_sizes="$(pick 1,2 1,8,64)" "${runtimes[@]}"
  done
}
with_data() { # NAME MODE OPTIONS...: reads squares of 256 px, which it prepares once
  [ -d "$work/squares" ] || "$python" -m alexnet_jax prepare --input="$IMAGES" --output="$work/squares" --size=256
  measure "$@" --config.data.path="$work/squares" --batch_size="$(pick 4 128)" "${torch[@]}"
}
input() { # two worker processes, or two threads; PyTorch reads the same squares, or the original photos
  with_data input_processes input --config.data.num_workers=2
  with_data input_threads input --config.data.num_threads=2
  [ "$small" ] || with_data input_originals input --config.data.num_workers=2 --input="$IMAGES"
}
train() { with_data train train --config="$(pick quickstart paper)"; }
mesh() { # bytes between devices: computed, so a single step is enough
  local mesh repeats=1
  for mesh in $(pick 1x2 "1x2 2x1 2x2"); do
    local data=${mesh%x*} tower=${mesh#*x}
    measure "mesh_$mesh" step --config="$(pick quickstart paper)" --batch_size="$(pick 2 128)" --steps=1 \
      --cpu_devices=$((data * tower)) --config.mesh.data="$data" --config.mesh.tower="$tower"
  done
}
loop() {
  local config
  for config in $(pick quickstart "quickstart cifar10:18pct"); do
    measure "loop_${config/:/_}" loop --config="$config" --steps="$(pick 20 1000)"
  done
}
prepare() { measure prepare prepare --input="$IMAGES"; }

(($#)) || { echo "usage: launch/cpu_figures.sh step|inference|loop|input|train|prepare|mesh ..." >&2; exit 2; }
for stage in "$@"; do
  case $stage in
    step | inference | loop | mesh) ;;
    input | train | prepare) : "${IMAGES:?set IMAGES, see the head of this script}" ;;
    *)
      echo "unknown stage $stage: expected step, inference, loop, input, train, prepare or mesh" >&2
      exit 2
      ;;
  esac
done
for stage in "$@"; do "$stage"; done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
