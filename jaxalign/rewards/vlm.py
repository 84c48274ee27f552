"""A vision-language model as a judge, behind the chat API of OpenAI as vLLM and SGLang speak it.

In `reward.names` as `vlm:URL[,URL...]#model=NAME&ask=TEXT`; docs/rewards.md has the settings. The
score of a picture is the expected value of the answer,

  sum_a v(a) P(a) / sum_a P(a),   P(a) = sum of exp(logprob) over the spellings of the answer a

over the tokens that the server lists where the model's answer begins. A server that gives no
log-probabilities is taken at its word: the value of the answer that its text says.
"""
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import unicodedata
import urllib.parse

import numpy as np

from jaxalign.config.credentials import JUDGE, VARIABLE, hidden, is_loopback, judges, secrets
from jaxalign.devices import callbacks, processes
from jaxalign.errors import UserError
from jaxalign.rewards import HostReward
from jaxalign.rewards.answers import Answers
from jaxalign.rewards.client import MOST_RETRIES, MOST_SECONDS, Again, Client, Question, host_of
from jaxalign.rewards.http import encode
from jaxalign.rewards.settings import read_settings

MASS = 0.5               # of the probability that the answers must have
UNPARSABLE = 0.05        # share of answers from which on the run ends, if there are three
_TOP = (20, 5, 0)        # log-probabilities asked for: servers have limits, 0 asks for none
_MOST_ANSWERS = 20
_BYTES, _TOKEN_BYTES = 2 ** 16, 2 ** 13       # an answer may be so large, and more for each token
_EXCERPT = 200           # characters of an unparsable answer that are kept
_OWN = ("messages", "model", "logprobs", "top_logprobs")     # not to be set by `extra`
_AROUND = " \t\r\n\u2581\u0120\u010a\"'`*_.,:;!?()[]{}<>#-"   # of a word; BPE's spaces too


@dataclasses.dataclass(frozen=True)
class Settings:
  """What follows `#`.

  Attributes:
    model: as the server calls it. ask: the question; `{prompt}` in it is the picture's prompt;
      `@FILE` reads it. answers: `first,second,...`, words from the best (1) to the worst (0) or
      numbers, or `LOW..HIGH`, whole numbers.
    key: environment variable with the bearer token. extra: JSON object of further fields of the
      request; null takes one out. tokens: of an answer, at most.
    timeout: seconds until an answer must be there as a whole. retries: after a failure. parallel:
      requests under way at a time, for each server. name: in logs.
  """
  model: str = ""
  ask: str = ""
  answers: str = "yes,no"
  key: str = ""
  extra: str = "{}"
  tokens: int = 8
  timeout: float = 60.0
  retries: int = 4
  parallel: int = 8
  name: str = ""

  def __post_init__(self):
    for key in ("model", "ask"):
      if not getattr(self, key).strip():
        raise UserError(f"{key} is missing: write vlm:URL#model=NAME&ask=TEXT")
    for key, low, high in (("tokens", 1, 4096), ("timeout", 1e-3, MOST_SECONDS),
                           ("retries", 0, MOST_RETRIES), ("parallel", 1, 256)):
      value = getattr(self, key)
      if not low <= value <= high:
        raise UserError(f"{key}={value} is outside [{low:g}, {high:g}]")


def vlm_reward(name: str) -> HostReward:
  """The reward that `name`, `vlm:URL#...`, describes: pictures are judged one by one.

  Raises:
    UserError: of a name that is none; and, when called, what `Client.ask` raises, and more than
      `UNPARSABLE` of all answers being none that was asked for.
  """
  judge = Judge(name)
  low, high = min(judge.values.values()), max(judge.values.values())

  def score(images, prompts):
    values = judge.judge([((image,), prompt) for image, prompt in zip(images, prompts)])
    return np.asarray([(low + high) / 2 if value is None else value for value in values])

  return HostReward(hidden(name), score, f"expected answer, {low:g} to {high:g}", keep=judge.keep)


