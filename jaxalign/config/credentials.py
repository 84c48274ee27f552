"""Credentials in URLs, which are used and never written: not in files, logs or messages."""
import ipaddress
import re
import urllib.parse

_URL = re.compile(r"https?://", re.IGNORECASE)
_SECRET = re.compile(r"key|token|secret|passw|auth|sig|cred", re.IGNORECASE)
_MASK = "***"
JUDGE = "vlm:"           # before the URLs, with commas, of servers that judge pictures
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")    # what the key of such a judge is named by


def secrets(name: str) -> list[str]:
  """Parts of a URL that are credentials: what is before its `@`, values of keys that say so.

  Of the name of a judge also its `key=`, where that is none of a variable but one itself.
  """
  if name.startswith(JUDGE):
    urls, _, settings = name.removeprefix(JUDGE).partition("#")
    found = [secret for url in judges(urls) for secret in secrets(url)]
    keys = re.findall(r"(?:^|&)key=([^&]*)", settings)
    return found + [key for key in keys if key and not VARIABLE.fullmatch(key)]
  if not _URL.match(name):
    return []
  rest = name.split("://", 1)[1]
  host = re.split(r"[/?#]", rest, maxsplit=1)[0]
  found = [host.rpartition("@")[0]]
  query = re.split(r"[?]", rest.partition("#")[0], maxsplit=1)[1:]
  for pair in re.split("[&;]", "".join(query)):
    key, _, value = pair.partition("=")
    if _SECRET.search(key):
      found.append(value)
  return [secret for secret in found if secret]


def judges(urls: str) -> list[str]:
  """The URLs of a list of them, with commas, which they may have as well."""
  return re.split(r",(?=https?://)", urls)


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


def is_loopback(host: str) -> bool:
  """Whether a host name or address is this machine's own: what is sent there stays here."""
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False
