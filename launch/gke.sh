#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, with the JobSet launch/gke_jobset.yaml.
#
#   IMAGE=REGISTRY/mdm_jax BUCKET=gs://my-bucket ACCELERATOR=v5litepod-16 \
#     CONFIG=configs/cc12m_64.py launch/gke.sh STEP ... [-- --config.KEY=VALUE]
#
# Steps:
#   pool    makes a node pool with that slice in CLUSTER
#   build   builds and pushes the image
#   run     submits the job
#   log     follows the log of the first host until the job has ended
#   delete  deletes the job
#   delete_pool  deletes the node pool, which costs until then
#
# JobSet must be installed in the cluster, and the cluster must be kubectl's
# current one. WORKDIR is BUCKET/runs/NAME if it is not set; the pods' service
# account must have access to the bucket. CACHE_GB=N also mounts the bucket,
# read-only, as /bucket, with N GB of each node's disk as a cache of files; 0 is
# without a cache. Instead of BUCKET, SHARE is a PersistentVolumeClaim that all
# hosts may write to, mounted as /share. SPOT=1 makes the node pool use Spot
# VMs. DRY_RUN=1 prints the commands and the manifest instead. launch/gke.md
# explains it.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

need IMAGE
[[ $BUCKET$SHARE ]] || need BUCKET
SPOT=${SPOT:-}
WORKDIR=${WORKDIR:-/share/runs/$NAME}  # without BUCKET
tpu_slice

# Prints its arguments as a list of strings in YAML, which is also JSON.
list() {
  local word result=
  for word; do
    word=${word//\\/\\\\}
    result+="${result:+, }\"${word//\"/\\\"}\""
  done
  echo "[$result]"
}

# Adds a volume to VOLUMES and MOUNTS: its name, and its source.
add_volume() {
  VOLUMES+=", {name: $1, $2}"
  MOUNTS+=", {name: $1, mountPath: /$1}"
}

# shellcheck disable=SC2034  # The loop below reads variables by name.
manifest() {
  local text name
  ARGUMENTS=$(list --distributed --config="$CONFIG" --workdir="$WORKDIR" \
    "${options[@]}")
  MOUNT_BUCKET=false VOLUMES='' MOUNTS=''
  [[ ! $SHARE ]] ||
    add_volume share "persistentVolumeClaim: {claimName: $SHARE}"
  [[ ! $CACHE_GB ]] || {
    MOUNT_BUCKET=true
    add_volume bucket "csi: {driver: gcsfuse.csi.storage.gke.io, \
readOnly: true, volumeAttributes: {bucketName: ${BUCKET#gs://}, \
mountOptions: '$(gcsfuse_options '' : : | paste -sd, -)'}}"
  }
  text=$(<launch/gke_jobset.yaml)
  for name in NAME IMAGE FAMILY TOPOLOGY HOSTS CHIPS ARGUMENTS COMPILED \
    MOUNT_BUCKET VOLUMES MOUNTS; do
    text=${text//"\${$name}"/"${!name}"}
  done
  echo "$text"
}

pool() {
  need CLUSTER PROJECT ZONE
  local topology=()
  ((HOSTS == 1)) || topology=(--tpu-topology="$TOPOLOGY")
  call gcloud container node-pools create "$NAME" --cluster="$CLUSTER" \
    --project="$PROJECT" --location="${ZONE%-*}" --node-locations="$ZONE" \
    --machine-type="$MACHINE" --num-nodes="$HOSTS" "${topology[@]}" \
    ${SPOT:+--spot}
}

build() {
  # That of the nodes; the machine that builds may have another one.
  call docker build --platform=linux/amd64 --file=launch/Dockerfile \
    --tag="$IMAGE" .
  call docker push "$IMAGE"
}

# Prints NAME and, once the job has ended, Completed or Failed; nothing if there
# is no such job. Fails if that cannot be told.
job() {
  kubectl get jobset "$NAME" --ignore-not-found \
    --output='jsonpath={.metadata.name} {.status.terminalState}'
}

run() {
  local now
  if [[ $DRY_RUN ]]; then
    call kubectl create --filename=-
    manifest
    return
  fi
  now=$(job)
  [[ ! $now ]] || fail "there is a job $NAME, running or ended: follow it with \
the step log, or delete it first."
  manifest | kubectl create --filename=-
}

log() {
  # The first host logs progress; the others log warnings only.
  local now phase line since last='' first="jobset.sigs.k8s.io/jobset-name=\
$NAME,batch.kubernetes.io/job-completion-index=0"
  local stamped='^[0-9]{4}-[0-9]{2}-[0-9]{2}T[^ ]+ '
  local logs=(kubectl logs --follow --timestamps --tail=-1 --selector="$first")
  if [[ $DRY_RUN ]]; then
    call "${logs[@]}"
    return
  fi
  now=$(job)
  # Pods are restarted, and connections break.
  while true; do
    [[ $now ]] || fail "there is no job $NAME: the step run submits it."
    # `logs` waits neither for a pod nor for its image.
    phase=$(kubectl get pods --selector="$first" \
      --output='jsonpath={.items[*].status.phase}') || phase=
    if [[ $phase && $phase != *Pending* ]]; then
      # A new connection begins with lines that an earlier one has printed.
      since=$last
      while IFS= read -r line; do
        if [[ ! $line =~ $stamped ]]; then
          echo "$line"
        elif [[ ! $since || ${line%% *} > $since ]]; then
          last=${line%% *}
          echo "${line#* }"
        fi
      done < <("${logs[@]}")
    fi
    case $now in
      *' Completed') return ;;
      *' Failed') fail "job $NAME has failed." ;;
    esac
    sleep 10
    now=$(job) || now=unknown
  done
}

delete() {
  call kubectl delete jobset "$NAME"
}

delete_pool() {
  need CLUSTER PROJECT ZONE
  call gcloud container node-pools delete "$NAME" --cluster="$CLUSTER" \
    --project="$PROJECT" --location="${ZONE%-*}" --quiet
}

steps=()
while (($#)) && [[ $1 != -- ]]; do
  case $1 in
    pool | build | run | log | delete | delete_pool) steps+=("$1") ;;
    *)
      fail "no step $1: there are pool build run log delete delete_pool, \
options of main come after --."
      ;;
  esac
  shift
done
options=("${@:2}")
((${#steps[@]})) || fail 'name a step: pool build run log delete delete_pool.'

for step in "${steps[@]}"; do
  "$step"
done
