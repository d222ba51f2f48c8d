"""Classifiers from a hub name, a local folder or the organism, and what identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose
from healing_utils.healing.encoders import layer_parameters, outer_parts

HEADS = ("first", "mean")
# What is loaded of a model's folder; weights come in one file, or in parts with an index.
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
             "vocab.json", "merges.txt", "*.model")  # fmt: skip

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
    except Exception as error:  # safetensors, tokenizers and transformers each have their own
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HealingError(f"cannot load model {model!r}: {cause}") from error
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=8)
def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder that config, weights and tokenizer are loaded from; of a hub model it is the
    cache's, filled where a file is missing, and the same for as long as the process lives."""
    place = resolve(model)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download
    from transformers.utils import cached_file

    with _explained(model):
        config = cached_file(place, "config.json", revision=revision)  # explains what is not there
        wanted = ["config.json", *WEIGHTS, *TOKENIZER]
        snapshot_download(place, revision=revision, allow_patterns=wanted, ignore_patterns="*/*")
        return Path(config).parent


@lru_cache(maxsize=8)
def load_config(model: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    with _explained(model):
        return AutoConfig.from_pretrained(model_folder(model, revision))


@lru_cache(maxsize=8)
def load_tokenizer(model: str, revision: str | None = None) -> Any:
    from transformers import AutoTokenizer

    with _explained(model):
        return AutoTokenizer.from_pretrained(model_folder(model, revision))


class MeanPooled(nn.Module):
    """An encoder whose sentence is the mean of its last states over the real tokens, (batch,
    hidden); then dropout and one linear layer. It has no pooler."""

    def __init__(self, encoder: nn.Module, config: Any):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self.encoder, self.config = encoder, config
        rates = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")
        found = (getattr(config, name, None) for name in rates)
        self.dropout = nn.Dropout(next((rate for rate in found if rate is not None), 0.1))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

        self.name_or_path = encoder.name_or_path

    @property
    def base_model(self) -> nn.Module:
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, table: nn.Module) -> None:
        self.encoder.set_input_embeddings(table)

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **given: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **given)
        states = out.last_hidden_state  # (batch, length, hidden)
        if attention_mask is None:
            mean = states.mean(dim=1)
        else:
            real = attention_mask.unsqueeze(-1).to(states.dtype)
            mean = (states * real).sum(dim=1) / real.sum(dim=1)
        logits = self.classifier(self.dropout(mean))
        return SequenceClassifierOutput(logits=logits, hidden_states=out.hidden_states)


def load_classifier(
    model: str, num_labels: int, seed: int, revision: str | None = None, scratch: bool = False,
    regression: bool = False, head: str = "first",
) -> nn.Module:  # fmt: skip
    """The encoder with a new classification head, in float32 on the CPU.

    The head, and a pooler that the checkpoint lacks, are drawn from `seed`, whatever head a
    checkpoint brings, so intact and healed models of one seed start with the same one. `head` is
    the architecture's own, which reads the ``first`` token in most, or the ``mean`` (`MeanPooled`).
    With `scratch`, every parameter has its random initial value. Only safetensors are read. Raises
    HealingError where it cannot be read, and where tensors of the encoder are missing, of another
    shape, or of layers too many."""
    return _load(model, num_labels, seed, revision, scratch, regression, head)[0]


@lru_cache(maxsize=8)
def loaded(model: str, revision: str | None = None) -> dict[str, list[str]]:
    """Names of a checkpoint's tensors that are ``passed_over`` (heads of its pre-training, a pooler
    that is not used), and those of the encoder's pooler that are ``drawn``, as it lacks them."""
    return _load(model, 2, 0, revision, False, False, "first")[1]


