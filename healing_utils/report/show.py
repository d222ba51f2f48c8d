"""Figures on their way out: into files, into a notebook, and their words beside them."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

from matplotlib.figure import Figure

from healing_utils.base.errors import HealingError
from healing_utils.base.records import write_atomically
from healing_utils.report.plots import style


def alt_text(figure: Figure) -> str:
    """What the figure shows, for a reader who cannot see it."""
    return getattr(figure, "alt", "") or getattr(figure, "caption", "") or "A figure."


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write ``NAME.png`` (200 dpi) and ``NAME.svg``, and note caption and alternative text.

    The texts go into both files' metadata and into ``captions.json`` of the folder, which the
    page of a run reads. Files are written whole or not at all, and hold no date: the same figure
    gives the same bytes. Returns the PNG's path.
    """
    folder = Path(folder)
    if Path(name).name != name or not name:
        raise HealingError(f"a figure's name is a plain file name without a folder, not {name!r}")
    caption, alt = getattr(figure, "caption", ""), alt_text(figure)
    for suffix, undated in (("svg", "Date"), ("png", "Software")):
        words = {"Title": caption, "Description": alt, undated: None}
        write_atomically(folder / f"{name}.{suffix}", _drawn(figure, suffix, 200, metadata=words))
    captions = read_captions(folder)
    captions[name] = {"caption": caption, "alt": alt}
    text = json.dumps(captions, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / "captions.json", text)
    return folder / f"{name}.png"


def read_captions(folder: str | Path) -> dict[str, dict[str, str]]:
    """``{name: {"caption": ..., "alt": ...}}`` of a folder, in the order the figures were saved.

    Empty where there is no index or it cannot be read: captions can be written again.
    """
    try:
        captions = json.loads((Path(folder) / "captions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(captions, dict):
        return {}
    return {str(k): v for k, v in captions.items() if isinstance(v, dict)}


def figure_html(figure: Figure) -> str:
    """The figure as HTML of at most 120 kB: an image with alternative text, and its caption."""
    from PIL import Image

    for dpi in (160, 130, 105, 85, 70):
        # Few colours are used: an indexed image is a third of the size and looks the same.
        image = Image.open(io.BytesIO(_drawn(figure, "png", dpi))).convert("RGB")
        image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        packed = io.BytesIO()
        image.save(packed, format="png", optimize=True)
        width = round(figure.get_figwidth() * 110)
        text = (
            f'<figure style="margin:0.5em 0;max-width:{width}px">'
            f'<img alt="{html.escape(alt_text(figure))}" width="{width}" '
            f'style="max-width:100%;height:auto;background:white" '
            f'src="data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}">'
            f'<figcaption style="font-size:90%">{html.escape(getattr(figure, "caption", ""))}'
            f"</figcaption></figure>"
        )
        if len(text) <= 120_000:
            break
    return text


def show(figure: Figure) -> None:
    """Display a figure in a notebook with alternative text and caption.

    Jupyter's own image output has no place for alternative text, so this is an HTML output; the
    plain-text form, which other readers of the notebook see, is the alternative text.
    """
    from IPython.display import display

    words = f"Figure: {alt_text(figure)}"
    display({"text/html": figure_html(figure), "text/plain": words}, raw=True)


def _drawn(figure: Figure, suffix: str, dpi: int, **options) -> bytes:
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=suffix, dpi=dpi, **options)
    return buffer.getvalue()
