#!/usr/bin/env bash
# Trains on Cloud TPU VMs, on one host or many: requests a slice, runs
# `python -m mdm_jax.main` on every host, copies the working directory back to
# runs/ and deletes the slice.
#
#   PROJECT=my-project ZONE=us-east5-b CONFIG=configs/shapes_256.py \
#     launch/tpu_vm.sh [STEP ...] [-- --config.KEY=VALUE ...]
#
# Steps: create copy install run log fetch delete; all of them if none is
# named. When a step fails, the slice stays and costs: repeat from that step, or
# run `delete`. Training does not depend on this terminal: `log` follows it
# again; `stop` saves a checkpoint and stops it. DRY_RUN=1 prints the commands
# instead of running them.
#
# The last commit is what runs. SHARE=ADDRESS:/NAME is an NFS share (Filestore).
# `install` mounts it as `share` in the home directory of every host, and
# WORKDIR is a directory in it. A slice of several hosts needs a share. So does
# SPOT=1, which asks for Spot VMs; with it `keep` takes the place of `log`, and
# requests a new slice after each preemption until training is finished.
# docs/tpu.md explains it step by step.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need PROJECT ZONE
SPOT=${SPOT:-}
tpu_slice
RUNTIME_VERSION=${RUNTIME_VERSION:-$RUNTIME}
[[ ! $SPOT || $SHARE ]] || fail "SPOT=1 needs SHARE: a preempted VM takes \
its disk with it."
((HOSTS == 1)) || [[ $SHARE ]] || fail "$ACCELERATOR has $HOSTS hosts, and \
needs SHARE: all of them write to WORKDIR."
# A relative WORKDIR is in the home directory of each host.
WORKDIR=${WORKDIR:-${SHARE:+share/}runs/$NAME}

tpu() {
  call gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

on_workers() {
  tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

state() {
  tpu queued-resources describe "$NAME" --format='value(state.state)'
}

create() {
  tpu queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME_VERSION" \
    ${SPOT:+--spot}
  local now=
  until [[ $now == ACTIVE ]]; do
    now=$(state)
    [[ ! $DRY_RUN ]] || return 0
    echo "$now"
    case $now in
      FAILED | SUSPEND*) return 1 ;;
    esac
    sleep 30
  done
}

copy() {
  local archive=${TMPDIR:-/tmp}/$NAME.tar.gz
  call git archive --format=tar.gz --output="$archive" HEAD
  tpu tpu-vm scp "$archive" "$NAME:mdm_jax.tar.gz" --worker=all
  on_workers "rm -rf mdm_jax && mkdir mdm_jax && \
tar -xzf mdm_jax.tar.gz -C mdm_jax"
}

install() {
  # The image's own Python may be older than 3.11.
  on_workers "curl -LsSf https://astral.sh/uv/install.sh | sh && \
rm -rf venv && .local/bin/uv venv --seed --python 3.11 venv && \
venv/bin/pip install -r mdm_jax/requirements.txt && \
venv/bin/pip install -U 'jax[tpu]'"
  [[ ! $SHARE ]] || on_workers "\
sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common && \
mkdir -p share && { mountpoint -q share || \
sudo mount -t nfs $(quoted "$SHARE") share; } && \
sudo chown \"\$USER\" share"
}

run() {
  local there=$WORKDIR main
  [[ $there == /* ]] || there=../$there
  main=$(quoted ../venv/bin/python launch/supervise.py --workdir="$there" -- \
    env 'JAX_PLATFORMS=tpu,cpu' ../venv/bin/python -m mdm_jax.main \
    --distributed --config="$CONFIG" --workdir="$there" "${options[@]}")
  # Stores the exit code, from which `log` and `keep` know how training ended.
  main="$main & echo \$! > ../run.pid; wait \$!; echo \$? > ../run.status"
  on_workers "rm -f run.pid run.status; cd mdm_jax || exit; \
nohup bash -c $(quoted "$main") > ../run.log 2>&1 < /dev/null &"
}

log() {
  tpu tpu-vm ssh "$NAME" --command="\
until [ -f run.pid ]; do sleep 1; done; \
tail -n +1 -f --pid=\$(cat run.pid) run.log; \
until [ -f run.status ]; do sleep 1; done; exit \$(cat run.status)"
}

keep() {
  local code
  while true; do
    case $(state) in
      FAILED | SUSPENDED)
        echo "$NAME was preempted: getting a new one."
        # If the new slice is preempted meanwhile, the loop tries again.
        launch/tpu_vm.sh delete create copy install run -- "${options[@]}" ||
          [[ $(state) != ACTIVE ]] || return 1
        ;;
      ACTIVE)
        # The code is empty while training runs, or while the VM cannot be
        # reached.
        code=$(tpu tpu-vm ssh "$NAME" --command='cat run.status || true') ||
          true
        [[ ! $code ]] || return "$code"
        ;;
    esac
    [[ ! $DRY_RUN ]] || return 0
    sleep 60
  done
}

stop() {
  on_workers "kill \$(cat run.pid); \
until [ -f run.status ]; do sleep 1; done"
}

fetch() {
  call mkdir -p runs
  tpu tpu-vm scp --recurse "$NAME:$WORKDIR" runs/
}

delete() {
  tpu queued-resources delete "$NAME" --force --quiet
}

steps=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    create | copy | install | run | log | keep | stop | fetch | delete)
      steps+=("$1")
      ;;
    *)
      fail "no step $1: the steps are create copy install run log keep stop \
fetch delete, options of main come after --."
      ;;
  esac
  shift
done
options=("${@:2}")
follow=log
[[ ! $SPOT ]] || follow=keep
((${#steps[@]})) || steps=(create copy install run "$follow" fetch delete)

for step in "${steps[@]}"; do
  echo "== $step"
  trap 'echo "$step failed; $NAME may still run and cost: delete it with \
launch/tpu_vm.sh delete." >&2' EXIT
  "$step"
  trap - EXIT
done
