#!/usr/bin/env bash
# Trains on Cloud TPU VMs, on one host or many: requests a slice, runs
# `python -m mdm_jax.main` on every host, with a bucket as working directory,
# and deletes the slice.
#
#   PROJECT=my-project ZONE=us-east5-b BUCKET=gs://my-bucket \
#     CONFIG=configs/shapes_256.py \
#     launch/tpu_vm.sh [STEP ...] [-- --config.KEY=VALUE ...]
#
# Steps: create copy install run log delete; all of them if none is named. When
# a step fails, the slice stays and costs: repeat from that step, or run
# `delete`. Training does not depend on this terminal: `log` follows it again;
# `stop` saves a checkpoint and stops it; `fetch` copies the working directory
# to runs/. DRY_RUN=1 prints the commands instead of running them.
#
# The last commit is what runs, or COMMIT. WORKDIR is BUCKET/runs/NAME if it is
# not set. CACHE_GB=N makes `install` also mount the bucket, read-only, as
# `bucket` in the home directory of every host, with N GB of its disk as a cache
# of files; 0 is without a cache. Instead of BUCKET, SHARE=ADDRESS:/NAME is an
# NFS share (Filestore), mounted as `share`. A slice of several hosts needs one
# of them. So does SPOT=1, which asks for Spot VMs; with it `keep` takes the
# place of `log`, and requests a new slice after each preemption until training
# is finished. docs/tpu.md explains it step by step.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need PROJECT ZONE
SPOT=${SPOT:-}
tpu_slice
RUNTIME_VERSION=${RUNTIME_VERSION:-$RUNTIME}
[[ ! $SPOT || $BUCKET$SHARE ]] || fail "SPOT=1 needs BUCKET: a preempted VM \
takes its disk with it."
((HOSTS == 1)) || [[ $BUCKET$SHARE ]] || fail "$ACCELERATOR has $HOSTS hosts, \
and needs BUCKET: all of them write to WORKDIR."
changed=
[[ ${COMMIT:-} ]] || changed=$(git status --porcelain -- mdm_jax configs \
  launch requirements.txt)
# A slice that `keep` requests runs what the first one ran.
export COMMIT=${COMMIT:-$(git rev-parse HEAD)}
# A relative WORKDIR is in the home directory of each host.
WORKDIR=${WORKDIR:-${SHARE:+share/}runs/$NAME}

tpu() {
  call gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"
}

on_workers() {
  tpu tpu-vm ssh "$NAME" --worker=all --command="$1"
}

# Whether training runs, on a host. Another process may have its number after
# the host has started anew.
RUNS="grep -qs supervise.py /proc/\$(cat run.pid 2> /dev/null)/cmdline"
BUSY=69  # exit code of a host that refuses a command, because it trains

# Runs a command on all hosts, and fails if training runs on one: not there.
on_idle_workers() {
  local code=0
  on_workers "! $RUNS || exit $BUSY; $1" || code=$?
  ((code != BUSY)) || {
    trap - EXIT  # Nothing is to be deleted.
    fail "training runs on $NAME: use log, keep or stop."
  }
  return "$code"
}

# Prints the state of the slice, nothing if there is none of this name. Fails if
# that cannot be told.
state() {
  local found
  if found=$(tpu queued-resources describe "$NAME" \
    --format='value(state.state)' 2>&1); then
    echo "${found##*$'\n'}"  # Warnings come before it.
  elif [[ $found != *NOT_FOUND* ]]; then
    echo "$found" >&2
    return 1
  fi
}

# Ends the script because somebody has deleted the slice, as with `delete` in
# another terminal: requesting it again would cost what they meant to save.
end_deleted() {
  trap - EXIT  # Nothing is left that costs.
  echo "$NAME was deleted: to continue, run launch/tpu_vm.sh again." >&2
  exit 75  # as after `stop`
}

