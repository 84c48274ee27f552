"""A vote on small random pictures."""
import pytest
from vote_folders import Vote, write_samples


@pytest.fixture
def make_vote(tmp_path):
  def make(prompts=("a cat", "a dog", "a cow"), n=1, models=2, **settings):
    folders = [write_samples(tmp_path / f"model{k}", prompts, n, seed=k) for k in range(models)]
    return Vote(tmp_path / "votes", folders, **settings)
  return make
