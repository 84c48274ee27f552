"""Configs: golden dumps of recipes, strict keys and types, ranges, batch algebra."""
import dataclasses
import json
import os
import pathlib

import ml_collections
import pytest

import runs
from jaxalign import launch
from jaxalign.config import command, recipes, schema
from jaxalign.config.recipes import default, parse, recipe_path, split_argument
from jaxalign.emoji.recipes import MISMATCH
from jaxalign.errors import UserError
from jaxalign.methods.adjoint_matching import PRESETS as ADJOINT_PRESETS
from jaxalign.methods.awm import PRESETS as AWM_PRESETS
from jaxalign.methods.b2_diffurl import PRESETS as B2_PRESETS
from jaxalign.methods.das import PRESETS as DAS_PRESETS
from jaxalign.methods.diff_instruct_star import PRESETS as DI_PRESETS
from jaxalign.methods.dno import PRESETS as DNO_PRESETS
from jaxalign.methods.dpok import PRESETS as DPOK_PRESETS
from jaxalign.methods.draft import PRESETS as DRAFT_PRESETS
from jaxalign.methods.fk_steering import PRESETS as FK_PRESETS
from jaxalign.methods.flow_grpo import PRESETS as FLOW_GRPO_PRESETS
from jaxalign.methods.mapo import PRESETS as MAPO_PRESETS
from jaxalign.methods.nabla_gfn import PRESETS
from jaxalign.methods.nft import PRESETS as NFT_PRESETS
from jaxalign.methods.svdd import PRESETS as SVDD_PRESETS
from jaxalign.train.restore import run_config
from jaxalign.train.workdir import Workdir

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "configs"
REFRESH = os.environ.get("JAXALIGN_REFRESH_GOLDEN") == "1"
THIRTEEN = ("alignprop", "b2_diffurl", "best_of_n", "ddpo", "diff_instruct_pp",
            "diff_instruct_star", "diffusion_dpo", "dno", "draft", "mapo", "nabla_gfn", "refl",
            "sft")
# Recipes of all sizes, with their presets on the largest.
OTHERS = {"adjoint_matching": ADJOINT_PRESETS, "awm": AWM_PRESETS, "das": DAS_PRESETS,
          "dpok": DPOK_PRESETS, "fk_steering": FK_PRESETS, "flow_grpo": FLOW_GRPO_PRESETS,
          "nft": NFT_PRESETS, "ram": {}, "svdd": SVDD_PRESETS}
