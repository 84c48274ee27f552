"""`--config=help`, and what somebody may have meant."""
import dataclasses

import pytest

from jaxalign.config import explain, registry
from jaxalign.config.nearest import suggestion
from jaxalign.config.recipes import default, parse
from jaxalign.config.schema import GROUPS
from jaxalign.errors import UserError

KNOWN = ["optim.lr", "optim.warmup", "model.lora_rank", "train.steps", "sample.steps", "seed"]


@pytest.mark.parametrize("typed, meant", [
    ("optim.lrr", "optim.lr"), ("lr", "optim.lr"), ("train.lr", "optim.lr"),
    ("model.lorarank", "model.lora_rank"), ("sample.stps", "sample.steps"), ("sed", "seed"),
    ("optim.warm_up", "optim.warmup")])
def test_the_nearest_key(typed, meant):
  assert suggestion(typed, KNOWN) == f"; did you mean {meant!r}?"


def test_nothing_near():
  assert suggestion("xyzzy.quux", KNOWN) == ""


def test_an_unknown_key_of_a_file_suggests_one():
  config = default("ddpo").to_dict()
  config["train"]["stepz"] = 3
  with pytest.raises(UserError, match="train.stepz is unknown; did you mean 'train.steps'?"):
    parse(config)


@pytest.mark.parametrize("name", [*GROUPS, *registry.own_methods()])
def test_every_key_is_explained(name):
  cls = GROUPS.get(name) or registry.load_method(name).Config
  texts = explain.explanations(cls)
  keys = {field.name for field in dataclasses.fields(cls)}
  assert {key for key in keys if texts.get(key)} == keys


def test_help_has_every_key_with_value_type_and_what_differs():
  text = explain.explain("draft")
  lines = text.splitlines()
  config = default("draft")
  for group in ("method", *GROUPS):
    for key in config[group]:
      if (group, key) != ("method", "name"):
        assert sum(line.startswith(f"{group}.{key} = ") for line in lines) == 1, (group, key)
  at = lines.index("optim.lr = 0.0005   number from 0   (default 0.0003)")
  assert lines[at + 1].startswith("    AdamW learning rate")
  assert "train.alarm = 'warn'   one of 'off', 'warn', 'stop', 'rollback'" in lines
  assert ("reward.names = ('soft_style_3d',)   several, each: text   (default ('scene_clip',))"
          in lines)
  assert "eval.path_kl = True   True or False" in lines
  assert max(map(len, lines)) < 260
  for name in ("no_such", "pretrain_emoji"):
    with pytest.raises(UserError, match=name):
      explain.explain(name)


@pytest.mark.parametrize("argv, asked", [
    (["launch", "--config=help"], ""), (["launch", "--config=help:mapo:sd15"], "mapo:sd15"),
    (["launch", "--config=helpful.py"], None), (["launch"], None)])
def test_who_asks(argv, asked):
  assert explain.wanted(argv) == asked


def test_methods_for_rewards_without_gradients():
  names = registry.methods_for_any_reward()
  assert {"ddpo", "best_of_n"} <= set(names) and not {"nabla_gfn", "mapo", "draft"} & set(names)
