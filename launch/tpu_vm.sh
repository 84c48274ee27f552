#!/usr/bin/env bash
# Runs the same command on all workers of a Cloud TPU slice, which is created if there is none:
#
#   export TPU_NAME=align ZONE=us-west4-a TPU_TYPE=v5litepod-16 BUCKET=my-bucket
#   launch/tpu_vm.sh --config=configs/mapo.py:sd15 --config.model.path=/mnt/runs/sd15 --workdir=/mnt/runs/mapo
#
# The arguments go to `python -m jaxalign.launch`. Run it from the repository's root.
#
#   TPU_NAME, ZONE, TPU_TYPE  the slice; an existing one of that name is used again
#   TPU_VERSION               its software (default: v2-alpha-tpuv5-lite, what v5e needs)
#   SPOT=1                    ask for a preemptible one; when it is taken, the same command
#                             creates the slice anew and goes on from the last checkpoint
#   BUCKET                    a Cloud Storage bucket, mounted at /mnt/runs on every worker. A slice of
#                             several hosts needs it, for all of them read and write one --workdir.
#                             Give it a hierarchical namespace: checkpoints become valid by renaming
#                             their folder.
#   FETCH_TO                  local folder that the run's folder is copied to at the end
#                             (default: runs)
#   DELETE=1                  delete the slice when the run is finished
#   PROJECT                   if it is not gcloud's default
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,6p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
: "${TPU_NAME:?name of the slice}" "${ZONE:?zone of the slice}"
TPU_VERSION=${TPU_VERSION:-v2-alpha-tpuv5-lite}
FETCH_TO=${FETCH_TO:-runs}
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})
tpu=(gcloud compute tpus tpu-vm)

workdir=
for arg in "$@"; do
  [[ $arg == --workdir=* ]] && workdir=${arg#--workdir=}
done
if [[ -z $workdir ]]; then
  echo "error: --workdir is required: a folder under /mnt/runs, or of the one host" >&2
  exit 2
fi

on_all() {  # a command on every worker at the same time
  "${tpu[@]}" ssh "$TPU_NAME" "${where[@]}" --worker=all --command="$1"
}

# ---------------------------------------------------------------------- slice
state=$("${tpu[@]}" describe "$TPU_NAME" "${where[@]}" --format='value(state)' 2>/dev/null || true)
if [[ $state == PREEMPTED || $state == TERMINATED ]]; then
  "${tpu[@]}" delete "$TPU_NAME" "${where[@]}" --quiet
  state=
fi
if [[ -z $state ]]; then
  : "${TPU_TYPE:?type of the slice, such as v5litepod-16}"
  "${tpu[@]}" create "$TPU_NAME" "${where[@]}" --accelerator-type "$TPU_TYPE" \
    --version "$TPU_VERSION" ${SPOT:+--spot}
fi

# ---------------------------------------------------------------------- install
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git ls-files -z | tar --null -czf "$archive" -T -
"${tpu[@]}" scp "$archive" "$TPU_NAME":jaxalign.tar.gz "${where[@]}" --worker=all
# shellcheck disable=SC2016  # the variables are the worker's
on_all 'set -e
  mkdir -p jaxalign && tar -xzf jaxalign.tar.gz -C jaxalign && cd jaxalign
  fits() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2> /dev/null; }
  if ! fits ~/venv/bin/python; then
    # Images of TPU VMs come with a Python that is too old, and without venv: uv brings its own.
    rm -rf ~/venv
    if ! { python3 -m pip install -q --user uv &&
           python3 -m uv venv -q --seed --python 3.11 ~/venv; }; then
      echo "error: $(hostname): found no Python 3.11 or newer, which jaxalign needs, and could not" \
        "install one with uv; make an environment with it at ~/venv" >&2
      exit 1
    fi
  fi
  ~/venv/bin/python -m pip install -q -c constraints.txt -e ".[tpu]"'
if [[ -n ${BUCKET:-} ]]; then
  on_all "set -e
    if ! command -v gcsfuse > /dev/null; then
      echo 'deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -c -s) main' |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list
      curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo apt-key add -
      sudo apt-get -qq update && sudo apt-get -qq install -y gcsfuse
    fi
    sudo mkdir -p /mnt/runs && sudo chown \"\$USER\" /mnt/runs
    mountpoint -q /mnt/runs || gcsfuse --implicit-dirs '$BUCKET' /mnt/runs"
fi

# ---------------------------------------------------------------------- run
status=0
on_all "cd jaxalign && JAXALIGN_DISTRIBUTED=1 ~/venv/bin/python -m jaxalign.launch$(printf ' %q' "$@")" ||
  status=$?

# ---------------------------------------------------------------------- fetch
mkdir -p "$FETCH_TO"
source=$workdir
[[ $source == /* ]] || source="jaxalign/$source"
"${tpu[@]}" scp --recurse "$TPU_NAME:$source" "$FETCH_TO/" "${where[@]}" --worker=0
if ((status == 0)) && [[ ${DELETE:-} == 1 ]]; then
  "${tpu[@]}" delete "$TPU_NAME" "${where[@]}" --quiet
fi
exit "$status"
