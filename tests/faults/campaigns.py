"""Campaigns on damaged input: what is read is used or refused in one line, whatever it is.

A kind is a class: made once in a folder, called with a seed, it returns "accepted" or "refused".
Anything else that happens (another exception, more than one line, a hang, a dead process, memory)
is a fault, which the runner reports. Seeds say all: the same seed is the same input.
"""
import contextlib
import http.server
import io
import json
import os
import pathlib
import random
import runpy
import shutil
import subprocess
import sys
import threading
import time
import warnings

import mutations
import numpy as np
from PIL import Image

from jaxalign.errors import UserError

SIZE = 32                    # pixels of what is read


class Fault(AssertionError):
  """A rule is broken; the message says which."""


def outcome(read, *parts: str) -> str:
  """Calls `read()`; refused is a UserError of one line that names `parts`."""
  try:
    read()
  except UserError as error:
    text = str(error)
    if "\n" in text:
      raise Fault(f"several lines: {text!r}") from error
    for part in parts:
      if part not in text:
        raise Fault(f"does not name {part}: {text!r}") from error
    return "refused"
  return "accepted"


class Pictures:
  """Pictures of thirty kinds, as `data.pairs` reads them."""
  count = 10_000

  def __init__(self, folder):
    generator = np.random.default_rng(0)
    rgb = Image.fromarray(generator.integers(0, 256, (20, 30, 3), np.uint8)).resize((45, 30))
    alpha = rgb.convert("RGBA")
    alpha.putalpha(128)
    deep = Image.fromarray(generator.integers(0, 65536, (20, 30), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    made = [(image, form, options) for image, form, options in (
        (rgb, "PNG", {}), (alpha, "PNG", {}), (rgb.convert("P"), "PNG", {"transparency": 3}),
        (rgb.convert("L"), "PNG", {}), (rgb.convert("1"), "PNG", {}), (deep, "PNG", {}),
        (rgb, "PNG", {"exif": exif}), (rgb, "JPEG", {"exif": exif}), (rgb, "JPEG", {}),
        (rgb.convert("L"), "JPEG", {}), (rgb.convert("CMYK"), "JPEG", {}),
        (rgb, "JPEG", {"progressive": True}), (rgb, "WEBP", {}), (alpha, "WEBP", {}),
        (rgb, "WEBP", {"lossless": True}), (rgb, "GIF", {}), (rgb.convert("P"), "GIF", {}),
        (rgb, "BMP", {}), (rgb.convert("1"), "BMP", {}), (rgb, "TIFF", {}), (deep, "TIFF", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}), (rgb.convert("CMYK"), "TIFF", {}),
        (rgb.convert("F"), "TIFF", {}), (rgb, "TIFF", {"compression": "jpeg"}), (rgb, "PPM", {}),
        (rgb, "TGA", {}), (rgb, "ICO", {}), (rgb, "PCX", {}), (rgb, "JPEG2000", {}),
        (rgb, "SGI", {}), (rgb, "DDS", {}), (rgb, "ICNS", {}), (alpha, "AVIF", {}))]
    self._files = []
    for image, form, options in made:
      file = io.BytesIO()
      try:
        image.save(file, form, **options)
      except (KeyError, OSError):        # a form that this Pillow was built without
        continue
      self._files.append(file.getvalue())

  def __call__(self, seed):
    from jaxalign.data.pictures import read_picture
    rnd = random.Random(seed)
    content = mutations.bytes_of(rnd, rnd.choice(self._files))

    def read():
      pixels, origin = read_picture(content, "row 7", SIZE, SIZE)
      if pixels.shape != (SIZE, SIZE, 3) or pixels.dtype != np.uint8 or len(origin) != 4:
        raise Fault(f"{pixels.dtype}{pixels.shape} {origin}")
    return outcome(read, "row 7")


class Json:
  """Prompts, pairs, and what a workdir holds, as JSON, JSON lines, CSV and text."""
  count = 1000

  def __init__(self, folder):
    from jaxalign.config import recipes
    self._folder = folder
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    config = recipes.parse(recipes.load_recipe("jaxalign:ddpo:smoke")).to_dict()
    change = {"mean": 0.1, "sem": 0.1}
    self._summary = {"recipe": "ddpo", "steps": 3, "seconds": 1.0, "total_seconds": 2.0,
                     "device": "cpu x1", "stopped": "", "exported_step": 3, "cost": {"decodes": 3},
                     "base": {"reward": {"mean": 0.5, "sem": 0.1, "n": 4}},
                     "tuned": {"reward": {"mean": 0.6, "sem": 0.1, "n": 4, "change": change}}}
    self._config = {"config": config, "contents": {}, "environment": {}}
    self._kinds = (self._prompts, self._pairs, self._run, self._run, self._metrics)

  def __call__(self, seed):
    rnd = random.Random(seed)
    return rnd.choice(self._kinds)(rnd)

  def _prompts(self, rnd):
    from jaxalign.data.prompts import read_prompts
    suffix = rnd.choice((".json", ".jsonl", ".csv", ".tsv", ".txt"))
    file = self._folder / f"prompts{suffix}"
    rows = [{"prompt": "a red cat", "seed": 1}, {"prompt": "a \"dog\", blue", "seed": 2}]
    if suffix == ".json":
      content = mutations.text_of(rnd, rows if rnd.random() < 0.5 else [r["prompt"] for r in rows])
    elif suffix == ".jsonl":
      content = b"\n".join([mutations.text_of(rnd, rows[0]), json.dumps(rows[1]).encode()])
    else:
      table = 'prompt,seed\na cat,1\n"b\nc",2\n'.replace(",", "\t" if suffix == ".tsv" else ",")
      content = mutations.bytes_of(rnd, table.encode())
    file.write_bytes(content)

    def read():
      prompts = read_prompts("data.prompts", str(file))
      if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise Fault(f"prompts {prompts!r}")
    return outcome(read, str(file))

  def _pairs(self, rnd):
    from jaxalign.data.pairs import open_pairs
    file = self._folder / "pairs.jsonl"
    row = {"caption": "a cat", "image_0": "a.png", "image_1": "a.png", "label_0": 1, "label_1": 0}
    file.write_bytes(b"\n".join([mutations.text_of(rnd, row), json.dumps(row).encode()]))

    def read():
      pairs = open_pairs(str(file), rnd.choice(("drop", "soft")))
      for i in range(len(pairs)):
        pairs.images(i, SIZE, SIZE)
    return outcome(read, str(self._folder))

  def _run(self, rnd):
    from jaxalign.train.report import read_summary
    from jaxalign.train.restore import run_config
    run = self._folder / "run"
    run.mkdir(exist_ok=True)
    name, tree, read = rnd.choice((("config.json", self._config, run_config),
                                   ("summary.json", self._summary, read_summary)))
    (run / name).write_bytes(mutations.text_of(rnd, tree))
    # A config that is whole, but for a key, is refused as such: what it names is the key.
    parts = () if name == "config.json" else (name,)
    return outcome(lambda: read(run), *parts)

  def _metrics(self, rnd):
    from jaxalign.config import recipes
    from jaxalign.train.workdir import Workdir
    run = self._folder / "metrics"
    shutil.rmtree(run, ignore_errors=True)
    workdir = Workdir(run, recipes.parse(self._config["config"]))
    workdir.create()
    lines = [mutations.text_of(rnd, {"step": i, "seconds": 1.0}) if rnd.random() < 0.5
             else json.dumps({"step": i, "seconds": 1.0}).encode() for i in range(1, 6)]
    (run / "metrics.jsonl").write_bytes(b"\n".join(lines))
    try:
      result = outcome(lambda: workdir.open_metrics(5))
      workdir.log(6, 1.0, {"a": 1.0})
    finally:
      workdir.close()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    if len(set(steps)) != len(steps) or steps[-1] != 6:
      raise Fault(f"rows of steps {steps}")
    return result


class Parquet:
  """Prompts and pairs."""
  count = 1000

  def __init__(self, folder):
    import pyarrow as pa
    import pyarrow.parquet as pq
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 99, 199)).save(picture, "PNG")
    n, self._file, self._contents = 6, folder / "a.parquet", []
    tables = {"caption": [f"a cat {i}" for i in range(n)], "jpg_0": [picture.getvalue()] * n,
              "jpg_1": [picture.getvalue()] * n, "label_0": [1.0, 0.0, 0.5] * 2,
              "label_1": [0.0, 1.0, 0.5] * 2}
    for options in ({}, {"compression": "gzip"}, {"compression": "none", "use_dictionary": False},
                    {"row_group_size": 2}):
      pq.write_table(pa.table(tables), self._file, **options)
      self._contents.append(self._file.read_bytes())

  def __call__(self, seed):
    from jaxalign.data.pairs import open_pairs
    from jaxalign.data.prompts import read_prompts
    rnd = random.Random(seed)
    content = rnd.choice(self._contents)
    if rnd.random() < 0.4:                       # the footer says where everything is
      cut = max(len(content) - 2000, 0)
      content = content[:cut] + mutations.bytes_of(rnd, content[cut:])
    else:
      content = mutations.bytes_of(rnd, content)
    self._file.write_bytes(content)

    def read():
      if rnd.random() < 0.3:
        return read_prompts("data.prompts", str(self._file))
      pairs = open_pairs(str(self._file), "drop")
      for i in range(min(len(pairs), 50)):
        pairs.images(i, SIZE, SIZE)
    return outcome(read, str(self._file))


