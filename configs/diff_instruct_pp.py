"""Diff-Instruct++: Diff-Instruct* with the KL divergence, its rival.

  python -m jaxalign.launch --config=configs/diff_instruct_pp.py

Arguments after a colon: emoji (default), smoke, smoke_sd3, sdxl, sd35, as in
configs/diff_instruct_star.py.
"""
import pathlib

from jaxalign.config import recipes


def get_config(arg="emoji"):
  arg, _ = recipes.split_argument(arg, ("emoji", *recipes.SMOKE, "sdxl", "sd35"))
  star = pathlib.Path(__file__).with_name("diff_instruct_star.py")
  config = recipes.load_recipe(f"{star}:{arg},diff_instruct_pp")
  config.recipe = f"diff_instruct_pp:{arg}"
  return config
