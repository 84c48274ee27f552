"""Signs of cheating in pictures, scores and features: what breaks a rule, and what must not."""
import json

import numpy as np
import pytest

from benchmarks import alarm as benchmark
from jaxalign.config.schema import AlarmConfig
from jaxalign.metrics import alarm
from jaxalign.reports.reading import Pictures

SHAPE = 16, 4


def pictures(seed, reward=0.0, judge=0.0, near=1.0, images=None):
  """Smooth pictures; standard deviations of 0.1 in scores, of `near` in a prompt's features."""
  rng = np.random.default_rng(seed)
  if images is None:
    ramp = np.linspace(0, 1, 16)
    a, b, c = rng.uniform(20, 90, (3, *SHAPE, 1, 1, 3))
    images = 40 + a * ramp[:, None, None] + b * ramp[None, :, None] + c / 4
  scores = {"reward": rng.normal(reward, 0.1, SHAPE), "judge": rng.normal(judge, 0.1, SHAPE)}
  own = np.random.default_rng(99).normal(size=(SHAPE[0], 1, 8))       # of the prompt
  features = 3 * own + near * rng.normal(size=(*SHAPE, 8))
  return Pictures(np.asarray(images, np.uint8), scores, features)


BASE = pictures(0)


def signs(now, limits=AlarmConfig(), **more):
  return alarm.signs({**alarm.measure(now, BASE), **more}, limits)


def test_a_sound_policy_raises_none():
  assert not signs(pictures(1)) and not signs(pictures(1, reward=0.5, judge=0.3))
  assert not signs(BASE)


def test_the_judge_falls_while_the_reward_rises():
  found = signs(pictures(1, reward=0.5, judge=-0.3))
  assert list(found) == ["judge"] and "while the reward rose" in found["judge"]
  assert not signs(pictures(1, reward=-0.5, judge=-0.3))       # train.patience's affair
  assert not signs(pictures(1, judge=-0.3))


def test_diversity_collapses():
  assert list(signs(pictures(1, near=0.2))) == ["diversity"]
  assert not signs(pictures(1, near=0.9)) and not signs(pictures(1, near=2.0))
  assert not signs(pictures(1, near=0.2), AlarmConfig(diversity=0.0))


def test_pictures_burn_out_or_fill_with_grain():
  burnt = pictures(1, images=np.where(BASE.images > 100, 255, BASE.images))
  assert "saturation" in signs(burnt) and "saturation" not in signs(burnt,
                                                                    AlarmConfig(saturation=0.0))
  checks = 8 * (np.indices((16, 16)).sum(0) % 2)[..., None]    # a faint chess board
  assert list(signs(pictures(1, images=BASE.images + checks))) == ["roughness"]
  assert not signs(pictures(1, images=BASE.images + checks), AlarmConfig(roughness=0.0))


def test_drift_and_path_kl_are_off_until_they_have_a_limit():
  moved = pictures(1)
  moved.features[..., 0] += 50 * np.sign(moved.features[..., 0])
  assert "drift" in signs(moved, AlarmConfig(drift=10.0))
  assert not {"drift", "path_kl"} & signs(moved, path_kl=1e9).keys()
  found = signs(BASE, AlarmConfig(path_kl=100.0), path_kl=101.0)
  assert found == {"path_kl": "the path KL to the base is 101 nats"}
  assert not signs(BASE, AlarmConfig(path_kl=100.0), path_kl=99.0)
  assert not signs(BASE, AlarmConfig(path_kl=100.0))


def test_weights_that_went_far():
  assert signs(BASE, weights=0.26) == {
      "weights": "what is trained has moved by 26% of its size"}
  assert not signs(BASE, weights=0.24) and not signs(BASE)
  assert not signs(BASE, AlarmConfig(weights=0.0), weights=9.0)


def test_one_prompt_tells_nothing():
  one = lambda p: Pictures(p.images[:1], {k: v[:1] for k, v in p.scores.items()}, p.features[:1])
  measured = alarm.measure(one(pictures(1, 5.0, -5.0, 0.01)), one(BASE))
  assert not alarm.signs(measured, AlarmConfig())


def test_a_change_that_all_prompts_share_is_clear():
  white = pictures(1, images=np.full_like(BASE.images, 255))
  black = pictures(2, images=np.zeros_like(BASE.images) + 9)
  assert alarm.measure(white, black)["saturation"] == {"change": 1.0, "errors": 1e3}


def test_measures_by_hand():
  image = np.zeros((1, 1, 2, 2, 3), np.uint8)
  image[0, 0, 0] = [[0, 1, 2], [253, 254, 255]]
  np.testing.assert_allclose(alarm.saturation(image), [[(2 + 2 + 6) / 12]])
  noise = np.random.default_rng(0).integers(0, 256, (1, 2, 200, 200, 1)).repeat(3, -1)
  np.testing.assert_allclose(alarm.roughness(noise.astype(np.uint8)), 0.5, atol=0.01)
  assert alarm.roughness(np.full((1, 1, 8, 8, 3), 77, np.uint8)) == 0


def test_two_draws_of_one_distribution_drift_by_one():
  rng = np.random.default_rng(0)
  draws = [alarm.drift(*rng.normal(size=(2, 64, 4, 16))) for _ in range(20)]
  assert np.mean(draws) == pytest.approx(1.0, abs=0.03)
  assert alarm.drift(BASE.features, BASE.features) == 0


@pytest.mark.parametrize("near", [0.3, 1.0, 3.0])
def test_false_alarms_are_rare_on_noise(near):
  """Two independent draws of one model, 150 looks."""
  looks = [alarm.signs(alarm.measure(pictures(2 * k + 1, near=near), pictures(2 * k, near=near)),
                       AlarmConfig()) for k in range(150)]
  assert sum(map(bool, looks)) <= 1


def test_the_table_of_caught_and_false_alarms(tmp_path):
  """What was known before the first cry, beside what came of it; a failed run counts not."""
  for name, alarms in {"draft-strong": [8, 12], "ddpo-brightness": [], "draft": [4]}.items():
    folder = tmp_path / name
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({
        "steps": 12, "alarms": [{"step": step, "signs": {"judge": ""}} for step in alarms],
        "tuned": {"diversity": {"ratio_to_base": 0.5}}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({
        "step": step, **({} if step % 4 else {
            "eval/reward_change": step / 10, "eval/judge_change": -step / 100})}) + "\n"
        for step in range(1, 13)))
  text = benchmark.table(["draft-strong", "ddpo-brightness", "draft", "dno"], tmp_path,
                         {"dno": "not finite"}).splitlines()
  assert text[2] == ("| draft-strong | cheats | 12 | step 8: judge | +0.4000 | +1.2000 | -0.0400 | "
                     "-0.1200 | 50% |")
  assert "| never | +1.2000 | +1.2000 | -0.1200" in text[3] and "+0.0000 | +1.2000" in text[4]
  assert text[-3:] == ["caught: 1 of 2", "false alarms: 1 of 1", "dno failed: not finite"]
