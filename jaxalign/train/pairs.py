"""Preference pairs as training sees them: encoded once, held by the host, gathered by batch."""
import functools
import os
import pathlib

import jax
import numpy as np

from jaxalign import processes, sharding
from jaxalign.data.pairs import Pairs
from jaxalign.errors import UserError
from jaxalign.models.vae import encode_images
from jaxalign.sampling import Conditioning
from jaxalign.train.experiment import Experiment


class PairTable:
  """Latents of both images and embeddings of the captions of N pairs, in host memory.

  Args:
    exp: encodes. pairs: the images.
    file: where the latents are kept, `[N, 2, h, w, c]` f32; read from there if it exists. It is
      mapped into memory, so that it may be larger than that. `origin` of `Pairs.images` lies beside
      it, `[N, 2, 4]` int32.

  Attributes:
    prompts: the caption of each pair.
    shared: what all batches have in common, `{"uncond"}`.
  """

  def __init__(self, exp: Experiment, pairs: Pairs, file: pathlib.Path):
    # Its import takes seconds, and runs on prompts need none of it.
    import grain

    self.prompts = pairs.captions
    self._latents, self._origin = _encoded(exp, pairs, file)
    # A pair whose first image is not the preferred one was turned round: only ties are not 1.
    self._label = np.where(pairs.labels == 0.5, 0.5, 1.0).astype(np.float32)
    captions, self._caption = np.unique(pairs.captions, return_inverse=True)
    self._cond = exp.embed([str(caption) for caption in captions])
    self.shared = {"uncond": exp.embed([""])}
    # Order by index: a permutation of all pairs, another one for each pass, nothing to save.
    self._order = grain.MapDataset.range(len(pairs)).shuffle(exp.config.seed % 2 ** 32).repeat()

  def draw(self, step: int, size: int) -> np.ndarray:
    """The pairs of a step, `[size]` int32."""
    return np.asarray([self._order[i] for i in range(step * size, (step + 1) * size)], np.int32)

  def rows(self, ids: np.ndarray) -> dict:
    """What travels to the devices for pairs `ids [B]` (taken modulo N)."""
    ids = ids % len(self.prompts)
    return {"cond": jax.tree.map(lambda a: a[self._caption[ids]], self._cond),
            "pairs": {"latents": np.asarray(self._latents[ids]), "label": self._label[ids],
                      "origin": self._origin[ids]}}

  @staticmethod
  def gather(shared, rows, sample_ids) -> dict:
    """The batch of a method that reads pairs."""
    uncond = jax.tree.map(lambda a: a[sample_ids * 0], shared["uncond"])
    return {"conditioning": Conditioning(rows["cond"], uncond), "pairs": rows["pairs"],
            "sample_ids": sample_ids}


def _encoded(exp: Experiment, pairs: Pairs, file: pathlib.Path):
  """Scaled latents `[N, 2, h, w, c]`, means of the posterior, preferred image first; origins."""
  import grain
  origin_file = file.with_name(f"{file.stem}_origin.npy")
  vae, shape = exp.pipeline.vae, (len(pairs), 2, *exp.models.latent_shape)
  if not processes.agreed(file.exists()):
    size = exp.config.eval.batch
    params = processes.put(exp.pipeline.params["vae"], sharding.replicated(exp.mesh))
    encode = jax.jit(functools.partial(encode_images, vae))
    pixels = exp.pipeline.image_size
    batches = (grain.MapDataset.range(len(pairs)).map(lambda i: pairs.images(i, *pixels))
               .batch(size).to_iter_dataset(grain.ReadOptions(num_threads=8,
                                                              prefetch_buffer_size=8)))
    partial = file.with_name(f".{file.name}.partial")
    main, done = processes.is_main(), 0
    latents = np.lib.format.open_memmap(partial, "w+", np.float32, shape) if main else None
    origin = []
    with processes.progress(total=len(pairs), desc="encoding pairs", unit="pair",
                            leave=False) as bar:
      for batch in batches:
        images, n = batch["pixels"], len(batch["pixels"])
        origin.append(batch["origin"])
        images = np.pad(images, [(0, size - n)] + [(0, 0)] * 4)      # the last batch is filled up
        for side in range(2):
          part = encode(params, exp.put_batch(images[:, side].astype(np.float32) / 255))
          part = processes.fetch(part)
          if main:
            latents[done:done + n, side] = part[:n]
        done += n
        bar.update(n)
    if main:
      latents.flush()
      np.save(origin_file, np.concatenate(origin))       # the latents' file says both are there
      os.replace(partial, file)
    processes.barrier("pairs encoded")
  latents = np.load(file, mmap_mode="r")
  if latents.shape != shape or latents.dtype != np.float32:
    raise UserError(f"{file}: has shape {latents.shape}, not {shape}: data.pairs changed; choose "
                    "another --workdir")
  return latents, np.load(origin_file)
