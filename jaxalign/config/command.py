"""What all commands share: flags in, one-line errors out, an exit status that can be trusted."""
import os
import re
import sys
import threading
import time

from absl import flags

from jaxalign.config.fields import MOST
from jaxalign.config.nearest import suggestion
from jaxalign.config.recipes import load_recipe, recipe_path
from jaxalign.config.schema import SEEDS
from jaxalign.errors import Stopped, UserError

LEAVE = 5.0          # seconds that threads have to end after the command


class Flags(flags.FlagValues):
  """The flags of one command: its own, so that several commands can be imported together."""

  def define_seed(self, text: str) -> flags.FlagHolder:
    """The flag `--seed`, of the range that the config key `seed` has."""
    return self.define("integer", "seed", 0, text, upper_bound=SEEDS - 1)

  def define(self, kind: str, *args, **kwargs) -> flags.FlagHolder:
    """Like absl's `DEFINE_kind`; integers are within those of config keys."""
    if kind == "integer":
      kwargs = {"lower_bound": 0, "upper_bound": MOST - 1, **kwargs}
    return getattr(flags, f"DEFINE_{kind}")(*args, flag_values=self, **kwargs)


def run_command(main, flag_values: Flags, required: tuple[str, ...] = (),
                argv: list[str] | None = None) -> int:
  """Parses `flag_values`, calls `main(argv)` and returns the exit status.

  0 if the command finished; 2 with one line on stderr if the user can mend it. Anything else is a
  bug and keeps its traceback.
  """
  argv = list(sys.argv if argv is None else argv)
  if any(arg in ("--help", "-help", "-h") for arg in argv[1:]):
    print((sys.modules[main.__module__].__doc__ or "").strip() + "\n\nFlags:\n")
    for name in flag_values:
      print(f"  --{name}: {flag_values[name].help} (default: {flag_values[name].default})")
    return 0
  status = exit_status(lambda: main(_parse(argv, flag_values, required)))
  threading.Thread(target=_leave_behind, args=(status,), daemon=True).start()
  return status


def _leave_behind(status: int) -> None:
  """Ends the process if threads of the user's code keep it alive after its main thread."""
  threading.main_thread().join()
  until = time.monotonic() + LEAVE
  while any(thread.is_alive() and not thread.daemon for thread in threading.enumerate()):
    if time.monotonic() > until:
      os._exit(status)
    time.sleep(0.1)


def exit_status(main) -> int:
  """Calls `main()`: 0 if it finished, 2 and a line on stderr if the user can mend it.

  130 after Ctrl-C and 143 after SIGTERM, where the same command goes on.
  """
  _hush()
  try:
    main()
    print(end="", flush=True)                # nothing, too, where stdout was closed from the start
  except (UserError, OSError) as error:      # of the latter, a full disk has no key to name
    _last_line(f"error: {error}")
    return 2
  except (MemoryError, RuntimeError) as error:
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _last_line(f"error: out of memory ({' '.join(str(error).split())[:200]}); lower sample.batch "
               "and eval.batch (--batch), or the size of images")
    return 2
  except KeyboardInterrupt:
    _last_line("interrupted; the same command continues the run")
    return 130
  except Stopped as stopped:
    _last_line(f"{stopped}; the same command continues the run")
    return stopped.status
  return 0


def _last_line(text: str) -> None:
  """Prints to stderr, below what stdout still holds, as a log file has both.

  Where stdout cannot be written (a full disk, a closed pipe), what it holds is let go of: as the
  process ends, Python would say so once more.
  """
  try:
    print(end="", flush=True)
  except OSError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  print(text, file=sys.stderr)


def _hush() -> None:
  """Background threads do not show what the main thread is told of, and says in one line."""
  for module, name in ((threading, "excepthook"), (sys, "unraisablehook")):
    shown = getattr(module, name)
    if getattr(shown, "hushed", False):
      continue

    def hook(args, shown=shown):
      closed = isinstance(args.exc_value, RuntimeError) and "loop is closed" in str(args.exc_value)
      if not (closed or isinstance(args.exc_value, OSError)):
        shown(args)
    hook.hushed = True
    setattr(module, name, hook)


def _parse(argv, flag_values, required):
  for i, arg in enumerate(argv[1:-1], 1):
    if arg == "--config":                      # the spelling with a blank
      argv[i:i + 2] = [f"--config={argv[i + 1]}"]
      break
  argv = [argv[0]] + [_shipped(arg) for arg in argv[1:]]
  try:
    rest = flag_values(argv)
  except UserError:
    raise
  except SystemExit:
    raise
  # The config file and its overrides are evaluated inside absl, which lets any of these through.
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError,
          ImportError) as error:
    raise UserError(_explain(error, argv)) from error
  for name in required:
    if flag_values[name].value is None:
      raise UserError(f"--{name} is required")
  if len(rest) > 1:
    raise UserError(f"unexpected argument {rest[1]!r}")
  return rest


def _explain(error: Exception, argv: list[str]) -> str:
  """One line; names the override at fault where absl says only which word it did not find."""
  text = " ".join(str(error).split())
  if isinstance(error, (AttributeError, KeyError)):
    missing = re.search(r"\w+", text)        # the first word; "did you mean" comes after it
    for arg in argv:
      key = arg.removeprefix("--config.").split("=")[0]
      if missing and arg.startswith("--config.") and missing[0] in key.split("."):
        return f"config key {key} is unknown{suggestion(key, _keys(argv))} ({arg})"
  return text


def _keys(argv: list[str]) -> list[str]:
  """Keys of the recipe that `--config` names."""
  file = next((arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")), None)
  tree = load_recipe(file).to_dict() if file else {}
  return [f"{group}.{key}" if key else group for group, values in tree.items()
          for key in (values if isinstance(values, dict) else [""])]


def _shipped(arg: str) -> str:
  """`--config=jaxalign:NAME` -> the file of that recipe; checks that a named file runs.

  absl runs it once more, and would not say where in it something went wrong.
  """
  if not arg.startswith("--config="):
    return arg
  name = recipe_path(arg.removeprefix("--config="))
  load_recipe(name)
  return f"--config={name}"
