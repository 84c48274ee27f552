"""Lines of text files as people have them: any mark at the beginning, any end of line."""
import pathlib

from jaxalign.errors import UserError


def read_lines(file: pathlib.Path, what: str) -> list[str]:
  """Lines of a UTF-8 file without their ends; a byte order mark at the beginning is no content.

  Only "\\n" ends a line: U+2028, U+0085 and form feeds, where `str.splitlines` cuts as well, occur
  inside captions.

  Args:
    what: names the file in messages, such as `data.prompts=FILE`.
  Raises:
    UserError: the file cannot be read, or is not UTF-8.
  """
  try:
    text = file.read_text(encoding="utf-8-sig")
  except OSError as error:
    raise UserError(f"{what}: {error.strerror or error}") from error
  except UnicodeDecodeError as error:
    raise UserError(f"{what}: not UTF-8 text ({error.reason} at byte {error.start}); save it as "
                    "UTF-8") from error
  return [line.removesuffix("\r") for line in text.split("\n")]
