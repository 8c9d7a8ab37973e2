#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: submits a job with one process a GPU.
#
#   NODES=2 GPUS=8 CONFIG=configs/cc12m_64.py WORKDIR=/shared/runs/mine \
#     launch/gpu_slurm.sh [--config.KEY=VALUE ...]
#
# The repository, VENV (launch/gpu.sh makes one) and WORKDIR must be on a file
# system that all nodes mount. Partition, account and the like are sbatch's own
# SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT. Two minutes before its
# time is over, or when it is preempted, the job saves and is queued again; it
# goes on until training is finished. DRY_RUN=1 prints the command.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need WORKDIR
NODES=${NODES:-1}
GPUS=${GPUS:-8}  # of each node
CPUS=${CPUS:-8}  # of each GPU
VENV=${VENV:-.venv}

train=(
  srun --cpus-per-task="$CPUS"
  env 'JAX_PLATFORMS=cuda,cpu' "$VENV/bin/python" -m mdm_jax.main --distributed
  --config="$CONFIG" --workdir="$WORKDIR" "$@")
# 75: it was stopped and can go on.
call sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" \
  --gpus-per-node="$GPUS" --cpus-per-task="$CPUS" --requeue \
  --signal=TERM@120 --open-mode=append --output="$NAME-%j.log" --wrap="\
$(quoted "${train[@]}"); code=\$?; \
[ \$code != 75 ] || scontrol requeue \$SLURM_JOB_ID; exit \$code"
