#!/usr/bin/env bash
# Runs a recipe on all GPUs of this machine, as one process:
#
#   launch/gpu.sh --config=configs/nabla_gfn.py --workdir=runs/nabla_gfn
#
# The arguments go to `python -m jaxalign.launch`, whose `--config.mesh.data=-1` (the default) takes
# every GPU; CUDA_VISIBLE_DEVICES chooses some. For several machines see slurm.sbatch.
#
#   VENV    environment to use, made with `pip install "jaxalign[cuda]"` if missing (default: .venv)
#   PYTHON  what it is made with, 3.11 or newer (default: python3)
set -euo pipefail

if [[ $# -eq 0 ]]; then
  sed -n '2,4p' "$0" | sed 's/^# \{0,1\}//' >&2
  exit 2
fi
venv=${VENV:-.venv}
if [[ ! -x $venv/bin/python ]]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is older than 3.11, which jaxalign needs: set PYTHON=python3.11, or make" \
      "an environment first: uv venv --seed --python 3.11 $venv" >&2
    exit 1
  fi
  "$python" -m venv "$venv"
  "$venv/bin/pip" install -q -c constraints.txt -e ".[cuda]"
fi
if ! "$venv/bin/python" -c 'import jax, sys; sys.exit(jax.default_backend() != "gpu")'; then
  echo "error: JAX sees no GPU (nvidia-smi shows the driver; pip needs the extra [cuda])" >&2
  exit 1
fi
# Matmul kernels are chosen by timing, which takes a while: keep the programs between runs.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxalign}
exec "$venv/bin/python" -m jaxalign.launch "$@"