class Judge:
  """A question about pictures, and the servers that answer it.

  Args:
    name: as in `reward.names`. where: the config key or flag that has it.
    defaults: settings in place of those that are missing there.
  Attributes:
    settings: what was read. name: for logs. values: of the answers, by their plain spelling.
    unparsable: how many of the `total` answers so far were none that was asked for.
  Raises:
    UserError: the name is none; names it, without credentials.
  """

  def __init__(self, name: str, where: str = "reward.names", **defaults: str):
    label = hidden(name)
    urls, _, fragment = name.removeprefix(JUDGE).partition("#")
    given = urllib.parse.parse_qsl(fragment, keep_blank_values=True)
    fragment = urllib.parse.urlencode({**defaults, **dict(given)})
    self.settings = read_settings(label, fragment, Settings, where)
    self.name = self.settings.name or self.settings.model
    try:
      urls = [_endpoint(url) for url in judges(urls)]
      self.values = read_answers(self.settings.answers)
      self._ask = _text(self.settings.ask)
      self._extra = _extra(self.settings.extra)
      key = _key(self.settings.key, urls)
    except UserError as error:
      raise UserError(f"{where}: '{label}': {error}") from error
    self.client = Client(
        name, urls, secrets(name), timeout=self.settings.timeout, retries=self.settings.retries,
        parallel=self.settings.parallel, key=key, where=where)
    self.top, self._said = 0, set()          # the index of `_TOP` that the servers let through
    self._answers, self._unparsable = Answers(), []
    self.total = self.unparsable = 0

  def keep(self, folder: pathlib.Path) -> None:
    """Answers are kept in this folder of a run from now on, and those kept there are known."""
    self._answers.keep(folder, self._digest([])[:16])

  def judge(self, items: list[tuple]) -> list[float | None]:
    """The expected value of the answer for each `(images, prompt)`; None where there is none.

    Nothing is asked twice: neither what this process asked before nor what is kept.

    Args:
      items: images `[H, W, 3]` uint8 in the order in which they are shown, and the prompt.
    """
    keys, known, questions = [], {}, {}
    for images, prompt in items:
      question = _Picture(self, images, self._ask.replace("{prompt}", prompt))
      keys.append(question.key)
      if question.key in self._answers:
        known[question.key] = self._answers[question.key]
      else:
        questions[question.key] = question
    known |= zip(questions, self.client.ask(list(questions.values())))
    answers = [known[key] for key in keys]
    unparsable = [answer for answer in answers if isinstance(answer, str)]
    self.total += len(answers)
    self.unparsable += len(unparsable)
    self._unparsable = (self._unparsable + unparsable)[-3:]
    callbacks.tally("train/reward_unparsable", len(unparsable))
    if self.unparsable >= 3 and self.unparsable > UNPARSABLE * self.total:
      shown = ", ".join(repr(answer) for answer in self._unparsable)
      raise self.client.fault(
          f"{self.unparsable} of {self.total} answers are none of {', '.join(self.values)}, such "
          f"as {shown}; ask for one word, choose answers that are one token each, or allow more "
          "#tokens= before them")
    return [None if isinstance(answer, str) else answer for answer in answers]

  def answered(self, key: str, answer: float | str) -> None:
    """An answer has come: its value, or what a text says that is none."""
    self._answers.add(key, answer)

  def lower(self, asked: int, why: str) -> None:
    """A server does not give `_TOP[asked]` log-probabilities: fewer are asked for from now on."""
    self.top = max(self.top, asked + 1)
    if _TOP[self.top] == 0:
      self.say(f"{why}, so answers count as the text says them, not by their probability")

  def say(self, text: str) -> None:
    """A line, once."""
    if text not in self._said:
      self._said.add(text)
      processes.say(f"vlm {self.name}: {self.client.without_secrets(text)}")

  def request(self, pictures: list[str], question: str, top: int) -> dict:
    """The request about these pictures, PNG in base64."""
    content = []
    for number, picture in enumerate(pictures, 1):
      if len(pictures) > 1:
        content.append({"type": "text", "text": f"Picture {number}:"})
      content.append({"type": "image_url",
                      "image_url": {"url": f"data:image/png;base64,{picture}"}})
    content.append({"type": "text", "text": question})
    request = {"model": self.settings.model, "messages": [{"role": "user", "content": content}],
               "temperature": 0, "max_tokens": self.settings.tokens}
    if _TOP[top]:
      request |= {"logprobs": True, "top_logprobs": _TOP[top]}
    return {key: value for key, value in {**request, **self._extra}.items() if value is not None}

  def _digest(self, rest: list) -> str:
    """Of what an answer depends on, beside pictures and question."""
    fixed = [self.settings.model, self._ask, self.values, self.settings.tokens, self._extra]
    return hashlib.sha256(json.dumps([fixed, rest], sort_keys=True).encode()).hexdigest()[:32]

  def key(self, images, question: str) -> str:
    digests = [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
               for image in images]
    return self._digest([question, [image.shape for image in images], digests])


