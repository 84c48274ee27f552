"""A compiled program that holds a PyTorch reward which misbehaves: `faulty.py SCORER[#SETTINGS]`.

For `test_pytorch_faults.py`, as a process of its own or as one of several. The last row of the
batch is the one that a scorer can tell, in the first step, so that one device of one process is
hit.
"""
import signal
import sys

import jax
import numpy as np

from jaxalign.config.command import exit_status
from jaxalign.devices import callbacks, processes, sharding
from jaxalign.rewards import make_reward, open_reward
from jaxalign.rewards.trial import Trial

PROMPTS = ["a", "bb", "ccc", "dddd"]


def main():
  # A process whose parent was started in the background may ignore it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  callbacks.be_patient()
  processes.start()
  mesh = sharding.make_mesh(-1, 1, 1)
  reward = open_reward(make_reward((sys.argv[1],), (1.0,)), lambda: Trial((8, 8), PROMPTS), mesh)
  images = np.full((4, 8, 8, 3), 0.5, np.float32)
  images[-1] = 1.0
  batch = processes.put((images, reward.prepare(PROMPTS)), sharding.batch_sharding(mesh))
  program = jax.jit(lambda scale, images, prepared: jax.value_and_grad(
      lambda x: (reward.score(reward.params, x * scale, prepared)).sum())(images),
      out_shardings=sharding.replicated(mesh))
  for step in range(3):
    print(f"step {step}", flush=True)
    score, gradient = processes.fetch(program(np.float32(1 if step == 0 else 0.5), *batch))
    callbacks.check()
    print(f"score {float(score):.4f} gradient {float(np.abs(gradient).sum()):.4f}", flush=True)


if __name__ == "__main__":
  sys.exit(exit_status(main))
