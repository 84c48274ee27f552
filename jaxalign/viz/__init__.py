"""Pictures for people: grids of samples, base beside tuned."""
from jaxalign.viz.grid import before_after, save_grid

__all__ = ["before_after", "save_grid"]