RECIPES = [
  *(f"nabla_gfn:{size}" for size in ("emoji", "quick", "smoke", "sd15", "sdxl")),
  *(f"nabla_gfn:smoke,{name}" for name in PRESETS),
  "ddpo:emoji", "ddpo:style", "ddpo:smoke", "ddpo:sd15", "ddpo:sdxl", "draft:sdxl",
  "b2_diffurl:emoji", "b2_diffurl:smoke", "b2_diffurl:sd15",
  *(f"b2_diffurl:emoji,{name}" for name in B2_PRESETS),
  *(f"{name}:{size}" for name in ("refl", "draft", "alignprop")
    for size in ("emoji", "smoke", "sd15")),
  *(f"draft:smoke,{name}" for name in DRAFT_PRESETS),
  *(f"{name}:{size}" for name in ("dno", "best_of_n") for size in ("emoji", "smoke", "sd15",
                                                                   "sdxl")),
  *(f"dno:sd15,{name}" for name in DNO_PRESETS),
  *(f"{name}:{size}" for name in ("mapo", "diffusion_dpo", "sft")
    for size in ("emoji", "smoke", "sd15", "sdxl")),
  *(f"mapo:emoji,{name}" for name in MAPO_PRESETS),
  *(f"{name}:{size}" for name in ("mapo", "diffusion_dpo", "sft") for size in MISMATCH),
  *(f"{name}:{size}" for name in ("diff_instruct_star", "diff_instruct_pp")
    for size in ("emoji", "smoke", "sdxl")),
  *(f"diff_instruct_star:emoji,{name}" for name in DI_PRESETS),
  *(f"{name}:{size}" for name in THIRTEEN for size in ("sd35", "smoke_sd3")),
  *(f"{name}:signs" for name in ("adjoint_matching", "awm", "b2_diffurl", "ddpo", "draft",
                                 "flow_grpo", "nabla_gfn", "nft")),
  *(f"{name}:emoji_sd3" for name in (*THIRTEEN, *OTHERS) if not name.startswith("diff_instruct")),
  *(f"{name}:{size}" for name in OTHERS
    for size in ("emoji", "smoke", "smoke_sd3", "sd15", "sd35")),
  *(f"{name}:sd35,{preset}" for name, presets in OTHERS.items() for preset in presets),
  "distill_emoji_onestep:emoji", "distill_emoji_onestep:smoke"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_golden_dump(recipe):
  """Run with JAXALIGN_REFRESH_GOLDEN=1 to write the dumps anew; review them as a diff."""
  name, _, argument = recipe.partition(":")
  config = runs.recipe(argument, name)
  assert config.is_locked
  found = parse(config).to_dict()
  assert found["recipe"] == recipe
  file = GOLDEN / f"{recipe.replace(':', '-').replace(',', '-')}.json"
  if REFRESH:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
  assert json.loads(file.read_text()) == found
  assert parse(found) == parse(config)              # config.json reads back to the same


@pytest.mark.parametrize("name", ["nabla_gfn", "ddpo", "b2_diffurl"])
def test_no_argument_is_the_embedded_model(name):
  assert parse(runs.recipe("", name)) == parse(runs.recipe("emoji", name))


def test_every_recipe_file_gives_a_locked_config():
  for file in (runs.ROOT / "configs").glob("[a-z]*.py"):
    assert runs.recipe("smoke", file.stem).is_locked


def test_presets_change_the_method_only():
  smoke, release = (parse(runs.recipe(a)) for a in ("smoke", "smoke,release"))
  assert release.method.optimizer_repeats == 2 and not release.method.flow_target_stopgrad
  assert release.method.strata == smoke.method.strata == 2        # the size has the last word
  assert dataclasses.replace(release, method=smoke.method, recipe=smoke.recipe) == smoke
  with pytest.raises(UserError, match="'relase' is unknown; there are emoji, .*, sd35, paper"):
    runs.recipe("smoke,relase")


@pytest.mark.parametrize("preset", ["", *PRESETS])
def test_the_published_fast_setting_of_nabla_gfn(preset):
  """32 trajectories and one optimiser step of all of them, whatever the preset; AdamW as there."""
  config = parse(runs.recipe(f"sd15,{preset}"))
  assert (config.sample.batch, config.method.minibatches, config.method.strata) == (
      32, 1, 10 if preset == "final_latent" else 5)
  assert (config.optim.b1, config.optim.b2, config.optim.lr) == (0.9, 0.999, 1e-3)
  published = preset in ("paper", "release", "no_flow")
  assert config.method.gamma_at_output == published


def test_what_the_published_b2_code_computes():
  """Five branches, uniform steps, and a clip range for the size of the emoji model's latents."""
  published, default = (parse(runs.recipe(a, "b2_diffurl")) for a in ("emoji,b2_code", "emoji"))
  assert (published.method.group, published.method.step_weights) == (5, "uniform")
  assert published.sample.batch == 160 and published.method.clip_range == 0.1 * 16
  assert default.method.step_weights == "even" and default.method.clip_range == 1e-4 * 16
  assert parse(runs.recipe("emoji,b2_paper", "b2_diffurl")).method == default.method
  assert parse(runs.recipe("smoke,b2_code", "b2_diffurl")).method.group == 4
  assert parse(runs.recipe("sd15,b2_code", "b2_diffurl")).method.history == 64


def test_split_argument():
  assert split_argument("", ("emoji", "smoke")) == ("emoji", [])
  assert split_argument("p,smoke", ("emoji", "smoke"), ("p", "q")) == ("smoke", ["p"])


def test_locked():
  config = default("nabla_gfn")
  for set_it in (lambda: setattr(config, "lr", 1.0), lambda: setattr(config.optim, "rl", 1.0)):
    with pytest.raises(AttributeError):
      set_it()


def test_parse_takes_numbers_as_they_are_written():
  config = default("nabla_gfn").unlock()
  config.sample.guidance = 2
  config.reward.names, config.reward.weights = ["brightness"], [1]
  parsed = parse(config)
  assert type(parsed.sample.guidance) is float
  assert parsed.reward == schema.RewardConfig(("brightness",), (1.0,))


def changed(path, value):
  """The default config as nested dicts with one key set, or deleted."""
  tree = default("nabla_gfn").to_dict()
  *groups, key = path.split(".")
  inner = tree
  for group in groups:
    inner = inner[group]
  if value is None:
    del inner[key]
  else:
    inner[key] = value
  return tree


@pytest.mark.parametrize("path, value, message", [
    ("trian", {}, "config key trian is unknown"),
    ("train.stpes", 3, r"train\.stpes is unknown; did you mean 'train\.steps'\?; "),
    ("method.betta", 3.0, r"method\.betta is unknown"),
    ("train", None, "config key train is missing"),
    ("train.steps", None, r"train\.steps is missing"),
    ("method.beta", None, r"method\.beta is missing"),
    ("train.steps", 3.0, r"train\.steps=3\.0 is of type float, not int"),
    ("train.steps", True, r"train\.steps=True is of type bool, not int"),
    ("train.keep_best", 1, r"train\.keep_best=1 is of type int, not bool"),
    ("optim.lr", "1e-3", r"optim\.lr='1e-3' is of type str, not float"),
    ("seed", "0", "config key seed=.0. is of type str"),
    ("seed", -1, r"seed=-1 is outside \[0, 2\*\*32\)"),
    ("seed", 2 ** 32, r"seed=4294967296 is outside"),
    ("reward.names", ("scene_judge",), r"reward\.names has 'scene_judge', the judge \(eval\.judge"),
    ("reward.names", "brightness", r"reward\.names='brightness' is of type str"),
    ("reward.weights", ("1",), r"reward\.weights\[0\]='1' is of type str, not float"),
    ("reward.names", (), r"reward\.names is empty"),
    ("reward.weights", (1.0, 2.0), r"reward\.weights has 2 values for 1 names"),
    ("method.name", "nabla", r"method\.name='nabla' is unknown; choose one of"),
    ("method.name", None, r"method\.name=None is unknown"),
    ("method.gamma", "two", r"method\.gamma='two' is not one of"),
    ("method.prox", -1.0, r"method\.prox=-1\.0 is below 0"),
    ("method.reverse", "lean", r"method\.reverse='lean' trains the flow net only"),
    ("model.adapter", "dora", r"model\.adapter='dora' is not one of"),
    ("model.dtype", "float16", r"model\.dtype='float16' is not one of"),
    ("model.lora_rank", 0, r"model\.lora_rank=0 is below 1"),
    ("model.lora_targets", (), r"model\.lora_targets is empty"),
    ("model.lora_targets", ("atention",), r"model\.lora_targets\[0\]='atention' is not one of"),
    ("sample.batch", 0, r"sample\.batch=0 is below 1"),
    ("sample.guidance", -1.0, r"sample\.guidance=-1\.0 is below 0"),
    ("train.steps", 10 ** 30, r"train\.steps=10{30} is above 2147483647"),
    ("train.keep", 2 ** 31, r"train\.keep=2147483648 is above"),
    ("eval.samples", 2 ** 31, r"eval\.samples=2147483648 is above"),
    ("mesh.data", 2 ** 31, r"mesh\.data=2147483648 is above"),
    ("sample.height", 10 ** 6, r"sample\.height=1000000 is above 65535"),
    ("train.steps", 0, r"train\.steps=0 is below 1"),
    ("train.max_seconds", -1.0, r"train\.max_seconds=-1\.0 is below 0"),
    ("train.checkpoint_every", 0, r"train\.checkpoint_every=0 is below 1"),
    ("optim.lr", -1.0, r"optim\.lr=-1\.0 is below 0"),
    ("optim.ema", 1.0, r"optim\.ema=1\.0 is outside \[0, 1\)"),
    ("optim.accumulate", 0, r"optim\.accumulate=0 is below 1"),
    ("mesh.data", 0, r"mesh\.data=0 is below 1"),
    ("mesh.fsdp", -1, r"mesh\.fsdp=-1 is below 1"),
    ("eval.samples", 1, r"eval\.samples=1 is below 2"),
    ("log.grid_prompts", 0, r"log\.grid_prompts=0 is below 1"),
    ("data.pairs", "a.jsonl", r"data\.pairs=a\.jsonl: method\.name='nabla_gfn' trains on prompts"),
    ("data.ties", "keep", r"data\.ties='keep' is not one of"),
    ("optim.accumulate", 3, r"sample\.batch=16 does not divide into method\.minibatches"),
])
def test_bad_value_names_its_key(path, value, message):
  with pytest.raises(UserError, match=message):
    parse(changed(path, value))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["optim.lr", "sample.guidance", "method.beta", "train.max_seconds"])
