#!/usr/bin/env bash
# Trains on several nodes, with one process per node that uses all of its GPUs:
#   sbatch [--nodes=4 --gpus-per-node=8 ...] launch/slurm.sh --config=paper --workdir=... --config.data.path=...
# Two minutes before its time limit, or when preempted, the job saves a checkpoint (exit code 143) and is requeued; it
# then resumes from that step. All nodes must see the workdir, the data, and the folder in JAX_COMPILATION_CACHE_DIR if
# it is set (if not, every start compiles anew). More cores decode images faster.
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
# srun does not inherit --cpus-per-task from the job.
# exec: the signal must reach Python. --wait instead of --kill-on-bad-exit: after SIGTERM a process may still be saving.
# shellcheck disable=SC2016 # each task expands its own SLURM_PROCID
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=0 --wait=120 bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec "${PYTHON:-python}" -m alexnet_jax.main "$@"' task "$@"
code=$?
((code == 143)) && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
