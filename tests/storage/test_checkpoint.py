"""Checkpoints: saved whole, restored as placed, errors that say which file."""
import contextlib
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.devices.sharding import make_mesh
from jaxalign.errors import UserError
from jaxalign.storage.checkpoint import Checkpointer, Damaged


def tree(value=0.0):
  return {"policy": {"a": jnp.arange(6.0).reshape(2, 3) + value, "b": jnp.zeros((3, 2))},
          "updates": jnp.asarray(3, jnp.int32), "cap": jnp.asarray(jnp.inf),
          "half": jnp.ones(2, "bfloat16")}


def saved(folder, steps=(1, 2), keep=2):
  checkpoints = Checkpointer(folder, keep)
  for step in steps:
    checkpoints.save(step, tree(step), {"seconds": 0.1 * step, "stopped": ""})
  checkpoints.close()
  return folder


def assert_equal(left, right):
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_round_trip(tmp_path):
  checkpoints = Checkpointer(saved(tmp_path / "c"))
  assert checkpoints.latest_step() == 2
  state, progress = checkpoints.restore(tree())
  assert_equal(state, tree(2))
  assert progress == {"seconds": 0.2, "stopped": ""}
  assert_equal(checkpoints.restore(tree(), 1)[0], tree(1))
  checkpoints.close()


def test_oldest_are_deleted(tmp_path):
  folder = saved(tmp_path / "c", (1, 2, 3, 4), keep=2)
  assert {p.name for p in folder.iterdir()} == {"3", "4"}


def test_what_a_killed_run_did_not_delete_goes_with_the_next(tmp_path):
  folder = saved(tmp_path / "c", (1, 2, 3), keep=3)
  checkpoints = Checkpointer(folder, keep=2)
  checkpoints.restore(tree())
  checkpoints.tidy()
  assert {p.name for p in folder.iterdir()} == {"2", "3"} and checkpoints.latest_step() == 3
  checkpoints.save(4, tree(), {})
  checkpoints.close()
  assert {p.name for p in folder.iterdir()} == {"3", "4"}


def test_arrays_may_be_donated_after_save(tmp_path):
  checkpoints = Checkpointer(tmp_path / "c")
  state = tree(5)
  checkpoints.save(1, state, {})
  # While the writer still reads the host's view of an array, JAX copies in place of donating.
  zeros = jax.jit(lambda t: jax.tree.map(lambda a: a * 0, t), donate_argnums=0)(state)
  jax.block_until_ready(zeros)
  assert_equal(checkpoints.restore(tree(), 1)[0], tree(5))
  checkpoints.close()


def test_progress_may_go_on_after_save(tmp_path, monkeypatch):
  """It is written by a thread, maybe long after the next step has changed it in place."""
  checkpoints, progress = Checkpointer(tmp_path / "c"), {"seconds": 1.0}
  write = checkpoints._manager.save

  def late(*args, **options):
    progress["seconds"] = 2.0
    return write(*args, **options)
  monkeypatch.setattr(checkpoints._manager, "save", late)
  checkpoints.save(1, tree(), progress)
  assert checkpoints.restore(tree())[1] == {"seconds": 1.0}
  checkpoints.close()


def test_restored_where_the_tree_lies(tmp_path):
  """Also on another mesh than it was saved from."""
  x = np.arange(16.0).reshape(4, 4)
  place = lambda mesh, spec: {"x": jax.device_put(x, NamedSharding(mesh, spec))}
  checkpoints = Checkpointer(tmp_path / "c")
  checkpoints.save(1, place(make_mesh(8, 1, 1), P()), {})
  like = place(make_mesh(2, 2, 2), P("fsdp", "tensor"))
  state, _ = checkpoints.restore(like)
  checkpoints.close()
  assert state["x"].sharding == like["x"].sharding
  np.testing.assert_array_equal(state["x"], like["x"])


def test_no_checkpoint(tmp_path):
  checkpoints = Checkpointer(tmp_path / "c")
  assert checkpoints.latest_step() is None
  with pytest.raises(UserError, match="no checkpoint"):
    checkpoints.restore(tree())


def test_temporary_directory_of_a_killed_save_is_ignored(tmp_path):
  folder = saved(tmp_path / "c")
  (folder / "2").rename(folder / "2.orbax-checkpoint-tmp-1")
  checkpoints = Checkpointer(folder)
  assert checkpoints.latest_step() == 1
  checkpoints.save(3, tree(), {})
  checkpoints.close()
  assert not list(folder.glob("2*"))


