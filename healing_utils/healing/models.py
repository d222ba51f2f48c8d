"""Classifiers from a hub name, a local folder or the organism, and what identifies them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from healing_utils import organism
from healing_utils.base.errors import HealingError, choose, first_line
from healing_utils.base.hub import reach_hub
from healing_utils.healing.encoders import parse_seed, pieces

HEADS = ("first", "mean")
# Weights come in one file, or in parts with an index.
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
             "vocab.json", "merges.txt", "bpe.codes", "*.model")  # fmt: skip


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Torch's random numbers from `seed` inside; the caller's generators untouched outside."""
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        # Not torch.manual_seed: it seeds every GPU too.
        torch.default_generator.manual_seed(parse_seed(seed))
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def _explained(model: str) -> Iterator[None]:
    """Loading without reports and bars; failures as one line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # "newly initialised: classifier" is what we want here
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and transformers each have their own
        cause = first_line(error)
        if "trust_remote_code" in str(error):
            cause = "it needs code of its own (auto_map), and no model's code is run"
        raise HealingError(f"cannot load model {model!r}: {cause}") from error
    finally:
        logging.set_verbosity(level)


@lru_cache(maxsize=8)
def model_folder(model: str, revision: str | None = None) -> Path:
    """The folder that config, weights and tokenizer are loaded from; of a hub model it is the
    cache's, filled where a file is missing, and the same for as long as the process lives."""
    place = organism.folder() if model == "organism" else Path(model)
    with _explained(model):
        if not model or not place.is_dir():
            place = _from_hub(model, revision)
        if (place / "adapter_config.json").exists():  # transformers would put it in
            raise HealingError(
                "it holds an adapter (adapter_config.json): merge that into its model, by peft's "
                "merge_and_unload, and save the whole"
            )
        made = place / "training.json"
        if model == "organism" and made.is_file():
            if json.loads(made.read_bytes())["sha256"] != _sha256(place / "model.safetensors"):
                raise HealingError(f"its weights in {place} are not what its pre-training wrote")
    return place


def _from_hub(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download, utils
    from transformers.utils import cached_file

    try:
        utils.validate_repo_id(model)
        reach_hub("models", model)
        config = cached_file(model, "config.json", revision=revision)  # explains what is not there
        wanted = ["config.json", *WEIGHTS, *TOKENIZER]
        snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns="*/*")
    except Exception as error:
        invalid = isinstance(error, utils.HFValidationError)
        cause = "it is no name of the hub's" if invalid else f"of the hub's: {first_line(error)}"
        raise HealingError(f"there is no such folder, and {cause}") from error
    return Path(config).parent


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@lru_cache(maxsize=8)
def load_config(model: str, revision: str | None = None) -> Any:
    from transformers import AutoConfig

    folder = model_folder(model, revision)
    with _explained(model):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


@lru_cache(maxsize=8)
def load_tokenizer(model: str, revision: str | None = None) -> Any:
    """Raises HealingError where its files are missing (of a model alone transformers makes one that
    knows no word), and where it is code."""
    from transformers import AutoTokenizer

    folder, missing = model_folder(model, revision), ["vocab.txt, vocab.json or a *.model"]
    kept = any(any(folder.glob(name)) for name in ("tokenizer.json", "vocab.*", "*.model"))
    with _explained(model):
        if kept:
            found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if "auto_map" in found.init_kwargs:
                raise HealingError("its tokenizer is code, and no model's code is run")
            names = found.vocab_files_names
            needed = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
            missing = [name for name in needed if not (folder / name).is_file()]
            if not missing or (folder / "tokenizer.json").is_file():
                return found
        raise HealingError(
            f"tokenizer.json, or {' and '.join(missing)}, is missing: save its tokenizer beside it"
        )


class MeanPooled(nn.Module):
    """An encoder whose sentence is the mean of its last states over the real tokens, (batch,
    hidden); then dropout and one linear layer. It has no pooler."""

    def __init__(self, encoder: nn.Module, config: Any):
        super().__init__()
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = nn.Identity()  # SqueezeBERT calls what is there
        self.encoder = encoder
        rates = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob", "dropout")
        found = (getattr(config, name, None) for name in rates)
        self.dropout = nn.Dropout(next((rate for rate in found if rate is not None), 0.1))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def __getattr__(self, name: str) -> Any:
        """What it has not is the encoder's: the embeddings, the configuration, the initialiser."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("encoder"), name)

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
    checkpoint brings: the architecture's own, which reads the ``first`` token in most, or the
    ``mean`` (`MeanPooled`). With `scratch`, every parameter has its random initial value. Raises
    HealingError where the encoder cannot be read, or lacks tensors, has some of another shape, or
    layers too many."""
    choose(head, HEADS, "head")
    problem = "regression" if regression else "single_label_classification"
    given = {"num_labels": num_labels, "problem_type": problem}
    classifier, drawn = _read(model, revision, seed, scratch, **given)[:2]
    if scratch and head == "first":
        return classifier
    with seeded(seed):
        if head == "mean":
            pooled = MeanPooled(classifier.base_model, classifier.config)
            _draw(classifier, pooled.classifier)
            return pooled
        prefix = f"{classifier.base_model_prefix}."
        for path, module in classifier.named_modules():
            names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if any(name in drawn or not name.startswith(prefix) for name in names):
                _draw(classifier, module)
    return classifier


