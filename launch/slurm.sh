#!/usr/bin/env bash
# Trains on several nodes, one process each with all of its GPUs, which share the batch:
#   sbatch [--nodes=4 --gpus-per-node=8 ...] launch/slurm.sh --config=paper --workdir=... --config.data.path=...
# Two minutes before its time is up, or when it is preempted, the job saves (exit code 143) and goes back into the queue;
# there it goes on from that step. The workdir and the data must be seen by every node. So must the folder for compiled
# programs that JAX_COMPILATION_CACHE_DIR may name: without it each start compiles. More cores read images faster.
#SBATCH --job-name=alexnet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || exit 2
export JAX_COORDINATOR_ADDRESS=$first:$((20000 + SLURM_JOB_ID % 20000)) JAX_NUM_PROCESSES=$SLURM_NTASKS
# srun does not take over its cores from the job by itself.
# exec: the signal has to reach Python. --wait, and not --kill-on-bad-exit: after SIGTERM one may still be saving.
# shellcheck disable=SC2016 # SLURM_PROCID is each task's own
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=120 bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "${PYTHON:-python}" -m alexnet_jax.main "$@"' task "$@"
code=$?
((code == 143)) && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
