"""A cell of the task stages becomes a result: one function a state.

*intact*: fine-tuned. *broken*: that model, corrupted, not trained again. *healed*: the pre-trained
model, corrupted, then fine-tuned (Han et al. 2024). *scratch*: random weights, fine-tuned.
*untrained*: random weights.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from threadpoolctl import threadpool_limits

from healing_utils.base.records import write_atomically
from healing_utils.healing import floors, models, recipes, training
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.similarity import layer_similarity, layer_states, passing_stream
from healing_utils.study.cells import RECIPE, Cell
from healing_utils.study.planning import intact_of, keeps_weights, taught

KEPT_STATES = 256 << 20  # bytes of an intact model's states, the most that are kept


def _intact(study: Any, cell: Cell) -> dict[str, Any]:
    p, data = study.settings(cell), study.task(cell.task)
    model = _load(study, cell)
    table = model.get_input_embeddings().weight.detach().cpu().numpy()  # before it is trained
    means = floors.static_means(study.tokenizer(cell.model), table, p["max_length"])
    given = (*study.draw(cell), data.test, data.num_labels)
    with threadpool_limits(p["threads"]):  # with other threads, sums round otherwise
        floor = {"tfidf": floors.tfidf(*given), "static": floors.static(*given, means)}
    found = _train(study, cell, model) | models.loaded(cell.model, p["model_revision"])
    return found | {"floors": floor, "stream": passing_stream(model, study.sample(cell))}


def _broken(study: Any, cell: Cell) -> dict[str, Any]:
    broken = copy.deepcopy(_shared_intact(study, cell)[0])
    changed = _break(cell, broken)
    if changed:  # else layers were taken out: there are not as many to compare
        changed["similarity"] = similarity(study, cell, broken)
    return _score(study, cell, broken) | changed


def _untrained(study: Any, cell: Cell) -> dict[str, Any]:
    model = _load(study, cell).to(study.device).eval()
    return _score(study, cell, model) | {"similarity": similarity(study, cell, model)}


def _trained(study: Any, cell: Cell) -> dict[str, Any]:
    model, changed = _begin(study, cell)
    return _train(study, cell, model) | changed


COMPUTE = {
    "intact": _intact, "broken": _broken, "untrained": _untrained, "healed": _trained,
    "scratch": _trained,
}  # fmt: skip


# -- networks --------------------------------------------------------------------------------------


def network(study: Any, cell: Cell) -> torch.nn.Module:
    """The model that a cell scores, on the study's device, in evaluation mode: from the run's
    folder where its weights were kept, else made again."""
    if cell.state == "broken":
        model = network(study, intact_of(study, cell))
        _break(cell, model)
        return model
    path = study.store.weights_path(cell.key)
    if not path.exists():
        model, _ = _begin(study, cell)
        _train(study, cell, model, keep=True)
        return model.to(study.device).eval()
    model = _load(study, cell)  # what goes wrong here is no fault of the weights
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if file.metadata() != _checksum(cell, tensors):
                raise ValueError("their checksum does not match")
        model.load_state_dict(tensors)
    except Exception as error:  # truncated: safetensors and torch each have their own errors
        print(f"weights {path} are unusable ({error}); trained again", file=sys.stderr)
        path.unlink(missing_ok=True)
        return network(study, cell)
    return model.to(study.device).eval()


def _checksum(cell: Cell, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """What stands beside kept weights, whose format would not notice a flipped bit."""
    found = hashlib.sha256(cell.key.encode())
    for name, values in sorted(tensors.items()):
        found.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        found.update(values.reshape(-1).view(torch.uint8).numpy())
    return {"sha256": found.hexdigest()}


def similarity(study: Any, cell: Cell, model: torch.nn.Module) -> dict[str, list[float]]:
    """How like the fine-tuned model's the layers of `model`, corrupted or healed, are."""
    return layer_similarity(_shared_intact(study, cell)[1], model, study.sample(cell))


def _shared_intact(study: Any, cell: Cell) -> tuple[torch.nn.Module, Any]:
    """The fine-tuned model of the cell's model, task and seed, and what `layer_similarity` takes
    for it. The next cell mostly gets the same ones: they are not to be changed."""
    intact, kept = intact_of(study, cell), study.intact_models
    if intact.key not in kept:
        kept.clear()  # one at a time
        states = model = network(study, intact)
        sample, config = study.sample(cell), model.config
        values = sample.tokens * (config.num_hidden_layers + 1) * config.hidden_size
        if 4 * values <= KEPT_STATES:
            # Of a copy: what a forward pass leaves in a model does not get into broken ones.
            states = list(layer_states(copy.deepcopy(model), sample))
        kept[intact.key] = model, states
    return kept[intact.key]


