"""Exceptions that are no bugs: what the user can mend, and a run that was told to stop."""


class UserError(Exception):
  """Bad input from outside: a config key, a file, a reward function.

  The message is one line and names the config key or file at fault. Commands print it without a
  traceback and exit with status 2; anything else that escapes is a bug and keeps its traceback.
  """


class Stopped(Exception):
  """A run was asked to end and has saved its state; the same command continues it.

  Attributes:
    status: that the process exits with: 143 after SIGTERM, 130 after Ctrl-C.
  """

  def __init__(self, text: str, status: int = 143):
    super().__init__(text)
    self.status = status
