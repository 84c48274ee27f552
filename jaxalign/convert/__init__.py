"""diffusers directories in and out: the only code that knows foreign names and layouts."""
from jaxalign.convert.directory import load_pipeline, save_pipeline

__all__ = ["load_pipeline", "save_pipeline"]