def data_files(folder, step):
  return [p for p in (folder / str(step) / "state").rglob("*")
          if p.is_file() and p.parent.name == "d"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_files_are_an_error_that_names_the_folder(tmp_path, damage):
  folder = saved(tmp_path / "c")
  for file in data_files(folder, 2):
    content = file.read_bytes()
    if damage == "delete":
      file.unlink()
    else:
      file.write_bytes(content[:len(content) // 2] if damage == "truncate"
                       else bytes(b ^ 255 for b in content))
  with pytest.raises(Damaged, match=r"cannot read checkpoint: [^\n]*$") as error:
    Checkpointer(folder).restore(tree(), 2)
  assert str(folder / "2") in str(error.value) and "\n" not in str(error.value)


def test_an_older_sound_checkpoint_is_taken_and_said(tmp_path, capsys):
  folder = saved(tmp_path / "c", steps=(1, 2, 3), keep=3)
  for step in (2, 3):
    for file in data_files(folder, step):
      file.write_bytes(b"")
  checkpoints = Checkpointer(folder, keep=3)
  assert_equal(checkpoints.restore(tree())[0], tree(1))
  assert checkpoints.restored == 1
  lines = capsys.readouterr().out.strip().splitlines()
  assert len(lines) == 2, lines
  for line, step in zip(lines, (3, 2)):
    assert str(folder / str(step)) in line and line.endswith("step 1 is sound and taken instead")
  # Whoever only reads leaves everything in place; the next save makes room and loses nothing.
  assert {p.name for p in folder.iterdir()} == {"1", "2", "3"}
  checkpoints.save(2, tree(7), {})
  checkpoints.close()
  assert {p.name for p in folder.iterdir()} == {"1", "2", "damaged.2", "damaged.3"}
  again = Checkpointer(folder, keep=3)
  assert again.latest_step() == 2
  assert_equal(again.restore(tree())[0], tree(7))


def test_every_flipped_bit_in_an_array_is_found(tmp_path):
  """Some are in bytes that nothing depends on; none comes back as other numbers."""
  rng, rnd = np.random.default_rng(0), random.Random(0)
  state = {"a": jnp.asarray(rng.standard_normal((96, 128)), jnp.float32),
           "zeros": jnp.zeros((64, 64)), "half": jnp.asarray(rng.standard_normal(512), "bfloat16"),
           "flags": jnp.asarray(rng.integers(0, 2, 256), bool), "count": jnp.asarray(3, jnp.int32)}
  folder = tmp_path / "c"
  with contextlib.closing(Checkpointer(folder)) as checkpoints:
    checkpoints.save(1, state, {"seconds": 1.5})
  files, found = data_files(folder, 1), 0
  with contextlib.closing(Checkpointer(folder)) as checkpoints:
    for _ in range(20):
      file = rnd.choices(files, [f.stat().st_size for f in files])[0]
      good = file.read_bytes()
      place, bit = rnd.randrange(len(good)), 1 << rnd.randrange(8)
      file.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1:])
      try:
        assert_equal(checkpoints.restore(state, 1)[0], state)
      except Damaged:
        found += 1
      file.write_bytes(good)
  assert found >= 15


def test_changed_progress_and_digests_are_found(tmp_path):
  folder = saved(tmp_path / "c", steps=(1,))
  for item, words in (("progress", "progress is not what was saved"), ("digests", "its digests")):
    file = folder / "1" / item / "metadata"
    good = file.read_bytes()
    file.write_bytes(good.replace(b"0", b"1"))
    with pytest.raises(Damaged, match=words):
      Checkpointer(folder).restore(tree(), 1)
    file.write_bytes(good)
  assert_equal(Checkpointer(folder).restore(tree(), 1)[0], tree(1))


def test_checkpoints_of_versions_without_digests_are_read(tmp_path):
  folder = saved(tmp_path / "c", steps=(1,))
  shutil.rmtree(folder / "1" / "digests")
  assert_equal(Checkpointer(folder).restore(tree(), 1)[0], tree(1))
  with pytest.raises(UserError, match=r"policy/a is float32\[2,3\] there and absent here"):
    Checkpointer(folder).restore({**tree(), "policy": {"b": jnp.zeros((3, 2))}}, 1)


@pytest.mark.parametrize("say, other", [
    (r"policy/a is float32\[2,3\] there and float32\[3,2\] here",
     lambda: {**tree(), "policy": {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 2))}}),
    (r"cap is float32\[\] there and absent here",
     lambda: {k: v for k, v in tree().items() if k != "cap"}),
    (r"ema is absent there and float32\[3\] here", lambda: {**tree(), "ema": jnp.zeros(3)}),
])
def test_other_trees_are_refused_and_kept(tmp_path, say, other):
  """After an upgrade or a change of config nobody is told to give up sound checkpoints."""
  checkpoints = Checkpointer(saved(tmp_path / "c"))
  with pytest.raises(UserError, match="cannot read checkpoint: another version.*" + say) as error:
    checkpoints.restore(other())
  assert not {"delete", "move"} & set(str(error.value).split())
  assert "choose another --workdir" in str(error.value) and "\n" not in str(error.value)


def test_the_only_checkpoint_has_none_before_it(tmp_path):
  folder = saved(tmp_path / "c", steps=(1,))
  for file in (folder / "1" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(UserError, match="no checkpoint before it is sound; choose another"):
    Checkpointer(folder).restore(tree())


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write checkpoint"):
    Checkpointer(tmp_path / "file" / "c")
