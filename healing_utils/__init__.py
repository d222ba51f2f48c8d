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
    "corrupt": "healing.corruption",
    "encoder_layers": "healing.encoders",
    "fine_tune": "healing.training",
    "evaluate": "healing.training",
    "heal": "healing.recipes",
    "load_results": "analysis.results",
    "load_corpus": "texts.corpora",
    "extract_activations": "probing.activations",
    "sentence_activations": "probing.activations",
    "probe_layers": "probing.probes",
    "rank_neurons": "probing.neurons",
    "minimal_neurons": "probing.neurons",
    "ablate": "probing.neurons",
    "load_task": "texts.tasks",
    "notebook_parameters": "study.parameters",
    "Study": "study.study",
    "HealingError": "base.errors",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"healing_utils.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'healing_utils' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
