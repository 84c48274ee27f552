"""A disk that is full, without root: a library before libc's whose writes into a folder fail.

`environment(folder, size)` lets a process, and what it starts, write so many bytes below `folder`;
every later write there fails with ENOSPC, in Python and in native code alike.
"""
import os
import pathlib
import shutil
import subprocess
import tempfile

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long used;

static int full(int fd, size_t count) {
  const char *folder = getenv("FULL_DISK"), *size = getenv("FULL_DISK_SIZE");
  if (!folder || !size) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n <= 0) return 0;
  path[n] = 0;
  if (strncmp(path, folder, strlen(folder))) return 0;
  if (atomic_fetch_add(&used, (long)count) + (long)count <= atol(size)) return 0;
  errno = ENOSPC;
  return 1;
}

#define NEXT(type, name) static type next; if (!next) next = (type)dlsym(RTLD_NEXT, name)
typedef ssize_t (*w)(int, const void *, size_t);
typedef ssize_t (*pw)(int, const void *, size_t, off_t);
typedef ssize_t (*wv)(int, const struct iovec *, int);

ssize_t write(int fd, const void *b, size_t n) {
  NEXT(w, "write"); return full(fd, n) ? -1 : next(fd, b, n);
}
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) {
  NEXT(pw, "pwrite"); return full(fd, n) ? -1 : next(fd, b, n, o);
}
ssize_t pwrite64(int fd, const void *b, size_t n, off_t o) {
  NEXT(pw, "pwrite64"); return full(fd, n) ? -1 : next(fd, b, n, o);
}
ssize_t writev(int fd, const struct iovec *v, int c) {
  size_t n = 0;
  for (int i = 0; i < c; i++) n += v[i].iov_len;
  NEXT(wv, "writev"); return full(fd, n) ? -1 : next(fd, v, c);
}
"""
_LIBRARY = pathlib.Path(tempfile.gettempdir()) / f"jaxalign-full-disk-{os.getuid()}.so"


def available() -> bool:
  """Whether there is a compiler for it."""
  return bool(shutil.which("cc"))


def environment(folder: pathlib.Path, size: int) -> dict[str, str]:
  """`os.environ` for a process that finds the disk full after `size` bytes below `folder`."""
  if not _LIBRARY.exists():
    partial = _LIBRARY.with_suffix(f".{os.getpid()}.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-xc", "-", "-o", partial, "-ldl"],
                   input=_SOURCE, text=True, check=True)
    partial.replace(_LIBRARY)
  return {**os.environ, "LD_PRELOAD": str(_LIBRARY), "FULL_DISK": str(folder.resolve()),
          "FULL_DISK_SIZE": str(size)}
