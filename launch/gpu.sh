#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine.
#
#   CONFIG=configs/shapes_256.py launch/gpu.sh [--config.KEY=VALUE ...]
#
# WORKDIR is main's --workdir, in a bucket or not; if it is not set,
# BUCKET/runs/NAME, or runs/<config> without BUCKET=gs://... VENV is the virtual
# environment, the active one or else .venv, created if it does not exist.
# DRY_RUN=1 prints the commands instead of running them.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# An installation that was broken off is done again.
[[ -d $VENV && ! -e $VENV/unfinished ]] || {
  call python3 -m venv "$VENV"
  call touch "$VENV/unfinished"
  call "$VENV/bin/pip" install -r requirements.txt
  call "$VENV/bin/pip" install -U 'jax[cuda12]' gcsfs
  call rm "$VENV/unfinished"
}
# Without GPUs this is an error; main's default is to go on with the CPU.
call exec env JAX_PLATFORMS=cuda,cpu \
  ${COMPILED:+JAX_COMPILATION_CACHE_DIR="$COMPILED"} \
  "$VENV/bin/python" -m mdm_jax.main --config="$CONFIG" \
  ${WORKDIR:+--workdir="$WORKDIR"} "$@"
