#!/usr/bin/env bash
# Trains on a Cloud TPU VM: asks for one, runs `python -m mdm_jax.main` on it,
# brings the working directory back to runs/ and deletes the VM.
#
#   PROJECT=my-project ZONE=us-east5-b CONFIG=configs/shapes_256.py \
#     launch/tpu_vm.sh [STEP ...] [-- --config.KEY=VALUE ...]
#
# Steps: create copy install run log fetch delete; all of them if none is
# named. When one fails, the VM stays: repeat from that step, or `delete`.
# Training does not depend on this terminal; `log` follows it again.
# DRY_RUN=1 prints the commands instead of running them.
#
# What runs is the last commit. A data set must be on the VM already. For a
# slice of several hosts WORKDIR must be on a file system that all of them
# mount; add -- --distributed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PROJECT=${PROJECT:?the Google Cloud project}
ZONE=${ZONE:?the zone, such as us-east5-b}
TPU_NAME=${TPU_NAME:-mdm}
ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v6e-8}
# v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, tpu-ubuntu2204-base
# for v4.
RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv6e}
CONFIG=${CONFIG:-configs/shapes_64.py}
WORKDIR=${WORKDIR:-runs/$TPU_NAME}  # in the home directory on the VM
DRY_RUN=${DRY_RUN:-}

call() {
  if [[ $DRY_RUN ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

tpu() {
  call gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

on_workers() {
  tpu tpu-vm ssh "$TPU_NAME" --worker=all --command="$1"
}

create() {
  tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" \
    --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION"
  local state=
  until [[ $state == *ACTIVE* ]]; do
    state=$(tpu queued-resources describe "$TPU_NAME" \
      --format='value(state.state)')
    echo "$state"
    case $state in
      *FAILED* | *SUSPEND*) return 1 ;;
    esac
    [[ $DRY_RUN ]] && return
    sleep 30
  done
}

copy() {
  local archive=${TMPDIR:-/tmp}/$TPU_NAME.tar.gz
  call git archive --format=tar.gz --output="$archive" HEAD
  tpu tpu-vm scp "$archive" "$TPU_NAME:mdm_jax.tar.gz" --worker=all
  on_workers 'rm -rf mdm_jax && mkdir mdm_jax &&
    tar -xzf mdm_jax.tar.gz -C mdm_jax'
}

install() {
  # The image's own Python may be older than 3.11.
  on_workers 'curl -LsSf https://astral.sh/uv/install.sh | sh &&
    rm -rf venv && .local/bin/uv venv --seed --python 3.11 venv &&
    venv/bin/pip install -r mdm_jax/requirements.txt &&
    venv/bin/pip install -U "jax[tpu]"'
}

run() {
  local main
  main=$(printf '%q ' ../venv/bin/python -m mdm_jax.main --config="$CONFIG" \
    --workdir="../$WORKDIR" "${options[@]}")
  # The status, so that `log` knows how training ended.
  main=$(printf '%q' "$main; echo \$? > ../run.status")
  on_workers "rm -f run.status; cd mdm_jax || exit; \
nohup bash -c $main > ../run.log 2>&1 < /dev/null & echo \$! > ../run.pid"
}

log() {
  # shellcheck disable=SC2016  # For the VM's shell.
  tpu tpu-vm ssh "$TPU_NAME" --command='
    tail -n +1 -f --pid="$(cat run.pid)" run.log; exit "$(cat run.status)"'
}

fetch() {
  call mkdir -p runs
  tpu tpu-vm scp --recurse "$TPU_NAME:$WORKDIR" runs/
}

delete() {
  tpu queued-resources delete "$TPU_NAME" --force --quiet
}

steps=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    create | copy | install | run | log | fetch | delete) steps+=("$1") ;;
    *)
      echo "error: no step $1: the steps are create copy install run log" \
        "fetch delete, options of main come after --." >&2
      exit 1
      ;;
  esac
  shift
done
options=("${@:2}")
((${#steps[@]})) || steps=(create copy install run log fetch delete)

for step in "${steps[@]}"; do
  echo "== $step"
  trap 'echo "$step failed; $TPU_NAME may still run and cost: delete it with \
launch/tpu_vm.sh delete." >&2' EXIT
  "$step"
  trap - EXIT
done
