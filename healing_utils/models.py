"""Classifiers from a hub name, a local folder or the organism, and what identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from healing_utils import organism
from healing_utils.errors import HealingError

# Where models lie on this machine, by the names that the study gives them, if that is elsewhere: on
# a cluster's workers. Whoever changes it calls `forget`.
FOLDERS: dict[str, str] = {}


def resolve(model: str) -> str:
    """The name or folder that transformers loads: ``organism`` is the shipped one."""
    if model in FOLDERS:
        return FOLDERS[model]
    return str(organism.folder()) if model == "organism" else model


@contextlib.contextmanager
def _explained(model: str) -> Iterator[None]:
    """Loading without reports and bars; failures as one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # "newly initialised: classifier" is what we want here
    try:
        yield
    except HealingError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers each have their own
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HealingError(f"cannot load model {model!r}: {cause}") from error
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=8)
def load_config(model: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    with _explained(model):
        return AutoConfig.from_pretrained(resolve(model), revision=revision)


@lru_cache(maxsize=8)
def load_tokenizer(model: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    with _explained(model):
        return AutoTokenizer.from_pretrained(resolve(model), revision=revision)


def load_classifier(
    model: str,
    num_labels: int,
    seed: int,
    revision: str | None = None,
    scratch: bool = False,
    regression: bool = False,
) -> torch.nn.Module:
    """The encoder with a new classification head, in float32 on the CPU.

    The head is drawn from `seed`, so intact and healed models of one seed start with the same head.
    With `scratch`, every parameter has its random initial value. Only safetensors are read.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    with _explained(model), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every GPU too
        problem = "regression" if regression else "single_label_classification"
        if scratch:
            config = AutoConfig.from_pretrained(
                resolve(model), revision=revision, num_labels=num_labels, problem_type=problem
            )
            config.dtype = torch.float32
            return AutoModelForSequenceClassification.from_config(config)
        return AutoModelForSequenceClassification.from_pretrained(
            resolve(model),
            revision=revision,
            num_labels=num_labels,
            problem_type=problem,
            dtype=torch.float32,  # checkpoints in half precision would be trained in it
            use_safetensors=True,
            # A checkpoint that already has a head of another size keeps its body.
            ignore_mismatched_sizes=True,
        )


@lru_cache(maxsize=8)
def identity(model: str, revision: str | None = None) -> str:
    """What determines the weights: the hub's commit, or the content hash of a local folder."""
    folder = Path(resolve(model))
    if not folder.is_dir():
        commit = getattr(load_config(model, revision), "_commit_hash", None)
        return f"{model}@{commit or revision or 'unknown'}"
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")) + [folder / "config.json"]:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    for pattern in ("tokenizer*.json", "vocab.txt", "vocab.json", "merges.txt", "*.model"):
        for file in sorted(folder.glob(pattern)):
            digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()[:20]}"


def forget() -> None:
    """Look at models anew: the files behind a name have changed."""
    for cached in (load_config, load_tokenizer, identity):
        cached.cache_clear()
