#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine.
#
#   CONFIG=configs/shapes_256.py launch/gpu.sh [--config.KEY=VALUE ...]
#
# WORKDIR is main's --workdir, in a bucket or not; if it is not set,
# BUCKET/runs/NAME, or runs/<config> without BUCKET=gs://... VENV is the virtual
# environment, the active one or else .venv, created if it does not exist. JAX
# for CUDA is installed if it lacks it. DRY_RUN=1 prints the commands instead of
# running them.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Exits with 0 if JAX for CUDA is installed.
FIND_CUDA='
from importlib import metadata
plugins = metadata.entry_points(group="jax_plugins")
raise SystemExit(not any("cuda" in plugin.name for plugin in plugins))'

cuda=("$VENV/bin/pip" install -U 'jax[cuda12]' gcsfs)
# An installation that was broken off is done again.
if [[ ! -d $VENV || -e $VENV/unfinished ]]; then
  call python3 -m venv "$VENV"
  call touch "$VENV/unfinished"
  call "$VENV/bin/pip" install -r requirements.txt
  call "${cuda[@]}"
  call rm "$VENV/unfinished"
elif ! "$VENV/bin/python" -c "$FIND_CUDA"; then
  # As one made for CPUs, by the README's commands.
  call "${cuda[@]}"
fi
# Without GPUs this is an error; main's default is to go on with the CPU.
call exec env JAX_PLATFORMS=cuda,cpu \
  ${COMPILED:+JAX_COMPILATION_CACHE_DIR="$COMPILED"} \
  "$VENV/bin/python" -m mdm_jax.main --config="$CONFIG" \
  ${WORKDIR:+--workdir="$WORKDIR"} "$@"