class Safetensors:
  """Weights of a pipeline's networks."""
  count = 1000

  def __init__(self, folder):
    from jaxalign.convert import load_pipeline
    from jaxalign.testing.fixture import make_pipeline_dir
    self._model = pathlib.Path(make_pipeline_dir(folder / "model", image_size=SIZE))
    self._pipeline = load_pipeline(self._model)
    self._shapes = self._pipeline.param_shapes()
    self._work = folder / "work"
    self._work.mkdir(exist_ok=True)

  def damaged(self, rnd, content: bytes) -> bytes:
    """A safetensors file: of its header, a JSON, as often as of its bytes."""
    size = int.from_bytes(content[:8], "little")
    if rnd.random() < 0.5:
      header = mutations.text_of(rnd, json.loads(content[8:8 + size]))
      length = len(header) if rnd.random() < 0.9 else rnd.choice((0, 2 ** 62, size, 2 ** 64 - 1))
      return length.to_bytes(8, "little") + header + content[8 + size:]
    cut = 8 + size if rnd.random() < 0.5 else len(content)
    return mutations.bytes_of(rnd, content[:cut]) + content[cut:]

  def __call__(self, seed):
    from jaxalign.convert import weights
    rnd = random.Random(seed)
    name = rnd.choice(("unet", "vae", "text_encoder"))
    source = next((self._model / name).glob("*.safetensors"))
    file = self._work / source.name
    for old in self._work.iterdir():
      old.unlink()
    file.write_bytes(self.damaged(rnd, source.read_bytes()))
    return outcome(lambda: weights.load(self._work, name, self._shapes[name]), str(self._work))


