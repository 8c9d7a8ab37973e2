# Variables and functions that the launch scripts share; they source this file.
# shellcheck shell=bash disable=SC2034  # No script uses all of them.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

fail() {
  echo "error: $1" >&2
  exit 1
}

# macOS has 3.2, to which an empty array is an unset variable.
((100 * BASH_VERSINFO[0] + BASH_VERSINFO[1] >= 404)) ||
  fail "bash ${BASH_VERSINFO[0]}.${BASH_VERSINFO[1]} is too old: 4.4 or newer \
is needed (on macOS: brew install bash)."

# Fails with one line that names all variables that are not set.
need() {
  local name missing=
  for name; do
    [[ ${!name:-} ]] || missing+="${missing:+, }$name"
  done
  [[ ! $missing ]] || fail "set $missing (docs/tpu.md says what they are)."
}

# Prints its arguments as one line, quoted for a shell.
quoted() {
  local word line=
  for word; do
    [[ $word =~ ^[-A-Za-z0-9_./:=,@%+]+$ ]] ||
      word="'${word//"'"/"'\''"}'"
    line+="${line:+ }$word"
  done
  echo "$line"
}

# Runs a command; with DRY_RUN=1 prints it instead.
exec 3>&1  # Printed commands go here even where a caller captures stdout.
call() {
  if [[ $DRY_RUN ]]; then
    quoted "$@" >&3
  else
    "$@" 3>&-
  fi
}

CONFIG=${CONFIG:-configs/shapes_64.py}
NAME=${NAME:-mdm}     # name of the TPU or the job
ACCELERATOR=${ACCELERATOR:-v6e-8}
BUCKET=${BUCKET:-}    # gs://NAME: for what runs write, and for data
SHARE=${SHARE:-}      # instead, a file system that all hosts mount
CACHE_GB=${CACHE_GB:-}
DRY_RUN=${DRY_RUN:-}

BUCKET=${BUCKET%/}
[[ ! $BUCKET || $BUCKET =~ ^gs://[^/]+$ ]] ||
  fail "BUCKET=$BUCKET is not gs://NAME."
[[ ! $CACHE_GB || $CACHE_GB =~ ^[0-9]+$ ]] ||
  fail "CACHE_GB=$CACHE_GB is no number of GB."
[[ ! $CACHE_GB || $BUCKET ]] || fail 'CACHE_GB needs BUCKET, which it mounts.'
# main's --workdir
WORKDIR=${WORKDIR:-${BUCKET:+$BUCKET/runs/$NAME}}
WORKDIR=${WORKDIR%/}
# Compiled programs: another machine need not compile again.
COMPILED=${BUCKET:+$BUCKET/cache/xla}
# The virtual environment of GPUs: the active one, if any.
VENV=${VENV:-${VIRTUAL_ENV:-.venv}}

# Prints gcsfuse's options for a mount of data that does not change, a word
# each: `name` becomes `prefix`name, and what follows it is separated by `is`.
gcsfuse_options() {
  local prefix=$1 section=$2 is=$3
  echo "${prefix}implicit-dirs"
  # Metadata never expires.
  echo "${prefix}metadata-cache${section}ttl-secs${is}-1"
  ((CACHE_GB)) || return 0
  # Files are cached as a whole, also if they are not read from their start.
  echo "${prefix}file-cache${section}cache-file-for-range-read${is}true"
  echo "${prefix}file-cache${section}max-size-mb${is}$((1024 * CACHE_GB))"
}

# Sets the names that Cloud TPU and GKE use for the slice ACCELERATOR: runtime,
# node type, machine type and topology; and its number of hosts and chips.
tpu_slice() {
  case $ACCELERATOR in
    v5litepod-*)
      RUNTIME=v2-alpha-tpuv5-lite FAMILY=tpu-v5-lite-podslice
      MACHINE=ct5lp-hightpu
      ;;
    v6e-*)
      RUNTIME=v2-alpha-tpuv6e FAMILY=tpu-v6e-slice
      MACHINE=ct6e-standard
      ;;
    v5p-*)
      RUNTIME=v2-alpha-tpuv5 FAMILY=tpu-v5p-slice
      MACHINE=ct5p-hightpu
      ;;
  esac
  case $ACCELERATOR in
    v5p-8) TOPOLOGY=2x2x1 ;;  # Eight cores are four chips.
    v5p-16) TOPOLOGY=2x2x2 ;;
    v5p-32) TOPOLOGY=2x2x4 ;;
    v5p-64) TOPOLOGY=2x4x4 ;;
    v5p-128) TOPOLOGY=4x4x4 ;;
    v5p-256) TOPOLOGY=4x4x8 ;;
    v5litepod-4 | v6e-4) TOPOLOGY=2x2 ;;
    v5litepod-8 | v6e-8) TOPOLOGY=2x4 ;;
    v5litepod-16 | v6e-16) TOPOLOGY=4x4 ;;
    v5litepod-32 | v6e-32) TOPOLOGY=4x8 ;;
    v5litepod-64 | v6e-64) TOPOLOGY=8x8 ;;
    v5litepod-128 | v6e-128) TOPOLOGY=8x16 ;;
    v5litepod-256 | v6e-256) TOPOLOGY=16x16 ;;
    *)
      fail "no slice ACCELERATOR=$ACCELERATOR is known: there are \
v5litepod-N and v6e-N of N = 4, 8, 16, 32, 64, 128, 256 chips, and v5p-N of \
N = 8, 16, 32, 64, 128, 256 cores."
      ;;
  esac
  # Eight chips of v5e or v6e share one host; every other host has four.
  CHIPS=4
  [[ $TOPOLOGY != 2x4 ]] || CHIPS=8
  HOSTS=$((${TOPOLOGY//x/*} / CHIPS))
  MACHINE+=-${CHIPS}t
}