def test_numbers_that_are_not_finite_are_refused(key, value):
  with pytest.raises(UserError, match=f"{key}={value} is not a finite number"):
    parse(changed(key, value))


def test_batch_algebra_over_devices():
  cfg = parse(default("nabla_gfn"))
  for shards in (1, 2, 4, 8):
    cfg.check_devices(shards)                      # the default works on 8 devices
  with pytest.raises(UserError, match=r"sample\.batch=16 does not divide over 3 devices"):
    cfg.check_devices(3)
  uneven = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch=12))
  with pytest.raises(UserError, match=r"eval\.batch=12 does not divide over 8 devices"):
    uneven.check_devices(8)
  parts = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, accumulate=4))
  with pytest.raises(UserError, match=r"sample\.batch=16 in 4 parts .* 4 trajectories for 8 "):
    parts.check_devices(8)


def test_the_judge_may_measure_what_pairs_teach():
  config = default("mapo").unlock()
  config.data.pairs, config.reward.names = "jaxalign:fixture", ("scene_judge",)
  assert parse(config).reward.names == ("scene_judge",)


def test_full_fine_tuning_needs_no_targets():
  config = default("nabla_gfn").unlock()
  config.model.adapter, config.model.lora_targets = "full", ()
  assert parse(config).trains_all


