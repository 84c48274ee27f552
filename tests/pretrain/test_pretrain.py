"""Pretraining of the embedded world: tasks, loop, resume, figures."""
import inspect
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import worlds
from jaxalign import pretrain
from jaxalign.config.recipes import load_recipe
from jaxalign.convert import load_pipeline
from jaxalign.emoji import latents, quality, reader, scenes, signs, words
from jaxalign.emoji.artwork import STYLES
from jaxalign.emoji.scorers import ASSETS
from jaxalign.errors import UserError
from jaxalign.pretrain import autoencoder, loop, optimizer, scene_denoisers, sign_denoiser
from jaxalign.pretrain.config import parse
from jaxalign.rewards import Reward
from jaxalign.storage.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("drawings")
  np.savez(path / "artwork.npz", **worlds.drawings()._asdict())
  return path


def recipe(name: str, arg: str, folder):
  config = load_recipe(f"{ROOT / 'configs' / name}.py:{arg}")
  if name != "pretrain_signs":
    config.task.artwork = str(folder / "artwork.npz")
  return config


@pytest.fixture(scope="module")
def vae_run(folder):
  return loop.run(parse(recipe("pretrain_emoji_vae", "smoke", folder)), folder / "vae_run")


# --- the loop -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_autoencoder_recipe_writes_one_that_loads(vae_run, folder):
  assert vae_run["steps"] == 3 and 5 < vae_run["figures"]["eval/scenes_db"] < 40
  vae, params, config = autoencoder.read(folder / "vae_run" / "export")
  assert config["latent_channels"] == 16 and vae.factor == 8
  # Pipelines with and without the 1x1 convolutions read the same latents.
  x = jax.random.uniform(jax.random.key(0), (2, 64, 64, 3))
  apply = lambda method, value, tree=params: vae.apply({"params": tree}, value, method=method)
  np.testing.assert_array_equal(params["quant_conv"]["kernel"][0, 0], np.eye(32))
  np.testing.assert_array_equal(params["post_quant_conv"]["kernel"][0, 0], np.eye(16))
  mean, logvar = apply("encode", x)
  assert mean.shape == (2, 8, 8, 16) and apply("decode", mean).shape == (2, 64, 64, 3)
  np.testing.assert_array_equal(logvar, autoencoder.LOG_VARIANCE)
  assert len(list((folder / "vae_run" / "samples").glob("*.png"))) == 2
  lines = [json.loads(line) for line in
           (folder / "vae_run" / "metrics.jsonl").read_text().splitlines()]
  assert [line["step"] for line in lines] == [1, 2, 3]


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(vae_run, folder, tmp_path, monkeypatch):
  config = recipe("pretrain_emoji_vae", "smoke", folder)
  save, count = Checkpointer.save, []

  def killed(self, *args):
    save(self, *args)
    self.wait()
    count.append(1)
    if len(count) == 1:
      raise KeyboardInterrupt
  with monkeypatch.context() as patch:
    patch.setattr(Checkpointer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
      loop.run(parse(config), tmp_path / "run")
  resumed = loop.run(parse(config), tmp_path / "run")
  assert resumed["figures"] == vae_run["figures"]
  weights = [(path / "export" / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
             for path in (tmp_path / "run", folder / "vae_run")]
  assert weights[0] == weights[1]
  assert loop.run(parse(config), tmp_path / "run") == resumed       # finished: nothing is done
  config.optim.lr = 0.5
  with pytest.raises(UserError, match="optim.lr"):
    loop.run(parse(config), tmp_path / "run")


@pytest.mark.slow
def test_a_batch_is_the_same_on_several_devices(folder):
  if len(jax.devices()) < 2:
    pytest.skip("one device")
  cfg = parse(recipe("pretrain_emoji_vae", "smoke", folder))
  runs = [loop.run(cfg, folder / f"devices{n}", jax.devices()[:n]) for n in (1, 2)]
  for key, value in runs[0]["figures"].items():
    np.testing.assert_allclose(runs[1]["figures"][key], value, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name, arg", [("pretrain_emoji", "smoke"), ("pretrain_emoji", "smoke_sd3"),
                                       ("pretrain_signs", "smoke")])
def test_denoiser_recipe_writes_a_model_that_loads(vae_run, folder, name, arg):
  config = recipe(name, arg, folder)
  config.task.vae = str(folder / "vae_run" / "export")
  workdir = folder / f"{name}_{arg}"
  summary = loop.run(parse(config), workdir)
  figure = "exact" if name == "pretrain_signs" else "colour"
  assert 0 <= summary["figures"][f"eval/{figure}"] <= 1
  pipeline = load_pipeline(workdir / "export")
  if (name, arg) == ("pretrain_emoji", "smoke"):
    assert pipeline.denoiser.config.block_out_channels == (32, 32)
    assert pipeline.scheduler_config["prediction_type"] == "v_prediction"
  else:
    assert pipeline.denoiser.config.width == 32
  images = quality.draw(pipeline, ["a cat on a red background"] * 3)
  assert images.shape == (3, 64, 64, 3) and np.isfinite(images).all()
  # Whoever goes on from there begins with what was learnt.
  config.task.init = str(workdir / "export")
  start = pretrain.load(config.task.name).make(parse(config).task).init(jax.random.key(0))
  np.testing.assert_array_equal(jax.tree.leaves(start[pipeline.denoiser_name])[0],
                                jax.tree.leaves(pipeline.weights)[0])


def test_mistakes_name_their_key(folder, tmp_path):
  config = recipe("pretrain_emoji_vae", "smoke", folder)
  config.task.widths = (20, 20, 20, 20)
  with pytest.raises(UserError, match="task.widths"):
    parse(config)
  config = recipe("pretrain_emoji_vae", "smoke", folder)
  config.task.artwork = str(tmp_path / "none.npz")
  with pytest.raises(UserError, match="not a file of drawings"):
    loop.run(parse(config), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  config = recipe("pretrain_emoji", "smoke", folder)
  config.task.vae = str(tmp_path)
  with pytest.raises(UserError, match="task.vae"):
    loop.run(parse(config), tmp_path / "run")
  with pytest.raises(UserError, match="task.name"):
    pretrain.load("emoji_gan")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path):
  config = recipe("pretrain_emoji_vae", "smoke", folder)
  config.optim.lr, config.optim.clip_norm = 1e30, 0.0
  with pytest.raises(UserError, match="not finite"):
    loop.run(parse(config), tmp_path / "run")


# --- losses -------------------------------------------------------------------------------------


def test_reconstruction_loss():
  x = np.zeros((1, 4, 4, 3), np.float32)
  loss = autoencoder.reconstruction_loss
  np.testing.assert_allclose(loss(x, x + 0.5, 1.0, 0.0), 0.5)                 # no edge
  y = x.copy()
  y[:, :, 2:] = 1.0                          # one edge of four columns: a third of the differences
  np.testing.assert_allclose(loss(x, y, 1.0, 0.0), 0.5 + 1 / 3, rtol=1e-6)
  np.testing.assert_allclose(loss(x, y, 0.0, 0.5), 0.5 + 0.25, rtol=1e-6)
  np.testing.assert_allclose(autoencoder.decibel(x, y * 0.1), -10 * np.log10(0.005), rtol=1e-5)


def test_autoencoder_learns_drawings_and_signs(folder):
  task = autoencoder.make(autoencoder.Config(
      artwork=str(folder / "artwork.npz"), widths=(8, 8, 8, 8), batch=20, encoded=5))
  batch = jax.jit(task.draw)(task.tables, jax.random.key(0))
  fixed = latents.load()
  images = batch["x"] / 2 + 0.5
  np.testing.assert_allclose(fixed.encode(images), batch["z"], atol=1e-4)
  noise = np.asarray(batch["noisy"] - batch["z"]).std((1, 2, 3))
  assert 3 <= (noise > 0.01).sum() <= 17 and noise.max() < 0.2
  # A fifth is signs: two colours, and what lies between them.
  flat = np.asarray(images).reshape(20, -1, 3)
  assert sum(np.linalg.matrix_rank(rows - rows[0], tol=1e-3) <= 1 for rows in flat) == 4


def test_muon_moves_hidden_kernels_and_adam_the_rest():
  params = {"block": {"conv1": {"kernel": jnp.ones((3, 3, 4, 8)), "bias": jnp.ones(8)}},
            "conv_out": {"kernel": jnp.ones((3, 3, 8, 3))}, "norm": {"scale": jnp.ones(4)}}
  cfg = optimizer.OptimConfig(lr=1e-3, muon=1e-2, clip_norm=0.0)
  rule = optimizer.make_optimizer(cfg)
  grads = jax.tree.map(lambda a: jax.random.normal(jax.random.key(0), a.shape), params)
  updates, _ = rule.update(grads, rule.init(params), params)
  hidden = np.asarray(updates["block"]["conv1"]["kernel"]).reshape(36, 8)
  spread = np.linalg.svd(hidden, compute_uv=False)
  assert spread.max() / spread.min() < 2                  # all directions alike
  np.testing.assert_allclose(np.sqrt(np.square(hidden).mean()), 0.2 * 1e-2, rtol=0.2)
  for leaf in (updates["conv_out"]["kernel"], updates["norm"]["scale"],
               updates["block"]["conv1"]["bias"]):
    np.testing.assert_allclose(np.abs(leaf), 1e-3, rtol=1e-3)             # Adam's first step


def test_muon_is_that_of_optax():
  """In float64, where a rounding does not grow; what is left is that ours corrects in float32."""
  if "consistent_rms" not in inspect.signature(contrib.muon).parameters:
    pytest.skip("optax's Muon has no consistent_rms yet")
  with jax.enable_x64(True):
    key = jax.random.key(0)
    shapes = {"conv": (3, 3, 4, 8), "tall": (40, 8), "wide": (8, 16), "square": (8, 8),
              "other": (8, 8)}
    params = {name: {"kernel": jax.random.normal(jax.random.fold_in(key, i), shape)}
              for i, (name, shape) in enumerate(shapes.items())}
    cfg = optimizer.OptimConfig(lr=1.0, muon=1e-2, clip_norm=0.0, weight_decay=0.1)
    matrix = lambda a: contrib.MuonDimensionNumbers(tuple(range(a.ndim - 1)), a.ndim - 1)
    theirs = contrib.muon(
        optax.constant_schedule(1e-2), weight_decay=0.1, consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: jax.tree.map(matrix, tree))
    ours, state = optimizer.make_optimizer(cfg), theirs.init(params)
    inner = lambda state: state[1].inner_states["muon"].inner_state
    mine = ours.init(params)
    chex.assert_trees_all_equal_structs(inner(mine), state)        # checkpoints of either
    ours_update, theirs_update = jax.jit(ours.update), jax.jit(theirs.update)
    for step in range(3):                                          # of the momentum's correction
      grads = jax.tree.map(
          lambda a: jax.random.normal(jax.random.fold_in(key, step), a.shape), params)
      (a, mine), (b, state) = ours_update(grads, mine, params), theirs_update(grads, state, params)
      for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-7 * float(jnp.abs(y).max()))


