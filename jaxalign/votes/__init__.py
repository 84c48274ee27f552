"""Votes of people on pairs of pictures: asked in a browser, kept on disk, counted."""
