"""Checkpoints: saved whole, restored as placed, errors that say which file."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.devices.sharding import make_mesh
from jaxalign.errors import UserError
from jaxalign.storage.checkpoint import Checkpointer


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


def test_arrays_may_be_donated_after_save(tmp_path):
  checkpoints = Checkpointer(tmp_path / "c")
  state = tree(5)
  checkpoints.save(1, state, {})
  # While the writer still reads the host's view of an array, JAX copies in place of donating.
  zeros = jax.jit(lambda t: jax.tree.map(lambda a: a * 0, t), donate_argnums=0)(state)
  jax.block_until_ready(zeros)
  assert_equal(checkpoints.restore(tree(), 1)[0], tree(5))
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
  assert Checkpointer(folder).latest_step() == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damaged_files_are_an_error_that_names_the_folder(tmp_path, damage):
  folder = saved(tmp_path / "c")
  data = [p for p in (folder / "2" / "state").rglob("*") if p.is_file() and p.parent.name == "d"]
  for file in data:
    content = file.read_bytes()
    if damage == "delete":
      file.unlink()
    else:
      file.write_bytes(content[:len(content) // 2] if damage == "truncate"
                       else bytes(b ^ 255 for b in content))
  assert data
  checkpoints = Checkpointer(folder)
  message = r"cannot read checkpoint: [^\n]*; move .*2 elsewhere to go on"
  with pytest.raises(UserError, match=message) as error:
    checkpoints.restore(tree())
  assert str(folder) in str(error.value) and "\n" not in str(error.value)
  assert_equal(checkpoints.restore(tree(), 1)[0], tree(1))       # the one before is untouched


@pytest.mark.parametrize("say, other", [
    (r"policy/a is \[2, 3\] there and \[3, 2\] here",
     lambda: {**tree(), "policy": {"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 2))}}),
    (r"cap is \[\] there and absent here", lambda: {k: v for k, v in tree().items() if k != "cap"}),
    (r"ema is absent there and \[3\] here", lambda: {**tree(), "ema": jnp.zeros(3)}),
])
def test_other_trees_are_refused_and_kept(tmp_path, say, other):
  """After an upgrade or a change of config nobody is told to give up sound checkpoints."""
  checkpoints = Checkpointer(saved(tmp_path / "c"))
  with pytest.raises(UserError, match="cannot read checkpoint.*; another version.*" + say) as error:
    checkpoints.restore(other())
  assert not {"delete", "move"} & set(str(error.value).split())
  assert "choose another --workdir" in str(error.value) and "\n" not in str(error.value)


def test_the_only_checkpoint_has_none_before_it(tmp_path):
  folder = saved(tmp_path / "c", steps=(1,))
  for file in (folder / "1" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(UserError, match="; choose another --workdir$"):
    Checkpointer(folder).restore(tree())


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write checkpoint"):
    Checkpointer(tmp_path / "file" / "c")
