#!/usr/bin/env bash
# Trains on N processes of this machine: launch/local.sh N --config=... --workdir=... [--cpu_devices=1]
# SIGTERM and Ctrl-C reach every process. When one fails, the others are ended; its exit code is that of the script.
set -u
count=${1:-}
[[ $count =~ ^[1-9][0-9]*$ ]] || { echo "error: N is '$count'; usage: $0 N ARGS... (N processes of alexnet_jax.main)" >&2; exit 2; }
shift
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 2
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
signalled=
trap 'signalled=1; kill -TERM $(jobs -p) 2>/dev/null' TERM
trap 'signalled=1; kill -INT $(jobs -p) 2>/dev/null' INT
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$python" -m alexnet_jax.main "$@" &
done
code=0 ended=0
while ((ended < count)); do
  signalled=
  wait -n
  status=$?
  [[ $signalled ]] && continue # a signal ends `wait` too
  ended=$((ended + 1))
  ((status == 0 || code != 0)) && continue
  code=$status
  # After SIGTERM all save and end by themselves; after any other end the rest would wait for the one that is gone.
  ((code == 143)) || { sleep 2; kill -KILL $(jobs -p) 2>/dev/null; }
done
exit "$code"
