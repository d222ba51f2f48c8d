"""Profiles run: cells in parallel, then the notebooks, then the page."""

import sys

# nbformat's jsonschema else compiles, for a second, the grammars of formats that no notebook has.
sys.modules.setdefault("rfc3987_syntax", None)
