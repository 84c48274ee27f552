"""The user's own reward file: both forms work, every mistake becomes one clear line."""
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.errors import UserError
from jaxalign.rewards import HostReward, Reward, check_scores, make_reward

PROMPTS = ["a cat", "a dog", "a frog"]
UINT8 = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
FLOAT = jnp.asarray(UINT8, jnp.float32) / 255


@pytest.fixture
def user(tmp_path):
  """Writes a reward file; returns the reward of its function `f`."""
  def make(code, function="f"):
    (tmp_path / "mine.py").write_text(code)
    return make_reward((f"{tmp_path}/mine.py:{function}",), (1.0,))
  return make


def _fails(call):
  """The message of the `UserError` that `call` must raise, which must be one line."""
  with pytest.raises(UserError) as e:
    call()
  assert "\n" not in str(e.value) and "mine.py" in str(e.value)
  return str(e.value)


def _score(reward):
  return jax.jit(reward.score)(reward.params, FLOAT, reward.prepare(PROMPTS))


def test_black_box(user):
  reward = user("def f(images, prompts):\n"
                "  assert images.dtype.name == 'uint8'\n"
                "  return [float(i.mean()) + len(p) for i, p in zip(images, prompts)]\n")
  assert isinstance(reward, HostReward)
  scores = reward.score(UINT8, PROMPTS)
  assert scores.dtype == np.float32
  np.testing.assert_allclose(scores, UINT8.mean((1, 2, 3)) + [5, 5, 6], rtol=1e-6)


def test_jax_with_prepare_is_differentiable(user):
  reward = user("import numpy as np\n"
                "def prepare(prompts):\n"
                "  return {'length': np.array([len(p) for p in prompts], np.float32)}\n"
                "def f(images, prepared):\n"
                "  return images.mean((1, 2, 3)) * prepared['length']\n")
  assert isinstance(reward, Reward)
  expected = FLOAT.mean((1, 2, 3)) * jnp.array([5, 5, 6])
  np.testing.assert_allclose(_score(reward), expected, rtol=1e-6)
  gradient = jax.grad(lambda x: reward.score(
    reward.params, x, reward.prepare(PROMPTS)).sum())(FLOAT)
  np.testing.assert_allclose(gradient[2], 6 / 48, rtol=1e-5)


def test_jax_without_prepare(user):
  reward = user("def f(images, prepared):\n  return images[:, 0, 0, 0]\n")
  assert reward.prepare(PROMPTS) == {}
  np.testing.assert_array_equal(_score(reward), FLOAT[:, 0, 0, 0])


def test_sum_with_a_builtin(tmp_path):
  (tmp_path / "mine.py").write_text("def f(images, prompts):\n  return [1, 2, 3]\n")
  reward = make_reward(("brightness", f"{tmp_path}/mine.py:f"), (1.0, 10.0))
  np.testing.assert_allclose(
    reward.score(np.full((3, 4, 4, 3), 255, np.uint8), PROMPTS), [11, 21, 31], rtol=1e-6)


def test_dataclass_and_second_function_in_the_file(user):
  reward = user("import dataclasses\n"
                "@dataclasses.dataclass\n"
                "class Scale:\n  by: 'float' = 2.0\n"
                "def helper(images):\n  return images[:, 0, 0, 0] * Scale().by\n"
                "def f(images, prompts):\n  return helper(images)\n")
  np.testing.assert_allclose(reward.score(UINT8, PROMPTS), UINT8[:, 0, 0, 0] * 2.0)


@pytest.mark.parametrize("code, said", [
  ("def g(images, prompts): pass", ["no function 'f'"]),
  ("f = 3", ["no function 'f'"]),
  ("def f(images): pass", ["f takes (images)", "(images, prompts)", "(images, prepared)"]),
  ("def f(x, y): pass", ["f takes (x, y)", "(images, prompts)", "(images, prepared)"]),
  ("import no_such_module", ["failed to run at line 1", "No module named 'no_such_module'"]),
  ("x = 1\ny = (\n", ["failed to run at line", "SyntaxError"]),
  ("import sys\nsys.exit(0)", ["failed to run at line 2", "SystemExit"]),
])
def test_file_that_does_not_fit(user, code, said):
  message = _fails(lambda: user(code))
  assert all(part in message for part in said), message
  assert "reward.names" in message


def test_missing_file(tmp_path):
  assert "no file" in _fails(lambda: make_reward((f"{tmp_path}/mine.py:f",), (1,)))


