"""Recipes; installed as `jaxalign.configs`."""
