"""Profiles run: cells in parallel, then the notebooks, then the page."""
