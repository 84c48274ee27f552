"""`--plan`: programs compiled from shapes, for machines that are not here."""
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from jaxalign.config.recipes import load_recipe, parse
from jaxalign.data.prompts import read_prompts
from jaxalign.errors import UserError
from jaxalign.train import plan
from jaxalign.train.experiment import build
from jaxalign.train.opening import open_pipeline

HLO = """
HloModule m

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce.3 = f32[8,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %all-reduce.3)
}

%cond.1 (q: (s32[], f32[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[16,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%init), condition=%cond.1, body=%body.1NOTED
  %g = bf16[16,4]{1,0} get-tuple-element(%w), index=1
  ROOT %all-gather.1 = bf16[16,4]{1,0} all-gather(%g), dimensions={0}
}
"""


CHIP = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1),
                         ("data", "fsdp", "tensor"))


@pytest.mark.parametrize("noted, times", [
    ("", 5), (', backend_config={"known_trip_count":{"n":"7"}}', 7)])
def test_collectives_in_loops_count_as_often_as_they_run(noted, times):
  assert plan.shape_bytes("(f32[2,3]{1,0}, bf16[4], pred[])") == 24 + 8 + 1
  found = plan.collective_bytes(HLO.replace("NOTED", noted))
  assert found == times * 8 * 4 * 4 + 16 * 4 * 2


def test_operations_in_loops_count_as_often_as_they_run():
  x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
  matrix = jnp.zeros((4, 4))

  def function(x, kernel, matrix):
    x = jax.jit(lambda x: nn.Conv(5, (3, 3)).apply({"params": {
        "kernel": kernel, "bias": jnp.zeros(5)}}, x))(x)
    body = lambda m, _: (jax.checkpoint(lambda m: jnp.sin(m @ matrix))(m), None)
    return x.sum() + jax.lax.scan(body, matrix, None, length=10)[0].sum()
  convolution, product = 2 * (2 * 8 * 8 * 5) * 27, 2 * 4 ** 3
  jaxpr = jax.make_jaxpr(function)(x, kernel, matrix).jaxpr
  assert plan.operations(jaxpr) == convolution + 10 * product


@pytest.mark.parametrize("name, tflop", [("sd15", 0.803), ("sdxl", 6.761)])
def test_forward_pass_of_a_unet(name, tflop):
  """Budgets counted with torch's flop counter on diffusers' own models, one image."""
  unet = open_pipeline(f"jaxalign:{name}", shapes_only=True).denoiser
  x, t, text, added = jax.eval_shape(unet.example_inputs)
  text = jax.ShapeDtypeStruct((1, 77, text.shape[-1]), text.dtype)
  params = jax.eval_shape(unet.init, jax.random.key(0), x, t, text, added)
  found = plan.operations(jax.make_jaxpr(unet.apply)(params, x, t, text, added).jaxpr)
  assert found == pytest.approx(tflop * 1e12, rel=0.02)


def test_bytes_per_chip_follow_the_sharding():
  place = jax.sharding.NamedSharding(CHIP, jax.sharding.PartitionSpec("fsdp"))
  tree = {"a": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=place),
          "b": jax.ShapeDtypeStruct((2,), np.int8, sharding=place)}
  assert plan.held(tree) == 8 * 4 * 4 + 2


@pytest.mark.slow
def test_gpu_of_a_given_size():
  text = plan.plan(runs.smoke(), "gpu:80")
  assert "mesh {'data': 1" in text and "Fits, with 74." in text
  rows = {line.split()[0]: line.split() for line in text.splitlines()
          if line.startswith(("collect", "update"))}
  assert rows.keys() == {"collect", "update"}
  assert all(float(row[6]) > 0 for row in rows.values())         # GFLOP


def outline(recipe, **overrides):
  config = load_recipe(f"jaxalign:{recipe}")
  for path, value in overrides.items():
    group, _, key = path.partition("__")
    config[group][key] = value
  cfg = parse(config)
  return build(cfg, jax.devices()[:1], open_pipeline(cfg.model.path, shapes_only=True))


def test_a_teacher_is_planned_from_shapes():
  exp = outline("diff_instruct_star:emoji")
  assert exp.config.model.teacher
  leaves = jax.tree.leaves(exp.frozen["teacher"])
  assert leaves and all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
  with pytest.raises(UserError, match="model.teacher=jaxalign:sd15: .* another architecture"):
    outline("diff_instruct_star:emoji", model__teacher="jaxalign:sd15")


