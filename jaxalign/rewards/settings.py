"""Settings of a reward, after a `#` in its name: `device=cuda&batch=8`."""
import dataclasses
import urllib.parse

from jaxalign.errors import UserError


def read_settings(name: str, fragment: str, kind: type, where: str = "reward.names"):
  """`key=value&key=value` as the dataclass `kind`, whose defaults say what type each value has.

  Args:
    name: of the reward, for messages; `where` is the config key or flag that has it.
  Raises:
    UserError: a key that `kind` does not have, or a value of another type; names the reward.
  """
  types = {field.name: type(field.default) for field in dataclasses.fields(kind)}
  values = {}
  for key, value in urllib.parse.parse_qsl(fragment, keep_blank_values=True):
    if key not in types:
      raise UserError(f"{where}: '{name}': {key} is no setting; there are {', '.join(types)}")
    try:
      values[key] = types[key](value)
    except ValueError as error:
      raise UserError(f"{where}: '{name}': {key}={value} is not a number") from error
  try:
    return kind(**values)
  except UserError as error:
    raise UserError(f"{where}: '{name}': {error}") from error
