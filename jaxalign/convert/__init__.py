"""diffusers directories in and out: the only code that knows foreign names and layouts."""
from jaxalign.convert.adapter import load_adapter, load_adapters, save_adapter
from jaxalign.convert.directory import load_pipeline, save_pipeline

__all__ = ["load_adapter", "load_adapters", "load_pipeline", "save_adapter", "save_pipeline"]
