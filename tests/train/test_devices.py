"""One device or eight: the same noise, the same first step, parameters where the table says."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

import runs
from jaxalign import methods
from jaxalign.data.prompts import draw_prompts
from jaxalign.devices import rng
from jaxalign.devices.sharding import batch_shards, param_shardings, path_of
from jaxalign.train.experiment import build
from jaxalign.train.programs import Programs

MESHES = {"1": dict(mesh__data=1), "8": dict(mesh__data=8),
          "2x2x2": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2)}
STEPS = 3


def programs(mesh, **overrides):
  # The strongest reward gradient there is: beside it, rounding is small (see below).
  cfg = runs.smoke(**MESHES[mesh], method__gamma="one", method__x0_net="theta", **overrides)
  exp = build(cfg)
  # What brightness spreads by on this model. With less reward the gradient is mostly rounding:
  # the difference between noise estimates of the two programs, rollout and update.
  models = dataclasses.replace(exp.models, reward_std=0.006)
  method = methods.make(cfg.method_name, models, cfg.method, cfg.optim)
  prompts = runs.TRAIN.read_text().splitlines()
  steps = Programs(exp, method, exp.prompt_table(prompts), jax.random.key(cfg.seed))
  return exp, method, steps, prompts


@functools.cache
def trained(mesh):
  """Noise, losses and first moments of a few steps."""
  exp, _, steps, prompts = programs(mesh)
  state = steps.init()
  steps.compile(state)
  out = {"losses": [], "rewards": [], "kl": []}
  for step in range(STEPS):
    ids = draw_prompts(0, step, len(prompts), exp.config.sample.batch)
    experience, _, rewards = steps.collect(state, step, ids, prompts)
    assert experience["latents"].sharding.spec[0] == ("data", "fsdp")
    shards = {s.data.shape[0] for s in experience["latents"].addressable_shards}
    assert shards == {exp.config.sample.batch // batch_shards(exp.mesh)}
    if step == 0:
      out["noise"] = jax.device_get(experience["latents"][:, 0])
      out["latents"] = jax.device_get(experience["latents"])
    before = jax.tree.map(lambda a: a.sharding, state)
    state, values = steps.update(state, experience, rewards, step)
    assert jax.tree.map(lambda a: a.sharding, state) == before
    if step == 0:
      # The first moment of Adam is (1 - b1) times the gradient, which is too small to be clipped.
      assert values["train/grad_norm"] < exp.config.optim.clip_norm
      out["gradient"] = {
          path_of(p): np.asarray(leaf) / (1 - exp.config.optim.b1)
          for p, leaf in jax.tree_util.tree_leaves_with_path(state["optimizer"])
          if "/mu/" in path_of(p)}
    out["losses"].append(float(values["loss/total"]))
    out["rewards"].append(float(rewards.mean()))
    out["kl"].append(float(values["train/path_kl"]))
  out["policy"] = jax.device_get(state["trainable"]["policy"])
  return out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8", "2x2x2"])
def test_same_as_on_one_device(mesh):
  one, many = trained("1"), trained(mesh)
  assert one["noise"].tobytes() == many["noise"].tobytes()
  np.testing.assert_allclose(many["latents"], one["latents"], atol=1e-4)
  assert many["losses"][0] == pytest.approx(one["losses"][0], rel=1e-5)
  flat = lambda run: np.concatenate([g.ravel() for _, g in sorted(run["gradient"].items())])
  assert one["gradient"].keys() == many["gradient"].keys() and flat(one).any()
  error = np.linalg.norm(flat(many) - flat(one)) / np.linalg.norm(flat(one))
  assert error < 1e-5, error
  # Later steps: Adam's first steps are sign-like, so rounding in a gradient near zero is not small
  # in the parameters; losses and rewards stay close.
  np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
  np.testing.assert_allclose(many["rewards"], one["rewards"], rtol=1e-5)
  np.testing.assert_allclose(many["kl"], one["kl"], rtol=1e-3)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_parameters_lie_where_the_table_says(adapter):
  exp, method, steps, _ = programs("2x2x2", model__adapter=adapter, optim__ema=0.9,
                                   method__replay_lag=1)
  state = steps.init()
  for tree in (exp.frozen["base"], exp.frozen["decoder"]):
    for leaf, sharding in zip(*map(jax.tree.leaves, (tree, param_shardings(tree, exp.mesh)))):
      assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
  held = lambda leaf: leaf.addressable_shards[0].data.size / leaf.size
  leaves = jax.tree_util.tree_leaves_with_path
  base = {path_of(p): held(leaf) for p, leaf in leaves(exp.frozen["base"]["params"])}
  kernel = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_q/kernel"
  assert base[kernel] == 1 / 4                                  # fsdp x tensor
  assert base["down_blocks_0/resnets_0/conv1/kernel"] == 1 / 2  # fsdp
  assert base["conv_norm_out/scale"] == 1
  seen = 0
  for p, leaf in leaves(state):
    path = path_of(p)
    if path.startswith("replay/"):
      assert leaf.sharding.spec[0] == ("data", "fsdp")
    elif adapter == "full" and path.endswith(kernel):
      assert held(leaf) == 1 / 4, path                          # policy, average, both moments
      seen += 1
    elif adapter == "lora":
      assert leaf.sharding.is_fully_replicated, path
  assert seen == (4 if adapter == "full" else 0)
  assert jax.tree.structure(method.product(state)) == jax.tree.structure(
      exp.models.init_policy(rng.stream(jax.random.key(0), rng.INIT), exp.frozen))


@pytest.mark.slow
def test_whole_run_on_eight_devices():
  """The loop with `mesh.data=-1`, as the recipe has it.

  The first loss is a mean square r^2 of two noise estimates' difference plus a value gradient. The
  estimates, of size 1, are equal in exact numbers, but one row a device is summed in another order:
  f32 rounding in r is worth 2 eps / r of the loss.
  """
  path = runs.run("eight", jax.devices(), mesh__data=-1)
  lines, plain = runs.metrics(path), runs.metrics(runs.finished())
  expected = plain[0]["loss/total"]
  rounding = 2 * np.finfo(np.float32).eps / np.sqrt(expected)
  assert lines[0]["loss/total"] == pytest.approx(expected, rel=1e-5 + rounding)
  assert lines[-1]["train/reward"] == pytest.approx(plain[-1]["train/reward"], rel=1e-5)
