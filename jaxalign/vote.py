"""Command line: `python -m jaxalign.vote --checkpoint=DIR [--against=DIR] --output=DIR`.

People choose between two pictures in a browser. `DIR` of the first two is a folder of
`jaxalign.sample`, or a model (a run's folder, a checkpoint directory) whose pictures are drawn
first, for `--prompts=FILE`. One model: pairs of its pictures, to train on. `--against`, once for
each other model: which is preferred, blind. Without `--checkpoint`, counts what `--output` holds.
Ctrl-C ends the vote; the same command goes on with it. With `--voter=vlm:URL#model=NAME`, once for
each, a vision-language model votes in place of people. Writes `votes.jsonl`, `pairs.parquet`, on
which `--config.data.pairs=DIR` trains, and `verdict.json`.
"""
import contextlib
import importlib.util
import json
import pathlib
import signal
import socket
import sys
import threading

from jaxalign.config.command import Flags, run_command
from jaxalign.config.credentials import is_loopback
from jaxalign.config.places import existing, model_path
from jaxalign.errors import UserError
from jaxalign.storage.files import whole

_FLAGS = Flags()
_CHECKPOINT = _FLAGS.define("string", "checkpoint", None, "Model, or folder of its pictures.")
_AGAINST = _FLAGS.define("multi_string", "against", [], "Another; once for each of several.")
_PROMPTS = _FLAGS.define("string", "prompts", None, "As of jaxalign.sample, for models.")
_OUTPUT = _FLAGS.define("string", "output", None, "Folder of the vote.")
_N = _FLAGS.define("integer", "n", 2, "Pictures per prompt to draw.", lower_bound=1)
_SEED = _FLAGS.define_seed("Of the pictures' noise and of what is asked.")
_VOTES = _FLAGS.define("integer", "votes", 100, "Asked of each voter, at most.", lower_bound=1)
_REPEATS = _FLAGS.define("float", "repeats", 0.1, "Share of them asked again, sides swapped.",
                         lower_bound=0.0, upper_bound=0.5)
_VOTERS = _FLAGS.define("list", "voters", ["me"], "Names, with commas; each gets a link.")
_VOTER = _FLAGS.define("multi_string", "voter", [], "vlm:URL#model=NAME, a model that votes; once "
                       "for each of several.")
_JUDGE = _FLAGS.define("string", "judge", None, "Scorer, as in reward.names: pairs of which it is "
                       "least sure are asked more often.")
_ALPHA = _FLAGS.define("float", "alpha", 0.05, "Error rate of the rule that ends a vote between "
                       "two models early; 0 never ends it.", lower_bound=0.0, upper_bound=0.5)
_HOST = _FLAGS.define("string", "host", "127.0.0.1", "Address to serve on; 0.0.0.0 for others.")
_PORT = _FLAGS.define("integer", "port", 8765, "Port; 0 for any that is free.", lower_bound=0,
                      upper_bound=65535)


def report(result: dict) -> str:
  """The verdict in a few lines."""
  lines = [f"{result['votes']} votes by {result['voters']} voter(s) on {result['prompts']} prompts"]
  if rate := result.get("win_rate"):
    low, high = rate["interval"]
    tuned, base = result["models"]
    who = "voters like these" if rate["clusters"] != "prompts" else "these voters"
    lines.append(f"{tuned} is preferred to {base} in {rate['rate']:.1%} of votes, 95 % interval "
                 f"{low:.1%} to {high:.1%} ({who}, new prompts)")
    if result["decided"]:
      lines.append(f"decided at error rate {result['alpha']:g}")
    elif more := result.get("votes_to_decide"):
      lines.append(f"not decided; about {more} more votes would, if the rate stays")
    elif result["alpha"]:
      lines.append("not decided; no number of votes on these prompts would, if the rate stays")
  if fit := result.get("bradley_terry"):
    for name, s, sem in zip(result["models"], fit["strength"], fit["sem"]):
      lines.append(f"strength {s:+.2f} ± {sem:.2f} log odds  {name}")
  if shared := result.get("agreement"):
    lines.append(f"two voters agree on {shared['same']:.0%} of {shared['pairs']} shared pairs"
                 + (f" (alpha {shared['alpha']:.2f})" if "alpha" in shared else ""))
  for voter, own in result.get("self_agreement", {}).items():
    lines.append(f"{voter} agrees with themselves on {own['same']:.0%} of {own['repeats']} repeats")
  return "\n".join(lines)


