"""The last lines of a run: what it means, and what to type next."""
import json

import pytest
from report_folders import write_run

import runs
from jaxalign.reports.reading import read_run
from jaxalign.train import report
from jaxalign.train.report import closing


@pytest.mark.parametrize("kind, eta", [("StableDiffusionPipeline", ", eta=1"),
                                       ("StableDiffusion3Pipeline", "")])
def test_they_say_what_it_means_and_what_to_type(tmp_path, monkeypatch, kind, eta):
  monkeypatch.setattr(report, "python", lambda: ".venv/bin/python")
  folder = write_run(tmp_path / "my run", judge=-0.3)
  (folder / "export").mkdir()
  (folder / "export" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
  lines = closing(folder, runs.smoke(), read_run(folder)).splitlines()
  assert lines[0].startswith("Reward +") and "never optimised, disagrees" in lines[0]
  assert "signs of over-optimisation" in lines[0]          # a judge that fell is said aloud
  assert lines[1:] == [
      f"see it:     {folder / 'report.html'}",
      f"draw more:  .venv/bin/python -m jaxalign.sample --checkpoint='{folder}' "
      "--prompts='a cat on a red background' --output=out",
      f"diffusers:  {kind}.from_pretrained('{folder}/export')(prompt, num_inference_steps=4, "
      f"guidance_scale=3{eta})"]


def test_without_weights_they_point_at_the_pictures(tmp_path):
  folder = write_run(tmp_path / "run")
  lines = closing(folder, runs.smoke("dno"), read_run(folder)).splitlines()
  assert lines[-1] == f"pictures:   {folder / 'product' / 'images'}" and len(lines) == 3
