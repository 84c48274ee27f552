"""`--plan`: programs compiled from shapes, for machines that are not here."""
import importlib.util

import jax
import numpy as np
import pytest
import runs

from jaxalign.errors import UserError
from jaxalign.train import plan
from jaxalign.train.experiment import open_pipeline

HLO = """
HloModule m

%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %all-reduce.3 = f32[8,4]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %all-reduce.3)
}

ENTRY %main (a: f32[8,4]) -> f32[16,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %w = (s32[], f32[8,4]{1,0}) while(%init), body=%body.1, config={"known_trip_count":{"n":"5"}}
  %g = bf16[16,4]{1,0} get-tuple-element(%w), index=1
  ROOT %all-gather.1 = bf16[16,4]{1,0} all-gather(%g), dimensions={0}
}
"""


CHIP = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1, 1),
                         ("data", "fsdp", "tensor"))


def test_collectives_in_loops_count_as_often_as_they_run():
  assert plan.shape_bytes("(f32[2,3]{1,0}, bf16[4], pred[])") == 24 + 8 + 1
  assert plan.collective_bytes(HLO) == 5 * 8 * 4 * 4 + 16 * 4 * 2


def test_bytes_per_chip_follow_the_sharding():
  place = jax.sharding.NamedSharding(CHIP, jax.sharding.PartitionSpec("fsdp"))
  tree = {"a": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=place),
          "b": jax.ShapeDtypeStruct((2,), np.int8, sharding=place)}
  assert plan.held(tree) == 8 * 4 * 4 + 2


def test_gpu_of_a_given_size():
  text = plan.plan(runs.smoke(), "gpu:80")
  assert "mesh {'data': 1" in text and "Fits, with 74." in text
  rows = {line.split()[0]: line.split() for line in text.splitlines()
          if line.startswith(("collect", "update"))}
  assert rows.keys() == {"collect", "update"}
  assert all(float(row[6]) > 0 for row in rows.values())         # GFLOP


def need(arguments, temporary):
  return plan.Need(arguments=arguments, outputs=0, temporary=temporary, code=0, flops=1e12,
                   traffic=1e9, collective=0.0, seconds=1.0)


@pytest.mark.parametrize("changes, arguments, temporary, words", [
    ({}, 4, 8, "Fits, with 4.00 GiB"),
    ({}, 4, 80, "model.remat=block"),
    ({"model__remat": "block"}, 4, 24, "micro-batches of 3 samples"),
    ({"model__remat": "block"}, 4, 400, "Not even one sample"),
    ({}, 15.5, 8, "config.model.adapter=lora")])
def test_advice(changes, arguments, temporary, words):
  cfg = runs.smoke(**changes)
  exp = type("Exp", (), {"mesh": CHIP})
  needs = {"update": need(arguments * plan.GIB, temporary * plan.GIB)}
  assert words in " ".join(plan.advice(cfg, plan.CHIPS["v5e"], exp, needs))


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


@pytest.mark.parametrize("target", ["v5e", "v9:2x2", "gpu:", "gpu:big", "v5e:4by4"])
def test_targets_that_do_not_exist(target):
  with pytest.raises(UserError, match="--plan=" + target):
    plan.find_chips(target)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_tpu_slice():
  text = plan.plan(runs.smoke(mesh__data=-1), "v5e:2x2")
  assert "mesh {'data': 4, 'fsdp': 1, 'tensor': 1}" in text
  assert "Fits" in text and "roofline" in text