def _load(
    model: str, num_labels: int, seed: int, revision: str | None, scratch: bool, regression: bool,
    head: str,
) -> tuple[nn.Module, dict[str, list[str]]]:  # fmt: skip
    from transformers import AutoConfig, AutoModelForSequenceClassification

    choose(head, HEADS, "head")
    folder, what = model_folder(model, revision), AutoModelForSequenceClassification
    problem = "regression" if regression else "single_label_classification"
    given: dict[str, Any] = {"num_labels": num_labels, "problem_type": problem}
    found: dict[str, list[str]] = {"passed_over": [], "drawn": []}
    with _explained(model), torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every GPU too
        if scratch:
            config = AutoConfig.from_pretrained(folder, **given)
            config.dtype = torch.float32
            classifier = what.from_config(config)
        else:
            # Checkpoints in half precision would be trained in it; sizes are told apart below.
            given |= {"dtype": torch.float32, "ignore_mismatched_sizes": True}
            given |= {"use_safetensors": True, "output_loading_info": True}
            classifier, said = what.from_pretrained(folder, **given)
    if not scratch:
        found = _check_loaded(model, classifier, said)
    elif head == "first":
        return classifier, found
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        if head == "mean":
            pooled = MeanPooled(classifier.base_model, classifier.config)
            _draw(classifier, pooled.classifier)
            return pooled, found
        prefix, drawn = f"{classifier.base_model_prefix}.", found["drawn"]
        for path, module in classifier.named_modules():
            names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if any(name in drawn or not name.startswith(prefix) for name in names):
                _draw(classifier, module)
    return classifier, found


def _draw(classifier: nn.Module, module: nn.Module) -> None:
    """Give a module new values by the architecture's own initialiser."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        # New parameters lack the mark by which transformers spares loaded ones.
        setattr(module, name, nn.Parameter(torch.full_like(parameter, torch.nan)))
    classifier._init_weights(module)
    if any(parameter.isnan().any() for parameter in module.parameters(recurse=False)):
        raise HealingError(
            f"the initialiser of {type(classifier).__name__} leaves the weights of its "
            f"{type(module).__name__} alone: its head cannot be drawn"
        )


def _check_loaded(model: str, classifier: nn.Module, said: dict[str, Any]) -> dict[str, list[str]]:
    """What `loaded` returns; raises HealingError where the encoder is not whole."""
    parameters = {id(p): name for name, p in classifier.named_parameters()}
    poolers = set()
    with contextlib.suppress(HealingError):
        found = outer_parts(classifier, "pooler")
        poolers = {parameters[id(p)] for _, module, _ in found for p in module.parameters()}
    prefix = f"{classifier.base_model_prefix}."
    lost = {name: f"{name} is missing" for name in said["missing_keys"]}
    for name, there, wanted in said["mismatched_keys"]:
        lost[name] = f"{name} is {tuple(there)} and not {tuple(wanted)}"
    shown = [lost[name] for name in sorted(lost) if name.startswith(prefix) and name not in poolers]
    if shown:
        raise HealingError(
            f"cannot load model {model!r}: its file does not hold the encoder that its "
            f"configuration describes: {', '.join(shown[:3])}"
            + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
        )
    layers = layer_parameters(classifier)
    first = parameters[id(next(iter(layers.values())))]
    stack = first.removeprefix(prefix).split(".0.")[0]
    numbered = re.compile(rf"({re.escape(prefix)})?{re.escape(stack)}\.(\d+)\.")
    passed = sorted(said["unexpected_keys"])
    known = {name.split(".")[1] for name in layers}
    beyond = [name for name in passed if (m := numbered.match(name)) and m[2] not in known]
    if beyond:
        raise HealingError(
            f"cannot load model {model!r}: its file holds {beyond[0]}"
            + (f" and {len(beyond) - 1} more" if len(beyond) > 1 else "")
            + ", for which its configuration has no layer"
        )
    return {"passed_over": passed, "drawn": sorted(poolers & lost.keys())}


@lru_cache(maxsize=8)
def identity(model: str, revision: str | None = None) -> str:
    """What determines the weights and the tokens: a hash of the content of the files that are
    loaded, wherever they lie and whatever the model is called."""
    folder, hashed = model_folder(model, revision), hashlib.sha256()
    whole, parts, index = WEIGHTS
    weights = [folder / whole]
    if not weights[0].exists():
        weights = [*sorted(folder.glob(parts)), folder / index]
    tokenizer = sorted(file for pattern in TOKENIZER for file in folder.glob(pattern))
    for file in [folder / "config.json", *weights, *tokenizer]:
        if file.is_file():
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256")
            hashed.update(f"{file.name} {content.hexdigest()}\n".encode())
    return f"sha256:{hashed.hexdigest()[:20]}"


def forget() -> None:
    """Look at models anew: the files behind a name have changed."""
    for cached in (model_folder, load_config, load_tokenizer, loaded, identity):
        cached.cache_clear()