@pytest.fixture(scope="module", params=["unet", "transformer"])
def scene_task(vae_run, folder, request):
  size = {"unet": {"widths": (32,), "text_layers": 1},
          "transformer": {"width": 32, "layers": 2, "text_layers": 2}}[request.param]
  kind = {"unet": scene_denoisers.UNetConfig,
          "transformer": scene_denoisers.TransformerConfig}[request.param]
  return scene_denoisers.make(kind(
      artwork=str(folder / "artwork.npz"), vae=str(folder / "vae_run" / "export"), subjects=4,
      text_width=32, batch=64, caption_dropout=0.5, **size))


def test_captions_in_two_parts_are_those_of_the_tokenizer():
  table = scenes.table(worlds.NAMES, np.ones((4, 12), bool), lambda scene: True)
  tokenizer = words.tokenizer()
  captions = scene_denoisers.Captions.of(table, worlds.NAMES, tokenizer)
  row = np.arange(len(table.first))
  colour, style = row % 12, row % 4
  tokens = captions.tokens(row, colour, style, tokenizer.bos_id, tokenizer.length)
  expected = tokenizer([scenes.caption(table.scene(r, c, worlds.NAMES, (*STYLES, "")[s]))
                        for r, c, s in zip(row, colour, style)])
  np.testing.assert_array_equal(tokens, expected)