class _Picture(Question):
  """The question about one picture, or two."""

  def __init__(self, judge: Judge, images, question: str):
    self._judge, self._images, self._question = judge, images, question
    self.key = judge.key(images, question)
    self.most, self.what = _BYTES + _TOKEN_BYTES * judge.settings.tokens, "one question"
    self._top, self._pictures = 0, None

  def content(self):
    self._pictures = self._pictures or [encode(image) for image in self._images]
    self._top = self._judge.top
    return json.dumps(self._judge.request(self._pictures, self._question, self._top)).encode()

  def refused(self, status, text):
    if "logprobs" not in text or not _TOP[self._top] or status in (401, 403, 404):
      return False
    self._judge.lower(self._top, f"the server refuses log-probabilities (status {status})")
    return True

  def read(self, body):
    judge, text = self._judge, body.decode(errors="replace")
    if text.lstrip().startswith(("data:", ":", "event:", "id:")):
      said, logprobs = _streamed(judge.client, text)
    else:
      said, logprobs = _said(judge.client, text)
    if logprobs:
      answer = expected(logprobs, judge.values)
    else:
      if _TOP[self._top] and said.strip():
        judge.lower(len(_TOP) - 2, "the server answers without log-probabilities")
      answer = spoken(said, judge.values)
    if answer is None:
      answer = judge.client.without_secrets(said)[:_EXCERPT]
    judge.answered(self.key, answer)             # now: others may fail
    self._pictures = None
    return answer


def _said(client: Client, text: str) -> tuple[str, list]:
  """Text and log-probabilities of an answer in one piece."""
  try:
    answer = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise client.fault("its answer is not JSON", error) from error
  choice = _choice(client, answer)
  if choice is None or not isinstance(choice.get("message"), dict):
    raise client.fault(f"its answer has no message: {text[:200]!r}")
  return _content(choice["message"]), _logprobs(choice)


def _streamed(client: Client, text: str) -> tuple[str, list]:
  """The same of an answer as a stream of events; Again if the stream ends before its end."""
  said, logprobs, ended = "", [], False
  for event in re.split(r"(?:\r\n|\r|\n){2}", text):
    lines = [line[5:].removeprefix(" ") for line in re.split(r"\r\n|\r|\n", event)
             if line.startswith("data:")]
    if not lines:
      continue
    if lines == ["[DONE]"]:
      ended = True
      break
    try:
      piece = json.loads("\n".join(lines))
    except (ValueError, RecursionError) as error:
      raise Again("its stream breaks off", error) from error
    choice = _choice(client, piece, streamed=True)
    if choice is not None:                       # a piece without one tells what was used
      said += _content(choice.get("delta"))
      logprobs += _logprobs(choice)
      ended = ended or bool(choice.get("finish_reason"))
  if not ended:
    raise Again("its stream breaks off")
  return said, logprobs


def _choice(client: Client, answer, streamed: bool = False) -> dict | None:
  """The first choice; None if there is none. Servers may report errors in place of it."""
  if isinstance(answer, dict) and (answer.get("error") or answer.get("object") == "error"):
    error = answer.get("error") or answer
    says = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
    if streamed:
      raise Again(f"an error in its stream: {says!r}")
    raise client.fault(f"answers with an error: {says!r}")
  choices = answer.get("choices") if isinstance(answer, dict) else None
  first = choices[0] if isinstance(choices, list) and choices else None
  return first if isinstance(first, dict) else None


def _content(message) -> str:
  """The text of a message, or of a piece of one."""
  content = message.get("content") if isinstance(message, dict) else None
  return content if isinstance(content, str) else ""


def _logprobs(choice: dict) -> list:
  """`[(token, [(token, logprob), ...]), ...]`, for each token; [] if there are none.

  Each token is among those listed for its place, once more if the server left it out.
  """
  content = choice.get("logprobs")
  content = content.get("content") if isinstance(content, dict) else None
  places = []
  for place in content if isinstance(content, list) else []:
    listed = place.get("top_logprobs") if isinstance(place, dict) else None
    if not isinstance(listed, list) or not listed:
      return []
    tokens = [(entry["token"], float(entry["logprob"])) for entry in [*listed, place]
              if isinstance(entry, dict) and isinstance(entry.get("token"), str)
              and isinstance(entry.get("logprob"), (int, float)) and entry["logprob"] <= 1e-3]
    if not tokens or tokens[-1][0] != place.get("token"):
      return []
    if any(token == place["token"] for token, _ in tokens[:-1]):
      tokens.pop()
    places.append((place["token"], tokens))
  return places


