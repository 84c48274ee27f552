"""The evaluator: the same noise at every call, whatever the batch; exact path KL."""
import dataclasses
import functools

import jax
import numpy as np
import pytest

import runs
from jaxalign import metrics
from jaxalign.devices import rng
from jaxalign.rewards.rules import jpeg_compressibility
from jaxalign.sampling import guided_output, rollout
from jaxalign.train.evaluation import Evaluator, Samples, compare, describe
from jaxalign.train.experiment import build, gather

PROMPTS = ["a cat on a red background", "a dog on a blue background", "a sun on a green background"]


@functools.cache
def evaluator(batch):
  exp = build(runs.smoke(eval__batch=batch), jax.devices()[:1])
  return exp, Evaluator(exp)


def untouched(exp):
  return exp.models.init_policy(jax.random.key(1), exp.frozen)


def moved(exp):
  """A policy that differs from the base."""
  noise = iter(jax.random.split(jax.random.key(2), 1000))
  return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(next(noise), a.shape), untouched(exp))


def assert_equal(left: Samples, right: Samples):
  for name, value in left.arrays().items():
    np.testing.assert_array_equal(value, right.arrays()[name], err_msg=name)


def test_same_noise_at_every_call():
  exp, evaluate = evaluator(8)
  first, second = (evaluate(untouched(exp), PROMPTS, 2) for _ in range(2))
  assert_equal(first, second)
  other = evaluate(untouched(exp), PROMPTS, 2, stream=rng.EVAL_FLOOR)
  assert np.abs(other.scores["reward"] - first.scores["reward"]).min() > 0
  assert first.images.shape == (3, 2, 32, 32, 3) and first.images.dtype == np.uint8
  assert first.path_kl is None
  assert len(np.unique(first.scores["reward"])) == 6


def test_a_black_box_can_be_the_judge():
  """It scores the same pictures on the host; another scorer's features tell them apart."""
  (exp, evaluate), black_box = evaluator(8), build(runs.smoke(
      eval__batch=8, eval__judge="jpeg_compressibility", eval__features="scene_judge"),
      jax.devices()[:1])
  samples, usual = (each(untouched(exp), PROMPTS, 2) for each in (Evaluator(black_box), evaluate))
  flat = samples.images.reshape(-1, *samples.images.shape[2:])
  expected = jpeg_compressibility().score(flat, [p for p in PROMPTS for _ in range(2)])
  np.testing.assert_allclose(samples.scores["judge"].reshape(-1), expected, rtol=1e-6)
  np.testing.assert_array_equal(samples.features, usual.features)
  np.testing.assert_array_equal(samples.scores["reward"], usual.scores["reward"])


def test_independent_of_the_batch():
  """Six samples in batches of eight (filled up) and of four (a ragged last one)."""
  (exp, one), (other_exp, two) = evaluator(8), evaluator(4)
  left, right = one(moved(exp), PROMPTS, 2), two(moved(other_exp), PROMPTS, 2)
  # Programs of different shapes sum in another order: one level of 255, seldom.
  assert np.abs(left.images.astype(int) - right.images.astype(int)).max() <= 1
  for name in ("judge", "reward"):
    np.testing.assert_allclose(left.scores[name], right.scores[name], atol=1e-5)
  np.testing.assert_allclose(left.features, right.features, atol=1e-4)


def test_path_kl():
  exp, evaluate = evaluator(8)
  assert not evaluate(untouched(exp), PROMPTS, 2, path_kl=True).path_kl.any()
  policy = moved(exp)
  samples = evaluate(policy, PROMPTS, 2, path_kl=True)
  assert samples.path_kl.shape == (3, 2) and (samples.path_kl > 0).all()
  # By hand, from the trajectory: exact up to the order of sums.
  table = exp.prompt_table(PROMPTS)
  ids = np.arange(6, dtype=np.int32)
  batch = gather(jax.device_get(table), ids // 2, ids)
  key = rng.stream(jax.random.key(exp.config.seed), rng.EVAL)
  models = exp.models
  output = jax.jit(guided_output(models.denoise, models.guidance))
  variables = models.combine(policy, exp.frozen["base"])
  path = rollout(output, variables, models.sampler, batch["conditioning"], key, ids,
                 models.latent_shape)
  gaps = []
  for k in range(models.sampler.steps):
    ref = output(exp.frozen["base"], path.latents[k], models.sampler.at("timesteps", k),
              batch["conditioning"])
    gaps.append(np.square(path.out[k] - ref).sum((1, 2, 3)))
  kl = metrics.gaussian_path_kl(np.stack(gaps), models.sampler.std, models.sampler.lam)
  np.testing.assert_allclose(samples.path_kl.reshape(-1), kl, rtol=1e-3)


def test_compare_with_itself_is_zero():
  exp, evaluate = evaluator(8)
  base = evaluate(untouched(exp), PROMPTS, 2, path_kl=True)
  again = evaluate(untouched(exp), PROMPTS, 2, stream=rng.EVAL_FLOOR)
  out = compare(base, base, again)
  for name in ("reward", "judge", "color_accuracy", "diversity"):
    assert out[name]["change"]["mean"] == out[name]["change"]["sem"] == 0, name
  assert out["diversity"]["ratio_to_base"] == 1 and out["kl_to_base"]["mean"] == 0
  assert out["fd_to_base"]["distance"] == out["fd_to_base"]["floor"]
  assert describe(base)["reward"]["n"] == 6


def test_colour_accuracy_only_where_prompts_name_one():
  exp, evaluate = evaluator(8)
  assert "color_accuracy" not in evaluate(untouched(exp), ["a cat", "a dog"], 2).scores


def test_samples_round_trip(tmp_path):
  samples = Samples(np.zeros((1, 2, 4, 4, 3), np.uint8), {"reward": np.ones((1, 2))},
                    np.ones((1, 2, 3)), np.ones((1, 2)))
  for given in (samples, dataclasses.replace(samples, path_kl=None)):
    np.savez(tmp_path / "x.npz", **given.arrays())
    with np.load(tmp_path / "x.npz") as arrays:
      assert_equal(given, Samples.from_arrays(dict(arrays)))


def test_program_is_compiled_once_for_all_prompt_sets():
  exp, evaluate = evaluator(8)
  evaluate(untouched(exp), PROMPTS, 2)
  evaluate(untouched(exp), PROMPTS[:1], 4)
  evaluate(moved(exp), PROMPTS, 3)
  assert evaluate._sample._cache_size() == 1


@pytest.mark.parametrize("samples", [2, 3])
def test_samples_of_a_prompt_differ(samples):
  exp, evaluate = evaluator(8)
  images = evaluate(untouched(exp), PROMPTS[:2], samples).images
  assert len({images[p, k].tobytes() for p in range(2) for k in range(samples)}) == 2 * samples