@lru_cache(maxsize=8)
def loaded(model: str, revision: str | None = None) -> dict[str, list[str]]:
    """Names of a checkpoint's tensors that are ``passed_over`` (heads of its pre-training, a pooler
    that is not used), and those of the encoder's pooler that are ``drawn``, as it lacks them."""
    _, drawn, passed = _read(model, revision, 0, False)
    return {"passed_over": passed, "drawn": drawn}


def _read(
    model: str, revision: str | None, seed: int, scratch: bool, **given: Any
) -> tuple[nn.Module, list[str], list[str]]:
    """The classifier as transformers makes it, and what `loaded` names."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = model_folder(model, revision)
    given["trust_remote_code"] = False
    with seeded(seed), _explained(model):
        if scratch:
            config = AutoConfig.from_pretrained(folder, **given)
            config.dtype = torch.float32
            return AutoModelForSequenceClassification.from_config(config), [], []
        # Checkpoints in half precision would be trained in it; sizes are told apart below.
        classifier, said = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True, **given,
        )  # fmt: skip
    names = {p: name for name, p in classifier.named_parameters()}
    poolers = {names[piece.parameter] for piece in pieces(classifier, "pooler")}
    prefix = f"{classifier.base_model_prefix}."
    lost = {name: f"{name} is missing" for name in said["missing_keys"]}
    for name, there, wanted in said["mismatched_keys"]:
        lost[name] = f"{name} is {tuple(there)} and not {tuple(wanted)}"
    shown = [lost[name] for name in sorted(lost) if name.startswith(prefix) and name not in poolers]
    if shown:
        raise HealingError(
            f"cannot load model {model!r}: its file does not hold the encoder that its "
            f"configuration describes: {_some(shown, 3)}"
        )
    layers = pieces(classifier)
    stack = names[layers[0].parameter].removeprefix(prefix).split(".0.")[0]
    numbered = re.compile(rf"({re.escape(prefix)})?{re.escape(stack)}\.(\d+)\.")
    passed = sorted(said["unexpected_keys"])
    found = [(name, numbered.match(name)) for name in passed]
    beyond = [name for name, match in found if match and int(match[2]) > layers[-1].layer]
    if beyond:
        raise HealingError(
            f"cannot load model {model!r}: its file holds {_some(beyond, 1)}, for which its "
            "configuration has no layer"
        )
    return classifier, sorted(poolers & lost.keys()), passed


def _some(listed: list[str], count: int) -> str:
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more


def _draw(classifier: nn.Module, module: nn.Module) -> None:
    """Give a module new values by the architecture's own initialiser."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        # New parameters lack the mark by which transformers spares loaded ones.
        setattr(module, name, nn.Parameter(torch.full_like(parameter, torch.nan)))
    classifier._init_weights(module)
    if any(parameter.isnan().any() for parameter in module.parameters(recurse=False)):
        kind = type(module).__name__
        raise HealingError(f"{type(classifier).__name__} does not draw its head's {kind}")


@lru_cache(maxsize=8)
def identity(model: str, revision: str | None = None) -> str:
    """What determines the weights and the tokens: a hash of the content of the files that are
    loaded, wherever they lie and whatever the model is called. Raises HealingError where there are
    no weights, and for a file of the hub's cache that is no longer what was downloaded."""
    folder, hashed = model_folder(model, revision), hashlib.sha256()
    whole, _, index = (folder / name for name in WEIGHTS)
    weights = [whole]
    with _explained(model):
        if not whole.is_file() and index.is_file():
            parts = json.loads(index.read_bytes())["weight_map"].values()
            weights = [*sorted(folder / part for part in set(parts)), index]
        elif not whole.is_file():
            raise HealingError(
                "it has no model.safetensors; pickled weights (pytorch_model.bin) can hold code: "
                "convert them, by AutoModel.from_pretrained(...).save_pretrained(...), and save "
                "the tokenizer beside them"
            )
        tokenizer = sorted(file for pattern in TOKENIZER for file in folder.glob(pattern))
        for file in filter(Path.is_file, [folder / "config.json", *weights, *tokenizer]):
            content = _sha256(file)
            if not _as_downloaded(file, content):
                raise HealingError(f"{file.resolve()} is damaged: delete it to have it anew")
            hashed.update(f"{file.name} {content}\n".encode())
    return f"sha256:{hashed.hexdigest()[:20]}"


def _as_downloaded(file: Path, sha256: str) -> bool:
    """The hub's cache names files by their own hash, or git's."""
    named = file.resolve().name
    if re.fullmatch("[0-9a-f]{40}", named):
        content = file.read_bytes()
        return hashlib.sha1(b"blob %d\0%s" % (len(content), content)).hexdigest() == named
    return named == sha256 or not re.fullmatch("[0-9a-f]{64}", named)


def forget() -> None:
    """Look at models anew: the files behind a name have changed."""
    for cached in (model_folder, load_config, load_tokenizer, loaded, identity):
        cached.cache_clear()
