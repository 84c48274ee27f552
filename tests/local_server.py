"""A server in this process, for tests of what asks one."""
import http.server
import threading


class Local(http.server.ThreadingHTTPServer):
  """Answers in a thread of its own, from where it is entered to where it is left."""

  def __enter__(self):
    threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
    return self

  def __exit__(self, *error):
    self.shutdown()
    super().__exit__(*error)
