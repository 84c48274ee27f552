"""What the command line alone can tell is told before anything that takes seconds to load."""
import json
import subprocess
import sys

import runs

HEAVY = {"jax", "flax", "optax", "orbax", "scipy", "transformers", "diffusers", "torch",
         "tensorboard", "starlette", "matplotlib"}
# What answers each needs of these. A recipe names its method, which is made of JAX and optax; the
# report's numbers are of scipy.
BAD = [("sample", ["--checkpoint=no/where", "--prompts=x", "--output=out"], set()),
       ("sample", ["--checkpoint=jaxalign:emoji", "--prompts=none.txt", "--output=out"], set()),
       ("evaluate", ["--checkpoint=no/where", "--prompts=jaxalign:emoji_heldout",
                     "--output=a.json"], set()),
       ("evaluate", ["--checkpoint=jaxalign:emoji", "--prompts=jaxalign:emoji_heldout",
                     "--output=no/where.json"], set()),
       ("export", ["--checkpoint=jaxalign:emojo", "--output=out"], set()),
       ("export", ["--format=onnx"], set()),
       ("inspect", ["no/where"], set()),
       ("vote", ["--checkpoint=no/where", "--output=votes"], set()),
       ("vote", ["--votes=0"], set()),
       ("compare", ["--runs=no/where", "--output=a.md"], set()),
       ("report", [], {"scipy"}),
       ("report", ["--runs=no/where"], {"scipy"}),
       ("launch", ["--config=jaxalign:nabla"], {"scipy"}),
       ("launch", ["--config=jaxalign:nabla_gfn", "--config.bogus=1"], {"scipy", "jax", "optax"}),
       ("launch", ["--config=jaxalign:nabla_gfn", "--config.train.steps=0"],
        {"scipy", "jax", "optax"})]
CHILD = """
import json, runpy, sys, warnings
warnings.simplefilter("ignore")
heavy, bad, found = set(json.loads(sys.argv[1])), json.loads(sys.argv[2]), []
for name, args in bad:
  sys.argv = [name, *args]
  try:
    runpy.run_module(f"jaxalign.{name}", run_name="__main__", alter_sys=True)
  except SystemExit as end:
    found.append((name, end.code, sorted(heavy & set(sys.modules))))
print(json.dumps(found))
"""


def test_errors_of_the_command_line_come_before_imports(tmp_path):
  """One process for all, the lightest first."""
  done = subprocess.run(
      [sys.executable, "-c", CHILD, json.dumps(sorted(HEAVY)),
       json.dumps([(name, args) for name, args, _ in BAD])],
      capture_output=True, text=True, cwd=tmp_path,
      env={"PYTHONPATH": str(runs.ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stderr
  lines = done.stderr.splitlines()
  assert len(lines) == len(BAD) and all(line.startswith("error: ") for line in lines), done.stderr
  for (name, status, loaded), (_, args, allowed) in zip(
      json.loads(done.stdout.splitlines()[-1]), BAD, strict=True):
    assert status == 2 and set(loaded) <= allowed, (name, args, loaded)
  assert not list(tmp_path.iterdir())
