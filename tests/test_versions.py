"""The same numbers with every version that setup.py admits; recorded with those of the lock."""
import json

import numpy as np
import pytest

from golden import versions_golden


@pytest.fixture(scope="module")
def golden():
  return json.loads(versions_golden.FILE.read_text())


def test_the_same_images_from_the_same_noise(golden):
  np.testing.assert_allclose(versions_golden.sampled(), golden["sampled"], rtol=0, atol=5e-5)