def main(argv) -> None:
  del argv
  voters = {}
  if _VOTER.value:
    from jaxalign.votes.judge import open_voters
    voters = open_voters(_VOTER.value)
  else:
    for name in ("starlette", "uvicorn"):
      if importlib.util.find_spec(name) is None:
        raise UserError(f"jaxalign.vote needs {name}: pip install 'jaxalign[vote]'")
  from jaxalign.votes.ballot import Ballot
  from jaxalign.votes.gallery import Gallery, open_gallery
  from jaxalign.votes.store import Log, read_events
  output = pathlib.Path(_OUTPUT.value)
  if _CHECKPOINT.value is None and not (output / "ballot.json").is_file():
    raise UserError(f"--checkpoint is required: {output} holds no vote to count")
  models = [(_CHECKPOINT.value, "checkpoint"), *((name, "against") for name in _AGAINST.value)]
  for name, flag in models if _CHECKPOINT.value is not None else ():
    _check_source(name, flag)
  try:
    with contextlib.closing(Log(output)) as log:
      if _CHECKPOINT.value is None:
        gallery = Gallery.load(output)
      else:
        folders = [_pictures(name, output / "drawn" / str(k))
                   for k, (name, _) in enumerate(models)]
        gallery = open_gallery([name for name, _ in models], folders, output)
      doubts = None
      if _JUDGE.value and _CHECKPOINT.value is not None:
        from jaxalign.votes.doubt import open_doubts
        doubts = open_doubts(_JUDGE.value, gallery, output)
      ballot = Ballot(gallery, log.append, read_events(output), votes=_VOTES.value,
                      repeats=0.0 if voters else _REPEATS.value, seed=_SEED.value, doubts=doubts)
      try:
        if voters:                       # who are asked in both orders anyway
          from jaxalign.votes.judge import vote
          for voter, judge in voters.items():
            vote(ballot, output, voter, judge, lambda: _decided(ballot))
        elif _CHECKPOINT.value is not None:
          _serve(ballot, output)
      finally:
        _count(ballot, output)
  except OSError as error:
    raise UserError(f"--output={output}: {error}") from error


def _check_source(name: str, flag: str) -> None:
  """UserError unless `name` is a folder of `jaxalign.sample`, or a model that can draw."""
  from jaxalign.votes.gallery import is_samples
  if is_samples(pathlib.Path(name)):
    return
  if not _PROMPTS.value:
    raise UserError(f"--{flag}={name}: no folder of jaxalign.sample; for a model, name --prompts")
  existing(model_path(name), f"--{flag}=")


def _pictures(name: str, drawn: pathlib.Path) -> pathlib.Path:
  """The folder of `jaxalign.sample` that `name` is, or that is drawn from the model there."""
  from jaxalign.votes.gallery import is_samples
  if is_samples(pathlib.Path(name)):
    return pathlib.Path(name)
  from jaxalign.votes.drawing import draw
  return draw(name, _PROMPTS.value, drawn, n=_N.value, seed=_SEED.value)


def _decided(ballot) -> bool:
  """Whether the vote may end early."""
  from jaxalign.votes.statistics import evidence, rate_between, table
  return bool(len(ballot.gallery.models) == 2 and _ALPHA.value
              and evidence(rate_between(table(ballot))) >= 1 / _ALPHA.value)


def _serve(ballot, output: pathlib.Path) -> None:
  """Until Ctrl-C or SIGTERM."""
  from jaxalign.votes.server import make_app, open_links, serving
  voters = [name.strip() for name in _VOTERS.value if name.strip()]
  if not voters:
    raise UserError("--voters is empty: name at least one")
  links = open_links(output, voters)
  loopback = is_loopback(_HOST.value)
  app = make_app(ballot, output, links, lambda: _decided(ballot), loopback)
  stop = threading.Event()
  before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    with serving(app, _HOST.value, _PORT.value) as port:
      name = socket.gethostname() if _HOST.value in ("0.0.0.0", "::") else _HOST.value
      host = f"[{name}]" if ":" in name else name
      for voter, secret in links.items():
        print(f"{voter}: http://{host}:{port}/v/{secret}/")
      print(f"{ballot.total} pairs for each voter; Ctrl-C ends the vote and counts it", flush=True)
      stop.wait()
  finally:
    for s, handler in before.items():
      signal.signal(s, handler)


def _count(ballot, output: pathlib.Path) -> None:
  from jaxalign.votes.pairs import write_pairs
  from jaxalign.votes.statistics import verdict
  rows, result = write_pairs(ballot, output), verdict(ballot, _ALPHA.value)
  with whole(output / "verdict.json") as file:
    file.write_text(json.dumps(result, indent=2) + "\n")
  print(report(result))
  print(f"{rows} pairs in {output / 'pairs.parquet'}, verdict in {output / 'verdict.json'}")


if __name__ == "__main__":
  sys.exit(run_command(main, _FLAGS, required=("output",)))
