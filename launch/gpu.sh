#!/usr/bin/env bash
# Trains on the NVIDIA GPUs of this machine.
#
#   CONFIG=configs/shapes_256.py launch/gpu.sh [--config.KEY=VALUE ...]
#
# WORKDIR is main's --workdir; without it, main chooses. VENV is the virtual
# environment, made if it does not exist.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-configs/shapes_64.py}
VENV=${VENV:-.venv}

if [[ ! -d $VENV ]]; then
  python3 -m venv "$VENV"
  "$VENV/bin/pip" install -r requirements.txt
  "$VENV/bin/pip" install -U "jax[cuda12]"
fi
# An error, where JAX would otherwise go on without the GPUs.
export JAX_PLATFORMS=cuda,cpu
exec "$VENV/bin/python" -m mdm_jax.main --config="$CONFIG" \
  ${WORKDIR:+--workdir="$WORKDIR"} "$@"
