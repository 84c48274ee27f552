"""Preference pairs as training sees them: encoded once, held by the host, gathered by batch."""
import contextlib
import hashlib
import pathlib
import zipfile

import jax
import numpy as np
from flax import traverse_util

from jaxalign.data.pairs import Pairs
from jaxalign.devices import processes, sharding
from jaxalign.errors import UserError
from jaxalign.sampling import Conditioning
from jaxalign.storage.files import whole
from jaxalign.train.experiment import Experiment


class PairTable:
  """Latents of both images and embeddings of the captions of N pairs, in host memory.

  Args:
    exp: encodes. pairs: the images.
    folder: the run's. In `pairs.npy` there are the latents, `[N, 2, h, w, c]` f32, read from it if
      it exists, and mapped into memory, so that it may be larger than that. `origin` of
      `Pairs.images` lies beside it, `[N, 2, 4]` int32. Where the config names `data.cache`, both
      lie there instead, and the embeddings too.

  Attributes:
    prompts: the caption of each pair.
    shared: what all batches have in common, `{"uncond"}`.
  """

  def __init__(self, exp: Experiment, pairs: Pairs, folder: pathlib.Path):
    # Its import takes seconds, and runs on prompts need none of it.
    import grain

    self.prompts = pairs.captions
    file = folder / "pairs.npy"
    if exp.config.data.cache:
      file = _cache_file(exp, pairs)
    self._latents, self._origin = _encoded(exp, pairs, file)
    # A pair whose first image is not the preferred one was turned round: only ties are not 1.
    self._label = np.where(pairs.labels == 0.5, 0.5, 1.0).astype(np.float32)
    captions, self._caption = np.unique(pairs.captions, return_inverse=True)
    captions = [str(caption) for caption in captions]
    self._cond = (_embedded(exp, captions, file.with_name(f"{file.stem}_captions.npz"))
                  if exp.config.data.cache else exp.embed(captions))
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


def _damaged(*files: pathlib.Path) -> bool:
  """Whether one of these arrays cannot be opened, as after a full disk."""
  try:
    for file in files:
      np.load(file, mmap_mode="r")
  except (OSError, ValueError, EOFError) as error:
    print(f"{file} is damaged ({error}) and written anew")
    return True
  return False


def _cache_file(exp: Experiment, pairs: Pairs) -> pathlib.Path:
  """`data.cache/pairs-HASH.npy`, the hash of all that latents and embeddings follow from."""
  folder = pathlib.Path(exp.config.data.cache)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"data.cache={folder}: {error}") from error
  digest = hashlib.sha256(repr((exp.pipeline.image_size, exp.config.model.dtype,
                                exp.pipeline.configs)).encode())
  encoders = {"vae": exp.pipeline.params["vae"], **exp.pipeline.text_params}
  for path, leaf in sorted(traverse_util.flatten_dict(encoders, sep="/").items()):
    digest.update(path.encode())
    digest.update(np.ascontiguousarray(leaf))
  with processes.progress(total=len(pairs), desc="hashing pairs", unit="pair", leave=False) as bar:
    for i in range(len(pairs)):
      digest.update(pairs.fingerprint(i))
      bar.update()
  return folder / f"pairs-{digest.hexdigest()[:32]}.npy"


def _embedded(exp: Experiment, captions: list[str], file: pathlib.Path):
  """What `exp.embed` gives for captions, kept in a file; a damaged one is written anew."""
  if processes.agreed(file.exists()):
    try:
      with np.load(file, allow_pickle=False) as arrays:
        return traverse_util.unflatten_dict(dict(arrays), sep="/")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
      print(f"{file} is damaged ({error}) and written anew")
  cond = exp.embed(captions)
  if processes.is_main():
    with whole(file) as partial:
      np.savez(partial, **traverse_util.flatten_dict(cond, sep="/"))
  processes.barrier("captions embedded")
  return cond


def image_encoder(exp: Experiment):
  """`(parameters, images [B, H, W, 3] in [0, 1]) -> latents [B, h, w, c]`, jitted for the mesh."""
  encode = exp.pipeline.encode_images
  return jax.jit(sharding.on_mesh(encode, exp.mesh))


def _encoded(exp: Experiment, pairs: Pairs, file: pathlib.Path):
  """Scaled latents `[N, 2, h, w, c]`, means of the posterior, preferred image first; origins."""
  import grain
  origin_file = file.with_name(f"{file.stem}_origin.npy")
  shape = (len(pairs), 2, *exp.models.latent_shape)
  kept = file.exists() and not (exp.config.data.cache and _damaged(file, origin_file))
  if not processes.agreed(kept):
    size = exp.config.eval.batch
    params = processes.put(exp.pipeline.params["vae"], sharding.replicated(exp.mesh))
    encode = image_encoder(exp)
    pixels = exp.pipeline.image_size
    batches = (grain.MapDataset.range(len(pairs)).map(lambda i: pairs.images(i, *pixels))
               .batch(size).to_iter_dataset(grain.ReadOptions(num_threads=8,
                                                              prefetch_buffer_size=8)))
    main, done, origin, latents = processes.is_main(), 0, [], None
    with (processes.progress(total=len(pairs), desc="encoding pairs", unit="pair",
                             leave=False) as bar,
          whole(file) if main else contextlib.nullcontext() as partial):
      if main:
        latents = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
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
        with whole(origin_file) as there:                # the latents' file says both are there
          np.save(there, np.concatenate(origin))
    processes.barrier("pairs encoded")
  latents = np.load(file, mmap_mode="r")
  if latents.shape != shape or latents.dtype != np.float32:
    raise UserError(f"{file}: has shape {latents.shape}, not {shape}: data.pairs changed; choose "
                    "another --workdir")
  return latents, np.load(origin_file)
