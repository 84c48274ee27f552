#!/usr/bin/env bash
# Runs one command as N processes on this machine, whose CPU devices form one mesh:
#
#   launch/local_multiprocess.sh 2 --config=configs/nabla_gfn.py:smoke --workdir=runs/two
#
# What follows N is passed to `python -m jaxalign.launch` in every process. It shows on a laptop what
# a slice or a cluster does: the same batch, split over processes. Each has one device; set
# DEVICES_PER_PROCESS for more. Standard error of process i > 0 goes to standard error with "[i]".
# PYTHON chooses the interpreter (default: .venv/bin/python, or python where there is none).
#
# SIGTERM and Ctrl-C are passed on. If a process fails, the others are killed, since they would wait
# for it: the same command then goes on from the last checkpoint.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  sed -n '2,5p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
count=$1
shift

python=${PYTHON:-}
if [[ -z $python ]]; then
  python=python
  [[ -x .venv/bin/python ]] && python=.venv/bin/python
fi
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

pids=()
stop() {  # pass the signal $1 on
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'stop TERM' TERM
trap 'stop INT' INT

for ((i = 0; i < count; i++)); do
  JAX_PLATFORMS=cpu JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo \
    JAX_NUM_CPU_DEVICES="${DEVICES_PER_PROCESS:-1}" \
    JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$count" JAX_PROCESS_ID="$i" \
    "$python" -m jaxalign.launch "$@" \
    2> >(if ((i > 0)); then sed -u "s/^/[$i] /"; else cat; fi >&2) &
  pids+=("$!")
done

# The first failure decides; `wait` also returns where a trap has run, and is then called again.
status=0
left=$count
while ((left > 0)); do
  code=0
  wait -n -p ended "${pids[@]}" || code=$?
  [[ -z ${ended:-} ]] && continue
  left=$((left - 1))
  for k in "${!pids[@]}"; do
    [[ ${pids[k]} == "$ended" ]] && unset 'pids[k]'
  done
  if ((code != 0 && status == 0)); then
    status=$code
    # 143 is a run that saved its state on SIGTERM; the others are about to say the same.
    ((code == 143)) || stop KILL
  fi
done
exit "$status"