class Lora(Safetensors):
  """LoRA files, their tensors and what their metadata say."""
  count = 1000

  def __init__(self, folder):
    super().__init__(folder)
    import jax

    from jaxalign.convert import save_adapter
    from jaxalign.models import lora
    self._unet = self._pipeline.params["unet"]
    tree = lora.init(jax.random.key(0), self._unet, 4,
                     self._pipeline.adapter_targets(("attention",)))
    self._sound = save_adapter(tree, folder / "lora").read_bytes()
    size = int.from_bytes(self._sound[:8], "little")
    self._header, self._data = json.loads(self._sound[8:8 + size]), self._sound[8 + size:]

  def __call__(self, seed):
    from jaxalign.convert import load_adapter
    rnd = random.Random(seed)
    content = self.damaged(rnd, self._sound)
    if rnd.random() < 0.5:                       # what PEFT would say of it
      header = json.loads(json.dumps(self._header))
      (key, text), = [(k, v) for k, v in header["__metadata__"].items() if k != "format"]
      header["__metadata__"][key] = mutations.text_of(rnd, json.loads(text)).decode(
          errors="replace")
      text = json.dumps(header).encode()
      content = len(text).to_bytes(8, "little") + text + self._data
    file = self._work / "lora.safetensors"
    file.write_bytes(content)

    def read():
      import jax
      for leaf in jax.tree.leaves(load_adapter(file, self._unet)):
        if not np.isfinite(leaf).all():
          raise Fault("accepted factors that are not finite")
    return outcome(read, str(file))


