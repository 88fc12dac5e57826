#!/usr/bin/env bash
# Trains with N processes on this machine: launch/local.sh N --config=... --workdir=... [--cpu_devices=1]
# Process i uses GPU i. (`alexnet_jax train` is simpler: a single process uses all GPUs.)
# SIGTERM and Ctrl-C are forwarded to all processes. If one fails, the script stops the others and exits with its code.
set -u
count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "error: N is '$count'; usage: $0 N ARGS... (N processes of alexnet_jax train)" >&2; exit 2; }
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count LOCAL_WORLD_SIZE=$count
signaled=
trap 'signaled=1; kill -TERM $(jobs -rp) 2>/dev/null' TERM
trap 'signaled=1; kill -INT $(jobs -rp) 2>/dev/null' INT
pids=()
for ((i = 0; i < count; i++)); do
  # Background jobs of a script ignore Ctrl-C by default.
  (trap - INT; JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i exec "$python" -m alexnet_jax.main "$@") &
  pids+=($!)
done
code=0 killer=
while [[ $(jobs -rp) ]]; do
  signaled=
  wait -n
  status=$?
  [[ $signaled ]] && continue # `wait` also returns on a signal
  ((status == 0 || status == 127 || code != 0)) && continue
  code=$status
  # After SIGTERM (143) all processes save and exit by themselves. After a failure the others would wait forever.
  ((code == 143)) && grace=60 || grace=2
  left=$(jobs -rp)
  if [[ $left ]]; then
    # shellcheck disable=SC2086 # $left is a list of process ids
    (trap 'kill $!; exit' TERM; sleep "$grace" & wait $!; kill -KILL $left) >/dev/null 2>&1 &
    killer=$!
    disown "$killer"
  fi
done
for pid in "${pids[@]}"; do # processes that exited between two calls of `wait -n`
  wait "$pid" 2>/dev/null
  status=$?
  ((status == 127 || code != 0)) || code=$status
done
[[ $killer ]] && kill "$killer" 2>/dev/null
exit "$code"