create() {
  local now
  now=$(state)
  # The name is free once the one before is gone.
  while [[ $now == DELETING ]]; do
    sleep 30
    now=$(state)
  done
  # One that an earlier call has requested is waited for.
  [[ $now ]] || tpu queued-resources create "$NAME" --node-id="$NAME" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME_VERSION" \
    ${BUCKET:+--scopes=https://www.googleapis.com/auth/cloud-platform} \
    ${SPOT:+--spot}
  [[ ! $DRY_RUN ]] || return 0
  until [[ $now == ACTIVE ]]; do
    # It may take hours, in which a call may fail.
    now=$(state) || now=unknown
    [[ $now && $now != DELETING ]] || end_deleted
    echo "$now"
    case $now in
      FAILED | SUSPEND*) return 1 ;;
    esac
    sleep 30
  done
}

copy() {
  local archive=${TMPDIR:-/tmp}/$NAME.tar.gz
  call git archive --format=tar.gz --output="$archive" "$COMMIT"
  tpu tpu-vm scp "$archive" "$NAME:mdm_jax.tar.gz" --worker=all
  on_idle_workers "rm -rf mdm_jax && mkdir mdm_jax && \
tar -xzf mdm_jax.tar.gz -C mdm_jax"
}

install() {
  # The image's own Python may be older than 3.11.
  on_idle_workers "curl -LsSf https://astral.sh/uv/install.sh | sh && \
rm -rf venv && .local/bin/uv venv --seed --python 3.11 venv && \
venv/bin/pip install -r mdm_jax/requirements.txt && \
venv/bin/pip install -U 'jax[tpu]' gcsfs"
  [[ ! $CACHE_GB ]] || mount_bucket
  [[ ! $SHARE ]] || on_workers "\
sudo apt-get -o DPkg::Lock::Timeout=600 install -y nfs-common && \
mkdir -p share && { mountpoint -q share || \
sudo mount -t nfs $(quoted "$SHARE") share; } && \
sudo chown \"\$USER\" share"
}

# Mounts the bucket on every host, with gcsfuse from Google's packages.
mount_bucket() {
  local key=/usr/share/keyrings/cloud.google.asc packages cache=
  packages=https://packages.cloud.google.com/apt
  ! ((CACHE_GB)) || cache='--cache-dir=cache '
  on_workers "\
curl -fsSL $packages/doc/apt-key.gpg | sudo tee $key > /dev/null && \
echo \"deb [signed-by=$key] $packages gcsfuse-\$(lsb_release -cs) main\" | \
sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null && \
sudo apt-get -o DPkg::Lock::Timeout=600 update && \
sudo apt-get -o DPkg::Lock::Timeout=600 install -y gcsfuse && \
mkdir -p bucket cache && { mountpoint -q bucket || \
gcsfuse -o ro $cache$(gcsfuse_options -- - = | paste -sd ' ' -) \
${BUCKET#gs://} bucket; }"
}