class Http:
  """Answers of a server: status, headers, bodies, and connections that end or hang."""
  count = 500

  def __init__(self, folder):
    from jaxalign.rewards import http as rewards_http
    rewards_http.PAUSE = 0.01
    campaign = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = "HTTP/1.1"

      def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with contextlib.suppress(OSError):
          for piece in campaign.answer:
            if isinstance(piece, bytes):
              self.wfile.write(piece)
            else:
              time.sleep(piece)
        self.close_connection = True

      def log_message(self, *_):
        pass
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def _answer(self, rnd):
    body = mutations.text_of(rnd, {"scores": [0.5, 1.5]}) if rnd.random() < 0.8 else (
        b'{"scores": [1, 2]}' + b" " * rnd.choice((0, 10 ** 6)))
    status = rnd.choice((200, 200, 200, 200, 204, 206, 301, 302, 307, 308, 400, 401, 429, 500, 503))
    headers = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
    for key, choices in (
        ("Location", ("http://127.0.0.1:1/", "/again", "", "http://[", "//", "ftp://a/b")),
        ("Retry-After", ("1e9", "-1", "99999999999", "Fri, 31 Dec 2999 23:59:59 GMT", "x")),
        ("Content-Length", ("0", "-1", "x", "99999999", "5")),
        ("Content-Encoding", ("gzip", "deflate", "x")), ("Transfer-Encoding", ("chunked",)),
        ("X" * rnd.choice((1, 70_000)), ("y",))):
      if rnd.random() < (0.5 if key == "Location" and status in (301, 302, 307, 308) else 0.1):
        headers[key] = rnd.choice(choices)
    lines = [f"HTTP/1.1 {status} X"] + [f"{key}: {value}" for key, value in headers.items()]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    whole = (mutations.bytes_of(rnd, head) if rnd.random() < 0.3 else head) + body
    cut = rnd.randrange(len(whole) + 1) if rnd.random() < 0.3 else len(whole)
    return [whole[:cut], rnd.choice((0, 0, 0, 0.1, 2.0)), whole[cut:]]

  def __call__(self, seed):
    from jaxalign.rewards import make_reward
    rnd = random.Random(seed)
    self.answer = self._answer(rnd)
    url = f"http://127.0.0.1:{self._server.server_address[1]}/score"
    retries = rnd.randrange(2)

    def read():
      reward = make_reward((f"{url}#timeout=0.4&retries={retries}",), (1.0,))
      scores = reward.terms(np.zeros((2, 8, 8, 3), np.uint8), ["a", "b"])[reward.name]
      if scores.shape != (2,) or not np.isfinite(scores).all():
        raise Fault(f"scores {scores!r}")
    return outcome(read, url)


class Commands:
  """Command lines that cannot work: status 2, one line, no traceback."""
  count = 2000
  _COMMANDS = ("launch", "launch", "launch", "launch", "sample", "sample", "evaluate", "export",
               "compare", "fid", "lpips", "vote")
  _WORDS = ("", "0", "-1", "1", "nan", "inf", "-inf", "1e400", "99999999999999999999", "4294967296",
            "2147483648", "True", "None", "()", "(1,)", "('a', 'b')", "[", "{'a': 1}", "a b", "\0",
            "é", "no/where", "/dev/null", "/", ".", "jaxalign:", "jaxalign:nothing", "x.json",
            "http://", "http://[", "https://me:pw@127.0.0.1:9/#retries=x", "a.py:f", "--", "=",
            "1.5", "'", "a" * 5000)

  def __init__(self, folder):
    import runs
    self._folder = folder
    self._keys = []

    def walk(tree, path):
      for key, value in tree.items():
        if hasattr(value, "items"):
          walk(value, f"{path}.{key}")
        else:
          self._keys.append(f"{path}.{key}")
    walk(runs.recipe(), "config")
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a cat\n")
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "config.json").write_text('{"config": {"method": 3}}')
    (folder / "broken" / "model_index.json").write_text("[1]")
    self._root = runs.ROOT

  def argv(self, rnd) -> list[str]:
    name = rnd.choice(self._COMMANDS)
    word = lambda: rnd.choice(self._WORDS + (str(self._folder / "empty"),
                                             str(self._folder / "broken")))
    flags = {"sample": ("checkpoint", "prompts", "output", "n", "seed", "steps", "guidance", "eta",
                        "height", "batch", "dtype", "negative_prompt"),
             "evaluate": ("checkpoint", "base", "prompts", "output", "samples", "reward", "judge",
                          "seed", "steps", "batch"),
             "export": ("checkpoint", "format", "output", "dtype"),
             "compare": ("runs", "output"), "fid": ("weights", "images", "reference", "batch"),
             "lpips": ("weights", "heads", "images", "reference", "network", "batch"),
             "vote": ("checkpoint", "against", "prompts", "output", "n", "seed", "votes", "repeats",
                      "voters", "alpha", "port")}
    if name == "launch":
      recipe = rnd.choice(("nabla_gfn", "ddpo", "mapo", "dno", "best_of_n", "pretrain_emoji_vae",
                           "draft", "nothing"))
      arg = rnd.choice((":smoke", ":smoke", "", ":nothing", ":emoji,x"))
      args = [f"--config={self._root / 'configs' / recipe}.py{arg}"]
      for _ in range(rnd.randrange(4)):
        key = rnd.choice(self._keys) if rnd.random() < 0.9 else f"config.{word()}"
        args.append(f"--{key}={word()}")
      # Last, so that it holds: whatever else is sound, this is no file, and nothing begins.
      last = ("--config.task.artwork=no/where.npz" if recipe.startswith("pretrain")
              else "--config.data.eval_prompts=no/where.txt")
      return [name, *args, f"--workdir={self._folder / 'run'}", last]
    args = [f"--{flag}={word()}" for flag in flags[name] if rnd.random() < 0.8]
    if rnd.random() < 0.2:
      args.append(rnd.choice(("--nothing=1", "stray", "--", "--n", "-x", "--help=3")))
    # No folder of a run or model: /dev/null is none.
    poison = {"compare": "--runs=/dev/null", "fid": "--images=/dev/null",
              "lpips": "--images=/dev/null"}.get(name, "--checkpoint=/dev/null")
    return [name, *args, poison]

  def run(self, name: str, args: list[str]) -> tuple[int | None, str]:
    """Exit status and what was printed to stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [name, *args]
    try:
      with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
          contextlib.chdir(self._folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
          runpy.run_module(f"jaxalign.{name}", run_name="__main__", alter_sys=True)
          status = None
        except SystemExit as end:
          status = end.code
    finally:
      sys.argv = argv
    return status, err.getvalue()

  def __call__(self, seed):
    name, *args = self.argv(random.Random(seed))
    status, err = self.run(name, args)
    lines = err.strip().splitlines()
    if status != 2 or "Traceback" in err or len(lines) != 1 or not lines[0].startswith("error: "):
      raise Fault(f"jaxalign.{name} {args!r}"[:600] + f": status {status}, {err[-600:]!r}")
    return "refused"


# A process of its own between this one and a command: the kernel counts the memory of whoever
# starts a program as the program's, and a process that ran many tests has gigabytes.
_MEASURE = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(json.dumps([os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime,
                  used.ru_maxrss]))
os._exit(0)
"""


