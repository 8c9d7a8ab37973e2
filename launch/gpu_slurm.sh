#!/usr/bin/env bash
# Trains on GPUs of a Slurm cluster: submits a job with one process per GPU.
#
#   NODES=2 GPUS=8 CONFIG=configs/cc12m_64.py WORKDIR=/shared/runs/mine \
#     launch/gpu_slurm.sh [--config.KEY=VALUE ...]
#
# The repository and VENV (launch/gpu.sh creates one) must be on a file system
# that all nodes mount. So must WORKDIR, unless it is in a bucket; it is
# BUCKET/runs/NAME if only BUCKET=gs://... is set. Set the partition, account
# and time limit by sbatch's own variables SBATCH_PARTITION, SBATCH_ACCOUNT,
# SBATCH_TIMELIMIT. Two minutes before its time limit, and when it is preempted,
# the job saves a checkpoint and queues itself again until training is finished.
# DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ $WORKDIR ]] || fail 'set WORKDIR or BUCKET (docs/tpu.md says what they are).'
NODES=${NODES:-1}
GPUS=${GPUS:-8}  # per node
CPUS=${CPUS:-8}  # per GPU

train=(
  srun --cpus-per-task="$CPUS"
  env 'JAX_PLATFORMS=cuda,cpu'
  ${COMPILED:+JAX_COMPILATION_CACHE_DIR="$COMPILED"}
  "$VENV/bin/python" -m mdm_jax.main --distributed
  --config="$CONFIG" --workdir="$WORKDIR" "$@")
# Exit code 75 of main: it was stopped, and the same command continues it.
call sbatch --job-name="$NAME" --nodes="$NODES" --ntasks-per-node="$GPUS" \
  --gpus-per-node="$GPUS" --cpus-per-task="$CPUS" --requeue \
  --signal=TERM@120 --open-mode=append --output="$NAME-%j.log" --wrap="\
$(quoted "${train[@]}"); code=\$?; \
[ \$code != 75 ] || scontrol requeue \$SLURM_JOB_ID; exit \$code"