def _load(study: Any, cell: Cell) -> torch.nn.Module:
    data, scratch = study.task(cell.task), cell.state in ("scratch", "untrained")
    return models.load_classifier(
        cell.model, data.num_labels, cell.seed, study.parameters["model_revision"], scratch,
        data.regression, study.settings(cell)["head"],
    )  # fmt: skip


def _begin(study: Any, cell: Cell) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model that is trained, and what was changed in it."""
    deployed = cell.start == "fine-tuned"
    model = network(study, intact_of(study, cell)) if deployed else _load(study, cell)
    return model, _corrupt(cell, model) if cell.state == "healed" else {}


def _break(cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
    """Corrupt a fine-tuned model, of which the report is kept, or take its layers out."""
    if cell.recipe != "drop":
        return _corrupt(cell, model)
    recipes.drop(recipes.Patient(model, cell.layers, cell.seed))
    return {}


def _corrupt(cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
    """Corrupt; what a record keeps of the report: how much changed, and by tensor role."""
    where: dict[str, Any] = {"layers": list(cell.layers) or None}
    if cell.side == "scattered":
        where = {"side": cell.side, "level": cell.level}
    report = corrupt(
        model, kind=cell.kind, seed=cell.seed, part=cell.part, strength=cell.strength, **where
    )
    by_role = report.tensors.groupby("role")["relative_change"].mean()
    change = {role: round(float(v), 5) for role, v in by_role.items() if math.isfinite(v)}
    told = {"tensors": len(report.tensors), "values": report.elements, "relative_change": change}
    unusual = {"not_finite": report.not_finite, "cannot_heal": report.cannot_heal}
    return {"changed": told | {name: value for name, value in unusual.items() if value}}


# -- training and scoring --------------------------------------------------------------------------


def _train(study: Any, cell: Cell, model: torch.nn.Module, keep: bool = False) -> dict[str, Any]:
    """Train, score and keep the weights. A loss that is no longer finite is a result, but of the
    intact models that all else is compared with: what training left is scored."""
    p, (train, validation, _) = study.settings(cell), study.examples(cell)
    given = {name: p[name] for name in RECIPE if name != "max_length"}
    given |= {"seed": cell.seed, "device": study.device, "on_step": study.on_step}
    study.intact_models.clear()  # their place is for the training
    told: dict[str, Any] = {}
    teacher = network(study, intact_of(study, cell)) if taught(cell.recipe) else None
    try:
        if cell.recipe == "full":
            done = training.fine_tune(model, train, validation, **given)
        else:
            healed = recipes.heal(
                model, cell.recipe, layers=cell.layers, train=train, validation=validation,
                pristine=lambda: _load(study, cell), teacher=teacher,
                tokenizer=study.tokenizer(cell.model), **given,
            )  # fmt: skip
            done = healed.training
            told = {"trained": healed.trained, "parameters": healed.parameters}
            if healed.warm_up:
                told["warm_up_tokens"] = healed.warm_up.tokens
    except training.Diverged as error:
        if cell.plain and cell.state == "intact":
            raise
        done, told = error.training, {"diverged": str(error)}
    names = ("steps", "skipped_steps", "max_tokens", "precision", "shortcut", "curve")
    told |= {name: getattr(done, name) for name in names}
    scored = _score(study, cell, model)
    if keep or keeps_weights(study, cell):  # they may be deleted any time
        tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
        whole = save(tensors, metadata=_checksum(cell, tensors))
        write_atomically(study.store.weights_path(cell.key), whole)
    return scored | told | {
        "train_size": len(train), "train_tokens": done.tokens, "truncated": train.truncated,
        "losses": [round(loss, 5) for loss in done.losses],
    }  # fmt: skip


def _score(study: Any, cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
    test = study.examples(cell)[2]
    logits = training.predict(model, test, device=study.device)
    scored = {
        "scores": training.grade(logits, test.labels),
        "chance": training.majority_scores(test.labels),
        "test_size": len(test),
    }
    if test.labels.dtype.kind != "f":  # so that the error of the test items can be paired
        right = training.answers(logits) == test.labels
        scored["right"] = "".join(map(str, right.astype(int)))
    return scored