def test_shipped_recipes_by_name():
  path = pathlib.Path(recipe_path("jaxalign:nabla_gfn"))
  assert path.name == "nabla_gfn.py" and path.is_file()
  assert recipe_path("jaxalign:nabla_gfn:smoke,release") == f"{path}:smoke,release"
  assert recipe_path("configs/nabla_gfn.py:smoke") == "configs/nabla_gfn.py:smoke"
  with pytest.raises(UserError, match=r"no recipe 'nabla'; did you mean 'nabla_gfn'\?; there are "):
    recipe_path("jaxalign:nabla")


def test_to_dict_is_plain_json():
  found = parse(ml_collections.FrozenConfigDict(default("nabla_gfn").to_dict()).to_dict()).to_dict()
  assert json.loads(json.dumps(found)) == found
  assert found["method"]["name"] == "nabla_gfn" and isinstance(found["reward"]["names"], list)


def test_a_run_of_an_older_version_is_read_with_defaults(tmp_path):
  """Its config.json lacks a key that came later; with the default of that, it is the same run."""
  cfg = runs.smoke()
  Workdir(tmp_path / "run", cfg).create()
  file = tmp_path / "run" / "config.json"
  content = json.loads(file.read_text())
  assert content["config"]["method"].pop("minibatches") == 1 and content["config"].pop("log")
  file.write_text(json.dumps(content))
  assert run_config(tmp_path / "run").method == cfg.method
  Workdir(tmp_path / "run", cfg)
  (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n')
  with pytest.raises(UserError, match="method.minibatches was 1 and is 2 now"):
    Workdir(tmp_path / "run", runs.smoke(method__minibatches=2))


BROKEN = '''"""A recipe of somebody's own."""
from jaxalign.config import recipes


def get_config(arg=""):
  config = recipes.default("ddpo")
  {line}
  return config
'''


@pytest.mark.parametrize("line, reason", [
    ("config.train.stpes = 3", "AttributeError"), ("config.seed = 1 / 0", "ZeroDivisionError"),
    ("open('none.txt')", "FileNotFoundError"), ("int('x')", "ValueError"),
    ("raise ValueError('two\\nlines')", "ValueError: two"), ("steps = 3 +", "SyntaxError")])
def test_a_recipe_that_fails_is_named_with_its_line(tmp_path, line, reason):
  """By `load_recipe` and on the command line alike."""
  file = tmp_path / "mine.py"
  file.write_text(BROKEN.format(line=line))
  expected = f"recipe {file} failed at line 7: {reason}"
  with pytest.raises(UserError) as error:
    recipes.load_recipe(str(file))
  assert str(error.value).startswith(expected) and "\n" not in str(error.value)
  with pytest.raises(UserError) as error:
    command._parse(["launch", f"--config={file}"], launch._FLAGS, ())
  assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_a_recipe_without_a_config_is_refused(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text("def get_config(arg=''):\n  pass\n")
  with pytest.raises(UserError, match="mine.py: get_config returned NoneType"):
    recipes.load_recipe(str(file))


@pytest.mark.parametrize("folder", ["my.python", "x.py.d", "x.py"])
def test_folders_may_be_called_as_files_are(tmp_path, folder):
  file = tmp_path / folder / "mine.py"
  file.parent.mkdir()
  file.write_text(BROKEN.format(line="config.train.steps = int(arg or 3)"))
  assert recipes.load_recipe(f"{file}:5").train.steps == 5
  command._parse(["launch", f"--config={file}:7"], launch._FLAGS, ())
  assert launch._CONFIG.value.train.steps == 7
  with pytest.raises(UserError, match="no such file"):
    command._parse(["launch", f"--config={file.parent / 'other.py'}"], launch._FLAGS, ())