run() {
  local there=$WORKDIR main
  [[ $there == /* || $there == *://* ]] || there=../$there
  main=$(quoted ../venv/bin/python launch/supervise.py --workdir="$there" -- \
    env 'JAX_PLATFORMS=tpu,cpu' \
    ${COMPILED:+JAX_COMPILATION_CACHE_DIR="$COMPILED"} \
    ../venv/bin/python -m mdm_jax.main --distributed --config="$CONFIG" \
    --workdir="$there" "${options[@]}")
  # Stores the exit code, from which `log` and `keep` know how training ended.
  main="$main & echo \$! > ../run.pid; wait \$!; echo \$? > ../run.status"
  on_idle_workers "rm -f run.pid run.status; cd mdm_jax || exit; \
{ nohup bash -c $(quoted "$main") > ../run.log 2>&1 < /dev/null & }; \
until [ -s ../run.pid ]; do sleep 1; done"
}

log() {
  tpu tpu-vm ssh "$NAME" --command="\
until [ -f run.pid ]; do sleep 1; done; \
tail -n +1 -f --pid=\$(cat run.pid) run.log; \
until [ -f run.status ]; do sleep 1; done; exit \$(cat run.status)"
}

keep() {
  local now hosts code begin next failures=0
  local exists=  # Set: if the slice is gone, somebody else has deleted it.
  while true; do
    # What cannot be asked now is asked again in a minute.
    now=$(state) || now=unknown
    [[ ! $DRY_RUN ]] || return 0
    case $now in
      unknown) ;;
      '' | DELETING) [[ ! $exists ]] || end_deleted ;;
      *) exists=1 ;;
    esac
    begin=()
    case $now in
      FAILED | SUSPENDED) begin=(delete create copy install run) ;;
      '') begin=(create copy install run) ;;
      ACTIVE)
        # A line of each host, in any order, without gcloud's line for each
        # connection. A host is idle if it is so for seconds: the status is
        # written a moment after training has ended.
        hosts=$(on_workers "for second in 1 2 3 4 5; do \
cat run.status 2> /dev/null && exit; $RUNS && echo runs && exit; \
sleep 1; done; echo idle" \
          2> >(grep -v 'Attempting to' >&2)) || hosts=unknown
        if grep -qx idle <<< "$hosts"; then
          # The others wait for it in vain.
          begin=(stop copy install run)
        elif ! grep -qvxE '[0-9]+' <<< "$hosts"; then
          # Ended on all of them: the first error is that of the run.
          code=$(grep -vxm 1 0 <<< "$hosts") || code=0
          return "$code"
        fi
        ;;
    esac
    if ((${#begin[@]})); then
      echo "$NAME is ${now:-gone}, and does not train: ${begin[*]}"
      code=0
      for next in "${begin[@]}"; do
        [[ $next != delete ]] || exists=
        launch/tpu_vm.sh "$next" -- "${options[@]}" || {
          code=$?
          break
        }
        [[ $next != create ]] || exists=1
      done
      if ((!code)); then
        failures=0
      elif ((code == 75)); then
        trap - EXIT  # The step has said that the slice was deleted.
        exit 75
      # One that was preempted meanwhile is replaced, however often.
      elif [[ $(state || true) =~ ^(ACTIVE)?$ ]]; then
        ((++failures < 5)) || return 1
      fi
    fi
    sleep 60
  done
}

stop() {
  on_workers "! $RUNS || { kill \$(cat run.pid); \
until [ -f run.status ]; do sleep 1; done; }"
}

fetch() {
  local to=runs/${WORKDIR##*/}
  if [[ $WORKDIR == gs://* ]]; then
    call mkdir -p "$to"
    call gcloud storage rsync --recursive "$WORKDIR" "$to"
  else
    call mkdir -p runs
    tpu tpu-vm scp --recurse "$NAME:$WORKDIR" runs/
  fi
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
if ((!${#steps[@]})); then
  steps=(create copy install run "$follow")
  # A bucket outlives the slice, and can be read where it is.
  [[ $WORKDIR == gs://* ]] || steps+=(fetch)
  steps+=(delete)
fi

if [[ " ${steps[*]} " =~ ' create '|' copy ' ]]; then
  # Names of recipes are not paths, and other paths, such as ../share/mine.py,
  # are those of the hosts or of a bucket.
  [[ $CONFIG != *.py* || $CONFIG == /* || $CONFIG == ../* || \
    $CONFIG == *://* ]] ||
    git cat-file -e "$COMMIT:${CONFIG%%:*}" 2> /dev/null ||
    fail "CONFIG=$CONFIG is not in commit $COMMIT, which is what runs: commit \
it, or correct CONFIG or COMMIT."
  [[ ! $changed ]] ||
    echo 'warning: uncommitted changes do not run on TPUs: commit them.' >&2
fi

for step in "${steps[@]}"; do
  echo "== $step"
  trap 'echo "$step failed; $NAME may still run and cost: delete it with \
launch/tpu_vm.sh delete." >&2' EXIT
  "$step"
  trap - EXIT
done