@pytest.mark.slow
def test_denoiser_learns_only_what_is_not_held_out(scene_task):
  batch = jax.jit(scene_task.draw)(scene_task.tables, jax.random.key(0))
  tokens = np.asarray(batch["tokens"])
  table, tokenizer = scene_task.tables["scenes"], words.tokenizer()
  empty = (tokens == tokenizer([""])).all(1)
  assert 16 < empty.sum() < 48
  allowed = {row.tobytes() for r in range(len(table.first)) for row in tokenizer([
      scenes.caption(table.scene(r, c, worlds.NAMES, style))
      for c in np.flatnonzero(table.colours[r]) for style in (*STYLES, "")])}
  assert {row.tobytes() for row in tokens[~empty]} <= allowed
  np.testing.assert_array_equal(np.diff(np.sort(batch["t"])) >= 0, True)
  # A network that predicts nothing at first has the velocity's size as its loss.
  params = scene_task.init(jax.random.key(1))
  # A flow's times are logit-normal: 64 quantiles end at about 80 and 920.
  assert np.ptp(np.asarray(batch["t"])) > (900 if "unet" in params else 800)
  loss, _ = jax.jit(scene_task.loss)(params, batch)
  if "unet" in params:
    abar = np.linspace(0.00085 ** 0.5, 0.02 ** 0.5, 1000, dtype=np.float64) ** 2
    abar = np.cumprod(1 - abar)[np.asarray(batch["t"], int)][:, None, None, None]
    velocity = np.sqrt(abar) * batch["noise"] - np.sqrt(1 - abar) * batch["latents"]
  else:
    velocity = batch["noise"] - batch["latents"]
  np.testing.assert_allclose(loss, np.square(velocity).mean(), rtol=1e-3)


