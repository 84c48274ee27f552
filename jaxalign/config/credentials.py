"""Credentials in URLs, which are used and never written: not in files, logs or messages."""
import re
import urllib.parse

_URL = re.compile(r"https?://", re.IGNORECASE)
_SECRET = re.compile(r"key|token|secret|passw|auth|sig|cred", re.IGNORECASE)
_MASK = "***"


def secrets(url: str) -> list[str]:
  """Parts of a URL that are credentials: what is before its `@`, values of keys that say so."""
  if not _URL.match(url):
    return []
  rest = url.split("://", 1)[1]
  host = re.split(r"[/?#]", rest, maxsplit=1)[0]
  found = [host.rpartition("@")[0]]
  query = re.split(r"[?]", rest.partition("#")[0], maxsplit=1)[1:]
  for pair in re.split("[&;]", "".join(query)):
    key, _, value = pair.partition("=")
    if _SECRET.search(key):
      found.append(value)
  return [secret for secret in found if secret]


def without(text: str, hidden: list[str]) -> str:
  """The text with these secrets replaced by `***`, also where they stand there decoded."""
  plain = {urllib.parse.unquote(secret) for secret in hidden}
  for secret in sorted({*hidden, *plain}, key=len, reverse=True):
    text = text.replace(secret, _MASK)
  return text


def hidden(value):
  """A name as in `reward.names`, or a list of them, fit to be written; anything else unchanged."""
  if isinstance(value, (list, tuple)):
    return type(value)(map(hidden, value))
  return without(value, secrets(value)) if isinstance(value, str) else value