def test_rewards_are_planned_on_prompts_that_they_take():
  exp = outline("ddpo:emoji")
  prompts = read_prompts("data.prompts", exp.config.data.prompts)
  table = plan.table_shapes(exp, prompts)
  assert table["prepared"]["scene/first"].shape[0] == len(prompts)
  assert table["cond"]["text"].shape[0] == len(prompts)
  with pytest.raises(UserError, match="no scene of the embedded world"):
    plan.table_shapes(exp, ["a cat"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["diff_instruct_star:emoji", "ddpo:emoji"])
def test_recipes_that_need_more_than_weights(recipe):
  assert "Fits" in plan.plan(parse(load_recipe(f"jaxalign:{recipe}")), "gpu:80")


def need(arguments, temporary):
  return plan.Need(arguments=arguments, outputs=0, temporary=temporary, code=0, flops=1e12,
                   traffic=1e9, collective=0.0, seconds=1.0)


@pytest.mark.parametrize("changes, arguments, temporary, words", [
    ({}, 4, 8, "Fits, with 4.00 GiB"),
    ({}, 4, 80, "model.remat=block"),
    ({"model__remat": "block", "method__serial": True}, 4, 24, "config.optim.accumulate"),
    ({"model__remat": "block", "method__serial": True, "optim__accumulate": 8}, 4, 24,
     "Not even one sample"),
    ({"model__remat": "block", "method__serial": False}, 4, 24, "config.method.serial=True"),
    ({}, 15.5, 8, "config.model.adapter=lora")])
def test_advice(changes, arguments, temporary, words):
  cfg = runs.smoke(**changes)
  exp = type("Exp", (), {"mesh": CHIP})
  needs = {"update": need(arguments * plan.GIB, temporary * plan.GIB)}
  assert words in " ".join(plan.advice(cfg, plan.CHIPS["v5e"], exp, needs))


@pytest.mark.parametrize("changes, temporary, accumulate", [
    ({"model__remat": "block"}, 24, 4),        # room for 3 of 8 samples: micro-batches of 2
    ({"model__remat": "block"}, 400, 8), ({"model__remat": "block"}, 8, None), ({}, 24, None),
    ({"model__remat": "block", "optim__accumulate": 8}, 24, None)])
def test_micro_batches_that_seem_to_fit(changes, temporary, accumulate):
  exp = type("Exp", (), {"mesh": CHIP})
  needs = {"update": need(4 * plan.GIB, temporary * plan.GIB)}
  found = plan.with_micro_batches(runs.smoke(**changes), plan.CHIPS["v5e"], exp, needs)
  assert (found and found.optim.accumulate) == accumulate


@pytest.mark.parametrize("name, counts", [
    ("sd15", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
    ("sdxl", {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480,
              "text_encoder_2": 694_659_840})])
def test_architectures_have_the_published_sizes(name, counts):
  pipeline = open_pipeline(f"jaxalign:{name}", shapes_only=True)
  assert {network: sum(leaf.size for leaf in jax.tree.leaves(tree))
          for network, tree in pipeline.params.items()} == counts
  with pytest.raises(UserError, match=f"model.path=jaxalign:{name}"):
    open_pipeline(f"jaxalign:{name}")


def test_a_program_that_the_compiler_refuses_does_not_fit():
  message = ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
             "temporaries (17.77G) exceeds available HBM (15.75G).")
  found = plan.refused(message, plan.GIB, 1e12, 3.0)
  assert found.bytes == pytest.approx(18.77 * plan.GIB)
  assert np.isnan(found.roofline(plan.CHIPS["v5e"]))
  with pytest.raises(UserError, match="--plan: the compiler refused"):
    plan.refused("INTERNAL: something else", 0, 0.0, 0.0)


@pytest.mark.parametrize("target", ["v5e", "v9:2x2", "gpu:", "gpu:big", "v5e:4by4"])
def test_targets_that_do_not_exist(target):
  with pytest.raises(UserError, match="--plan=" + target):
    plan.find_chips(target)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.slow
def test_the_main_job_on_a_tpu_slice():
  text = plan.plan(parse(load_recipe("jaxalign:nabla_gfn:emoji")), "v5e:2x2")
  assert "nabla_gfn:emoji on v5e:2x2: mesh {'data': 4, 'fsdp': 1, 'tensor': 1}" in text
  assert "Fits" in text and "least effort" in text
  rows = {line.split()[0]: line.split() for line in text.splitlines()
          if line.startswith(("collect", "update"))}
  assert rows.keys() == {"collect", "update"}
  assert all(float(row[6]) > 0 and float(row[8]) > 0 for row in rows.values())  # GFLOP, roofline
