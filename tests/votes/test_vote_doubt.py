"""A judge's doubt of pairs: from its margins, kept with the vote, refused where there is none."""
import json

import numpy as np
import pytest
from PIL import Image

from jaxalign.errors import UserError
from jaxalign.votes import doubt
from jaxalign.votes.gallery import picture_file


def test_doubt_is_largest_where_the_margin_is_small():
  found = doubt.doubts(np.array([0.0, 1.0, -1.0, 3.0, 1e9]))
  p = 1 / (1 + np.exp(-1.0))
  np.testing.assert_allclose(found[:3], [1, 4 * p * (1 - p), 4 * p * (1 - p)])
  assert 1 > found[1] > found[3] > found[4] >= 0
  assert (doubt.doubts(np.zeros(3)) == 1).all()
  assert doubt.doubts(np.array([0.0, 0.0, 2.0]))[2] < 1     # most pairs alike, one not


def test_pictures_are_scored_once_in_a_process_of_their_own(make_vote, monkeypatch):
  vote = make_vote(n=3, models=1)
  gallery = vote.open().gallery
  vote.log.close()
  found = doubt.open_doubts("brightness", gallery, vote.folder)
  saved = json.loads((vote.folder / "judge.json").read_text())
  assert saved["judge"] == "brightness" and len(saved["scores"]) == 9
  for digest, score in saved["scores"].items():
    with Image.open(picture_file(vote.folder, digest)) as image:
      luma = np.asarray(image) @ [0.299, 0.587, 0.114]
      assert score == pytest.approx(luma.mean() / 255, abs=1e-5)
  of = [saved["scores"][picture.digest] for picture in gallery.pictures]
  margins = np.abs([of[pair.a] - of[pair.b] for pair in gallery.pairs])
  assert found.shape == (9,) and (np.argsort(found) == np.argsort(-margins)).all()
  monkeypatch.setattr(doubt, "score", None)                  # not asked again
  np.testing.assert_array_equal(doubt.open_doubts("brightness", gallery, vote.folder), found)


def test_a_judge_that_is_none(make_vote, monkeypatch):
  class Here:
    """A pool that works in this process."""
    def __init__(self, *_, **__):
      pass

    def __enter__(self):
      return self

    def __exit__(self, *_):
      pass

    def submit(self, function, *args):
      future = doubt.concurrent.futures.Future()
      try:
        future.set_result(function(*args))
      except UserError as error:
        future.set_exception(error)
      return future
  monkeypatch.setattr(doubt.concurrent.futures, "ProcessPoolExecutor", Here)
  vote = make_vote()
  gallery = vote.open().gallery
  vote.log.close()
  with pytest.raises(UserError, match="--judge=brightnes: .*unknown reward 'brightnes'"):
    doubt.open_doubts("brightnes", gallery, vote.folder)
  assert not (vote.folder / "judge.json").exists()
