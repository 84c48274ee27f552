"""Votes as preference pairs: `pairs.parquet` in the columns of Pick-a-Pic v2.

`jaxalign.data.pairs` trains on them. Image 0 was on the left, which is random. A voter's repeats of
a pair are no pairs of their own; "equal" and "both bad" are ties.
"""
import pathlib

from jaxalign.storage.files import whole
from jaxalign.votes.ballot import Ballot
from jaxalign.votes.gallery import picture_file

_LABELS = {"left": 1.0, "right": 0.0, "equal": 0.5, "both_bad": 0.5}
_GROUP = 64                # rows held in memory at once


def write_pairs(ballot: Ballot, folder: pathlib.Path) -> int:
  """Writes `FOLDER/pairs.parquet`, whole or not at all; returns the number of rows."""
  import pyarrow as pa
  import pyarrow.parquet as pq
  schema = pa.schema([
      ("caption", pa.string()), ("jpg_0", pa.binary()), ("jpg_1", pa.binary()),
      ("label_0", pa.float64()), ("label_1", pa.float64()),
      ("image_0_uid", pa.string()), ("image_1_uid", pa.string()), ("best_image_uid", pa.string()),
      ("model_0", pa.string()), ("model_1", pa.string()), ("user_id", pa.string()),
      ("has_label", pa.bool_()), ("are_different", pa.bool_()), ("both_bad", pa.bool_())])
  answers = [ask for ask in ballot.answers() if not ask.repeat]
  with whole(folder / "pairs.parquet") as file, pq.ParquetWriter(
      file, schema, compression="zstd") as writer:
    for start in range(0, len(answers), _GROUP):
      rows = [_row(ballot, ask, folder) for ask in answers[start:start + _GROUP]]
      writer.write_table(pa.Table.from_pylist(rows, schema))
  return len(answers)


def _row(ballot: Ballot, ask, folder: pathlib.Path) -> dict:
  gallery = ballot.gallery
  left, right = (gallery.pictures[i] for i in ballot.sides(ask))
  label = _LABELS[ask.choice]
  best = {1.0: left.digest, 0.0: right.digest}.get(label, "")
  return {"caption": gallery.prompts[left.prompt],
          "jpg_0": picture_file(folder, left.digest).read_bytes(),
          "jpg_1": picture_file(folder, right.digest).read_bytes(),
          "label_0": label, "label_1": 1 - label,
          "image_0_uid": left.digest, "image_1_uid": right.digest, "best_image_uid": best,
          "model_0": gallery.models[left.model], "model_1": gallery.models[right.model],
          "user_id": ask.voter, "has_label": True, "are_different": True,
          "both_bad": ask.choice == "both_bad"}
