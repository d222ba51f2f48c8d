"""Healing: break a language model, fine-tune it, and ask what came back.

The public names are imported when they are first used, so that ``import healing_utils`` and
``healing status`` do not wait for torch.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# tqdm, which transformers imports, warns in kernels without ipywidgets; nothing here uses them.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"

_WHERE = {
    "corrupt": "corruption",
    "encoder_layers": "encoders",
    "fine_tune": "training",
    "evaluate": "training",
    "heal": "recipes",
    "load_results": "results",
    "load_corpus": "corpora",
    "extract_activations": "activations",
    "sentence_activations": "activations",
    "probe_layers": "probes",
    "probe_task": "linguistics",
    "rank_neurons": "neurons",
    "minimal_neurons": "neurons",
    "ablate": "neurons",
    "load_task": "tasks",
    "notebook_parameters": "parameters",
    "Study": "study",
    "HealingError": "errors",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"healing_utils.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'healing_utils' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
