"""Folders as `jaxalign.sample` writes them, and a vote that is served on a free port."""
import contextlib
import json

import httpx
import numpy as np
from PIL import Image

from jaxalign.votes.ballot import Ballot
from jaxalign.votes.gallery import open_gallery
from jaxalign.votes.server import make_app, serving
from jaxalign.votes.store import Log, read_events


def write_samples(folder, prompts, n=1, seed=0):
  """A folder of `jaxalign.sample` with random pictures."""
  folder.mkdir(parents=True)
  generator = np.random.default_rng(seed)
  lines = []
  for p, prompt in enumerate(prompts):
    for i in range(n):
      name = f"{p:04d}_{i:02d}.png"
      Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / name)
      lines.append(json.dumps({"file": name, "prompt": prompt, "seed": 7}))
  (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
  return folder


class Vote:
  """A vote in `folder`: `open()` is what the command does at each start."""

  def __init__(self, folder, folders, **settings):
    self.folder, self.folders, self.settings = folder, folders, settings

  def open(self):
    names = [f.name for f in self.folders]
    self.log = Log(self.folder)
    gallery = open_gallery(names, self.folders, self.folder)
    return Ballot(gallery, self.log.append, read_events(self.folder), **self.settings)

  @contextlib.contextmanager
  def served(self, links, decided=lambda: False, loopback=True):
    ballot = self.open()
    try:
      with serving(make_app(ballot, self.folder, links, decided, loopback), "127.0.0.1", 0) as port:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
          yield client, ballot
    finally:
      self.log.close()