def expected(logprobs: list, values: dict[str, float]) -> float | None:
  """The expected value over the answers, where the text begins; None if they have too little mass.

  Args:
    logprobs: as of `_logprobs`. values: value of each answer by its plain spelling.
  """
  for token, listed in logprobs:
    if not plain(token):                         # blanks and quotes before the word
      continue
    mass = dict.fromkeys(values, 0.0)
    for spelling, logprob in listed:
      if plain(spelling) in mass:
        mass[plain(spelling)] += math.exp(min(logprob, 0.0))
    total = sum(mass.values())
    if total < MASS:
      return None
    return sum(values[answer] * p for answer, p in mass.items()) / total
  return None


def spoken(text: str, values: dict[str, float]) -> float | None:
  """The value of the answer that a text begins with, or the only one in it; None if there is none.
  """
  words = [plain(word) for word in text.split()]
  words = [word for word in words if word]
  if plain(text) in values:                      # answers of several words
    return values[plain(text)]
  if words and words[0] in values:
    return values[words[0]]
  found = {word for word in words if word in values}
  return values[found.pop()] if len(found) == 1 else None


def plain(text: str) -> str:
  """A spelling without case, blanks and punctuation around it."""
  return unicodedata.normalize("NFKC", text).strip(_AROUND).casefold()


def read_answers(text: str) -> dict[str, float]:
  """`yes,no` or `1..5` as the value of each plain spelling, in that order.

  Raises:
    UserError: fewer than two, too many, or ones that a first token could not tell apart.
  """
  if found := re.fullmatch(r"\s*(-?\d{1,4})\.\.(-?\d{1,4})\s*", text):
    low, high = map(int, found.groups())
    words = [str(i) for i in range(low, min(high, low + _MOST_ANSWERS) + 1)]
  else:
    words = [word.strip() for word in text.split(",")]
  spelt = [plain(word) for word in words]
  if not 2 <= len(words) <= _MOST_ANSWERS or "" in spelt:
    raise UserError(f"answers={text}: write 2 to {_MOST_ANSWERS} words with commas, the best first,"
                    " or LOW..HIGH")
  for a in spelt:
    for b in spelt:
      if spelt.count(a) > 1 or (a != b and b.startswith(a)):
        raise UserError(f"answers={text}: {a!r} is or begins another answer, and the first token "
                        "could not tell which one is meant; choose other ones, such as 1..5")
  try:
    return {word: float(number) for word, number in zip(spelt, words)}
  except ValueError:
    return {word: 1 - i / (len(words) - 1) for i, word in enumerate(spelt)}


def _endpoint(url: str) -> str:
  """Where the chat API is: below `URL`, `URL/v1`, or what is its whole path already."""
  try:
    host_of(url)
  except ValueError as error:
    raise UserError(f"{hidden(url)} is no URL; write vlm:http://HOST:PORT/v1#...") from error
  parts = urllib.parse.urlsplit(url)
  path = parts.path.rstrip("/")
  if not path.endswith("/chat/completions"):
    path = (path or "/v1") + "/chat/completions"
  return urllib.parse.urlunsplit(parts._replace(path=path))


def _text(ask: str) -> str:
  if not ask.startswith("@"):
    return ask
  try:
    return pathlib.Path(ask[1:]).read_text(encoding="utf-8").strip()
  except (OSError, ValueError) as error:
    raise UserError(f"ask={ask}: the file cannot be read ({error})") from error


def _extra(text: str) -> dict:
  try:
    extra = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"extra={text[:200]} is not JSON (write & in it as %26): {error}") from error
  if not isinstance(extra, dict):
    raise UserError(f"extra={text[:200]} is no object in JSON, such as {{\"top_k\": 1}}")
  for key in _OWN:
    if key in extra:
      raise UserError(f"extra={text[:200]}: {key} is not for it to say")
  return extra


def _key(variable: str, urls: list[str]) -> str:
  """The bearer token that the environment has, or none."""
  if not variable:
    return ""
  if not VARIABLE.fullmatch(variable):
    raise UserError("key= takes the name of an environment variable in capitals, such as "
                    "key=OPENAI_API_KEY, never a key itself")
  for url in urls:
    scheme, host, _ = host_of(url)
    if scheme != "https" and not is_loopback(host):
      raise UserError(f"the key is sent over https or to this machine only, not to {hidden(url)}")
    if urllib.parse.urlsplit(url).username is not None:
      raise UserError(f"{hidden(url)} has credentials of its own; leave key= away")
  value = os.environ.get(variable, "").strip()
  if not value or not value.isascii() or not value.isprintable():
    raise UserError(f"key={variable}: the environment variable is not set, or holds no key")
  return value