@pytest.mark.parametrize("result, said", [
  ("[1.0, float('nan'), float('nan')]", ["nan at index 1, prompt 'a dog'", "2 of 3"]),
  ("[1.0, 2.0, float('-inf')]", ["-inf at index 2, prompt 'a frog'"]),
  ("[1.0, 1e300, 2.0]", ["inf at index 1"]),
  ("[[1.0], [2.0], [3.0]]", ["shape (3, 1), not (3,)"]),
  ("1.0", ["shape (), not (3,)"]),
  ("[1.0, 2.0]", ["shape (2,), not (3,)"]),
  ("None", ["NoneType"]),
  ("['a', 'b', 'c']", ["list of dtype <U1, not real numbers"]),
  ("[1j, 2j, 3j]", ["complex128"]),
  ("[[1], [2, 3]]", ["no array"]),
  ("1 / 0", ["raised at line 2 ZeroDivisionError: division by zero"]),
  ("__import__('sys').exit(0)", ["raised at line 2 SystemExit: 0"]),
  ("(_ for _ in ()).throw(__import__('asyncio').CancelledError())", ["line 2 CancelledError"]),
  ("__import__('time').sleep(1e4)", ["took longer than 1 s", "#timeout="]),
])
def test_black_box_that_misbehaves(user, result, said):
  reward = user(f"def f(images, prompts):\n  return {result}\n", "f#timeout=1")
  message = _fails(lambda: reward.score(UINT8, PROMPTS))
  assert all(part in message for part in said), message
  assert "mine.py:f" in message


def test_a_black_box_whose_own_process_dies(user):
  reward = user("import concurrent.futures, os\n"
                "def f(images, prompts):\n"
                "  with concurrent.futures.ProcessPoolExecutor(1) as pool:\n"
                "    return pool.submit(os._exit, 0).result()\n")
  assert "raised at line 4 BrokenProcessPool" in _fails(lambda: reward.score(UINT8, PROMPTS))


@pytest.mark.parametrize("timeout", ["0", "nan", "inf", "-1", "1e9"])
def test_timeouts_that_are_none(user, timeout):
  with pytest.raises(UserError, match="timeout=.* is outside"):
    user("def f(images, prompts): pass", f"f#timeout={timeout}")


def test_threads_of_the_user_do_not_keep_a_command_alive():
  """Where they are no daemons, and whatever the command's own status is."""
  code = ("import sys, threading, time\n"
          "from jaxalign.config import command\n"
          "command.LEAVE = 0.2\n"
          "def main(argv):\n"
          "  threading.Thread(target=time.sleep, args=(1e4,)).start()\n"
          "  raise command.UserError('the only line')\n"
          "sys.exit(command.run_command(main, command.Flags()))\n")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert (done.returncode, done.stderr) == (2, "error: the only line\n")


def test_many_lines_of_error_become_one(user):
  reward = user("def f(images, prompts):\n  raise ValueError('first\\nsecond')\n")
  assert _fails(lambda: reward.score(UINT8, PROMPTS)).endswith("ValueError: first")


@pytest.mark.parametrize("result, said", [
  ("images.mean((1, 2))", ["shape (3, 3), not (3,)"]),
  ("images[:, :1, 0, 0]", ["shape (3, 1), not (3,)"]),
  ("1.0", ["float, not a JAX array"]),
  ("(images[:, 0, 0, 0] > 0.5).astype(int)", ["dtype int32", "no gradient"]),
  ("prepared['length']", ["raised at line 2 KeyError: 'length'"]),
  ("__import__('numpy').asarray(images)[:, 0, 0, 0]", ["TracerArrayConversion", "use jax.numpy"]),
  ("images[:, 0, 0, 0] if images.sum() > 0 else 0", ["TracerBool", "use jax.numpy"]),
])
def test_jax_reward_that_misbehaves(user, result, said):
  reward = user(f"def f(images, prepared):\n  return {result}\n")
  message = _fails(lambda: _score(reward))
  assert all(part in message for part in said), message
  assert "mine.py:f" in message


@pytest.mark.parametrize("result, said", [
  ("[1, 2, 3]", ["list, not a dict"]),
  ("{'a': np.zeros(2)}", ["'a' of shape (2,)", "the 3 prompts"]),
  ("{'a': prompts}", ["'a' of dtype", "not numbers"]),
  ("{'a': 1 / 0}", ["ZeroDivisionError"]),
])
def test_prepare_that_misbehaves(user, result, said):
  reward = user(f"import numpy as np\ndef prepare(prompts):\n  return {result}\n"
                "def f(images, prepared):\n  return images[:, 0, 0, 0]\n")
  message = _fails(lambda: reward.prepare(PROMPTS))
  assert all(part in message for part in said), message


def test_check_scores_passes_good_ones_as_float32():
  for scores in ([1, 2, 3], np.array([True, False, True]), jnp.ones(3, jnp.bfloat16), (1.5, 0, 2)):
    checked = check_scores("r", scores, PROMPTS)
    assert checked.dtype == np.float32 and checked.shape == (3,)
  with pytest.raises(UserError, match="'r' returned nan at index 0, prompt 'a cat'"):
    check_scores("r", jnp.full(3, jnp.nan), PROMPTS)