def test_scenes_that_are_asked_for_and_what_was_right():
  trained, held_out = quality.tables(
      worlds.NAMES, scenes.contrast(worlds.drawings().take(slice(0, 4))))
  ask = lambda table: quality.ask(table, worlds.NAMES, 8, jax.random.key(0))
  scenes_asked, drawn = ask(trained)
  assert not any(map(scenes.held_out, scenes_asked)) and len(drawn.row) == 24
  for scene in ask(held_out)[0]:
    kind = "pair" if scene.relation else "number" if scene.number > 1 else "colour"
    assert scenes.held_out(scene) == (kind,)
  right = reader.Reading(True, ("cat",) * 4, "red", ("noto",))
  found = quality.answers([scenes.Scene(("cat",), 1, "", "red"),
                           scenes.Scene(("dog",), 1, "", "red", "3d")], [right, right])
  assert found["single"] == [True, False] and found["colour"] == [True, True]
  assert found["style"] == [False] and found["two"] == []


def test_signs_are_captioned_as_they_are_spelt_without_what_is_held_out():
  content = sign_denoiser.content()
  images, tokens = content.draw(content.tables, jax.random.key(0), 96)
  letters, colour, _ = signs.draw(jax.random.key(0), 96, signs.TRAINED)
  spelt = ["".join(signs.LETTERS[i] for i in row if i >= 0) for row in np.asarray(letters)]
  np.testing.assert_array_equal(tokens, content.tokenizer([
      signs.caption(word, scenes.COLOURS[c]) for word, c in zip(spelt, colour)]))
  assert signs.read(images) == spelt
  assert not any(map(signs.is_new, spelt)) and "Q" not in "".join(spelt)
  generator = np.random.default_rng(0)
  assert all(map(signs.is_new, signs.ask(32, generator, True)))
  assert not any(map(signs.is_new, signs.ask(32, generator, False)))


def test_what_is_no_sign_is_not_read():
  noise = np.random.default_rng(0).uniform(size=(3, 64, 64, 3))
  assert all(set(word) == {"?"} for word in signs.read([*noise, np.ones((64, 64, 3))]))
  word = signs.render(signs.spell(["CAT"]), np.ones((1, 3)), np.array([[2, -1]]))
  hazy = np.asarray(word) + np.random.default_rng(1).normal(0, 0.1, (1, 64, 64, 3))
  assert signs.read(hazy.clip(0, 1)) == ["CAT"]


# --- figures ------------------------------------------------------------------------------------


def test_interval_of_a_share():
  low, high = (quality.share([1] * 8 + [0] * 2)[key] for key in ("low", "high"))
  np.testing.assert_allclose([low, high], [0.4902, 0.9433], atol=2e-4)     # Wilson 1927
  assert quality.share([1] * 10)["high"] == pytest.approx(1.0)
  assert quality.share([1] * 10)["low"] > 0.6


def test_a_scorer_chooses_among_captions_that_differ_in_one_part():
  """This one likes long captions: it is right where no other choice is as long."""
  lengths = Reward("length", {}, lambda prompts: {"n": np.array([float(len(p)) for p in prompts])},
                   lambda params, images, prepared: prepared["n"] - images.mean((1, 2, 3)))
  scene, images = scenes.Scene, np.zeros((2, 4, 4, 3), np.float32)
  choose = lambda asked, part: quality.choices(
      lengths, images, asked, ["cat", "strawberry"], part).tolist()
  assert choose([scene((name,), 1, "", "red") for name in ("cat", "strawberry")],
                "subjects") == [False, True]
  assert choose([scene(("cat",), n, "", "red") for n in (3, 4)], "number") == [True, False]
  assert choose([scene(("cat", "dog"), 1, relation, "red") for relation in ("right", "above")],
                "place") == [True, False]
  assert choose([scene(("cat",), 1, "", "red", style) for style in ("twemoji", "3d")],
                "style") == [True, False]


@pytest.mark.slow
def test_drawing_depends_on_nothing_but_captions_and_seed():
  pipeline = load_pipeline(ASSETS / "emoji")
  captions = ["a cat on a red background", "a dog on a blue background"]
  both, first = quality.draw(pipeline, captions), quality.draw(pipeline, captions[:1])
  np.testing.assert_allclose(both[:1], first, atol=1e-5)
  assert np.abs(quality.draw(pipeline, captions, seed=1) - both).max() > 0.1
