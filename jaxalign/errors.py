"""The one exception that means "the user can mend this"."""


class UserError(Exception):
  """Bad input from outside: a config key, a file, a reward function.

  The message is one line and names the config key or file at fault. Commands print it without a
  traceback and exit with status 2; anything else that escapes is a bug and keeps its traceback.
  """