class Processes(Commands):
  """More of them, each in a process of its own, as whoever types it has it."""
  count = 50

  def run(self, name, args):
    command = [sys.executable, "-m", f"jaxalign.{name}", *(arg.replace("\0", "") for arg in args)]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], cwd=self._folder, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": str(self._root)}, capture_output=True, check=True)
    status, seconds, kilobytes = json.loads(done.stdout)
    if seconds > 10 or kilobytes > 2 * 2 ** 20:
      raise Fault(f"jaxalign.{name} {args!r}: {seconds:.1f} s, {kilobytes} kB")
    return status, done.stderr

  def __call__(self, seed):
    return super().__call__(Commands.count + seed)


class Checkpoints:
  """Single bits of a checkpoint's files: never other numbers than were saved."""
  count = 200

  def __init__(self, folder):
    import jax.numpy as jnp

    from jaxalign.storage.checkpoint import Checkpointer
    rng = np.random.default_rng(0)
    self._state = {f"layer_{i}": jnp.asarray(rng.standard_normal((64, 96)), jnp.float32)
                   for i in range(4)}
    self._state |= {"zeros": jnp.zeros((64, 64)), "count": jnp.asarray(3, jnp.int32),
                    "half": jnp.asarray(rng.standard_normal(512), "bfloat16")}
    self._folder, self._progress = folder / "checkpoints", {"seconds": 1.5, "stopped": ""}
    saver = Checkpointer(self._folder)
    saver.save(1, self._state, self._progress)
    saver.close()
    self._files = sorted(f for f in (self._folder / "1").rglob("*") if f.is_file())

  def __call__(self, seed):
    from jaxalign.storage.checkpoint import Checkpointer
    rnd = random.Random(seed)
    sizes = [f.stat().st_size for f in self._files]
    # The arrays' own file has most bytes; every other seed is for the files that describe them.
    file = rnd.choices(self._files, sizes)[0] if seed % 2 else rnd.choice(
        [f for f, size in zip(self._files, sizes) if size])
    good = file.read_bytes()
    place = rnd.randrange(len(good))
    file.write_bytes(good[:place] + bytes([good[place] ^ 1 << rnd.randrange(8)]) + good[place + 1:])

    def read():
      with contextlib.closing(Checkpointer(self._folder)) as checkpoints:
        state, progress = checkpoints.restore(self._state)
      for name, a in self._state.items():
        if np.asarray(state[name]).tobytes() != np.asarray(a).tobytes():
          raise Fault(f"{name} came back changed, after a flip in {file}")
      if progress != self._progress:
        raise Fault(f"the progress came back changed: {progress}")
    try:
      return outcome(read, str(self._folder))
    finally:
      file.write_bytes(good)


KINDS = {kind.__name__.lower(): kind for kind in (
    Pictures, Json, Parquet, Safetensors, Lora, Http, Commands, Processes, Checkpoints)}
