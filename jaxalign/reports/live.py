"""The page of runs that go on, served on this machine and made anew when they have looked."""
import contextlib
import http.server
import pathlib
import threading

from jaxalign.errors import UserError
from jaxalign.reports.page import page
from jaxalign.reports.reading import read_run


def stamp(folders: list[pathlib.Path]) -> str:
  """Changes whenever a run has something new to show."""
  files = [folder / name for folder in folders
           for name in ("summary.json", "metrics.jsonl", "evaluations/watch.npz")]
  return "-".join(str(file.stat().st_mtime_ns) if file.exists() else "0" for file in files)


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers `/` with the page and `/stamp` with its age; nothing else is there."""
  folders: list[pathlib.Path] = []
  kept: tuple[str, str] = ("", "")

  def do_GET(self):
    # Another name for this machine, in a request that a foreign page made, is not answered.
    host = self.headers.get("Host", "").rsplit(":", 1)[0]
    if host not in ("127.0.0.1", "localhost"):
      return self._answer(403, "not this machine", "text/plain")
    if self.path == "/stamp":
      return self._answer(200, stamp(self.folders), "text/plain")
    if self.path != "/":
      return self._answer(404, "not here", "text/plain")
    now = stamp(self.folders)
    if self.kept[0] != now:
      try:
        type(self).kept = now, page([read_run(folder) for folder in self.folders], now)
      except UserError as error:          # a file that is being written; the next look is whole
        return self._answer(503, f"{error}\n", "text/plain")
    self._answer(200, self.kept[1], "text/html")

  def _answer(self, status: int, text: str, kind: str) -> None:
    body = text.encode()
    self.send_response(status)
    self.send_header("Content-Type", f"{kind}; charset=utf-8")
    self.send_header("Content-Length", str(len(body)))
    self.send_header("Cache-Control", "no-store")
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    del args


@contextlib.contextmanager
def serving(folders: list[pathlib.Path], port: int):
  """Serves in a thread; yields the port.

  Raises:
    UserError: a folder holds no run, or the port is taken.
  """
  for folder in folders:
    read_run(folder)
  handler = type("Handler", (_Handler,), {"folders": folders})
  try:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
  except OSError as error:
    raise UserError(f"--port={port}: {error}; 0 takes one that is free") from error
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield server.server_address[1]
  finally:
    server.shutdown()
    server.server_close()


def serve(folders: list[pathlib.Path], port: int) -> None:
  """Until Ctrl-C."""
  with serving(folders, port) as port, contextlib.suppress(KeyboardInterrupt):
    print(f"http://127.0.0.1:{port}/ ; Ctrl-C ends it", flush=True)
    threading.Event().wait()
