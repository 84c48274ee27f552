"""Shared test settings: eight CPU devices, strict numerics, one compilation cache."""
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8")

import jax  # noqa: E402
import pytest  # noqa: E402

from jaxalign.devices import callbacks  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir",
                  str(pathlib.Path(tempfile.gettempdir()) / "jaxalign-test-cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module")
def compile_quickly():
  """For programs that run for milliseconds: XLA leaves out what takes longest to compile."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module", autouse=True)
def left_behind():
  """What callbacks of a file's rewards left is no other file's; and compiled programs are let go
  once they are many, as two processes of tests share a machine."""
  yield
  callbacks.forget()
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) if (
      pathlib.Path("/proc/self/statm").exists()) else 0
  if pages * os.sysconf("SC_PAGE_SIZE") > 3 * 2 ** 30:
    jax.clear_caches()
