"""What no machine holds is refused by the key that asks for it."""
import pytest

import runs
from jaxalign.devices import memory
from jaxalign.errors import UserError
from jaxalign.train.experiment import build


def test_what_does_not_fit_names_the_key():
  memory.check_fits("sample.batch=8", 8, (64, 64, 3))
  with pytest.raises(UserError, match=r"n=9: .* more than a run can number"):
    memory.check_fits("n=9", 2 ** 31, (1,))
  with pytest.raises(UserError, match=r"x=1: \d+ images of 512 x 512 x 3 alone take"):
    memory.check_fits("x=1", memory.total() // (512 * 512 * 3 * 4) + 1, (512, 512, 3))


@pytest.mark.parametrize("key", ["sample.batch", "eval.batch"])
@pytest.mark.slow
def test_a_run_is_refused_before_it_begins(key):
  cfg = runs.smoke("ddpo", **{key.replace(".", "__"): 2 ** 30})
  with pytest.raises(UserError, match=rf"{key}=1073741824: .* all memory here"):
    build(cfg)
