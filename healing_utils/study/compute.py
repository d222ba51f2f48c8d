"""A cell of the task stages becomes a result: one function a state.

*intact*: fine-tuned. *broken*: that model, corrupted, not trained again. *healed*: the pre-trained
model, corrupted, then fine-tuned (Han et al. 2024). *scratch*: random weights, fine-tuned.
*untrained*: random weights.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load, save
from threadpoolctl import threadpool_limits

from healing_utils.base.records import write_atomically
from healing_utils.healing import floors, models, recipes
from healing_utils.healing.corruption import CorruptionReport, corrupt
from healing_utils.healing.similarity import layer_similarity, layer_states, passing_stream
from healing_utils.healing.training import Diverged, Training, answers, fine_tune, grade, predict
from healing_utils.study.cells import RECIPE, Cell
from healing_utils.study.planning import intact_of, keeps_weights
from healing_utils.study.sources import Sources

KEPT_STATES = 256 << 20  # bytes of an intact model's states, the most that are kept
OnStep = Callable[..., None]


def _intact(study: Sources, cell: Cell, on_step: OnStep) -> dict[str, Any]:
    model = _load(study, cell)
    floor = _floors(study, cell, model)  # of the embeddings before they are trained
    result = _train_and_score(study, cell, model, on_step)
    if keeps_weights(study, cell):
        _save_weights(study, cell, model)
    found = models.loaded(cell.model, study.parameters["model_revision"])
    stream = passing_stream(model, study.examples(cell).sample)
    return {**result, "floors": floor, "stream": stream, **found}


def _broken(study: Sources, cell: Cell, on_step: OnStep) -> dict[str, Any]:
    broken = copy.deepcopy(_shared_intact(study, cell)[0])
    report = _corrupt(cell, broken)
    return {
        **_score(study, cell, broken),
        "similarity": similarity(study, cell, broken),
        "changed": _summary(report),
    }


def _untrained(study: Sources, cell: Cell, on_step: OnStep) -> dict[str, Any]:
    model = _load(study, cell, scratch=True).to(study.device).eval()
    return {**_score(study, cell, model), "similarity": similarity(study, cell, model)}


def _healed(study: Sources, cell: Cell, on_step: OnStep) -> dict[str, Any]:
    model, result = _heal(study, cell, on_step)
    if keeps_weights(study, cell):
        _save_weights(study, cell, model)
    return result


def _scratch(study: Sources, cell: Cell, on_step: OnStep) -> dict[str, Any]:
    return _train_and_score(study, cell, _load(study, cell, scratch=True), on_step)


COMPUTE: dict[str, Callable[[Sources, Cell, OnStep], dict[str, Any]]] = {
    "intact": _intact,
    "broken": _broken,
    "untrained": _untrained,
    "healed": _healed,
    "scratch": _scratch,
}


# -- networks --------------------------------------------------------------------------------------


def network(study: Sources, cell: Cell) -> torch.nn.Module:
    """The model that a cell scores, on the study's device, in evaluation mode.

    From the run's folder where its weights were kept, else made again.
    """
    if cell.state == "broken":
        broken = network(study, intact_of(study, cell))
        _corrupt(cell, broken)
        return broken
    model = _load(study, cell, scratch=cell.state == "scratch")
    path = study.store.weights_path(cell.key)
    try:
        model.load_state_dict(load(path.read_bytes()))
    except FileNotFoundError:
        if cell.state == "healed":
            model, _ = _heal(study, cell, lambda *_: None)
        else:
            _train_and_score(study, cell, model, lambda *_: None)
        _save_weights(study, cell, model)
    except Exception as error:  # truncated: safetensors and torch each have their own errors
        print(f"weights {path} are unusable ({error}); trained again", file=sys.stderr)
        path.unlink(missing_ok=True)
        return network(study, cell)
    return model.to(study.device).eval()


def similarity(study: Sources, cell: Cell, model: torch.nn.Module) -> dict[str, list[float]]:
    """How like the fine-tuned model's the layers of `model`, corrupted or healed, are."""
    return layer_similarity(_shared_intact(study, cell)[1], model, study.examples(cell).sample)


def _shared_intact(study: Sources, cell: Cell) -> tuple[torch.nn.Module, Any]:
    """The fine-tuned model of the cell's model, task and seed, and what `layer_similarity` takes
    for it. The next cell mostly gets the same ones: they are not to be changed."""
    intact, kept = intact_of(study, cell), study.intact_models
    if intact.key not in kept:
        kept.clear()  # one at a time
        states = model = network(study, intact)
        sample, config = study.examples(cell).sample, model.config
        values = sample.tokens * (config.num_hidden_layers + 1) * config.hidden_size
        if 4 * values <= KEPT_STATES:
            # Of a copy: what a forward pass leaves in a model does not get into broken ones.
            states = list(layer_states(copy.deepcopy(model), sample))
        kept[intact.key] = model, states
    return kept[intact.key]


def _load(study: Sources, cell: Cell, scratch: bool = False) -> torch.nn.Module:
    data = study.task(cell.task)
    return models.load_classifier(
        cell.model, data.num_labels, cell.seed, study.parameters["model_revision"], scratch,
        data.regression, study.settings(cell)["head"],
    )  # fmt: skip


def _save_weights(study: Sources, cell: Cell, model: torch.nn.Module) -> None:
    """Kept for the stages that break or probe the fine-tuned model; may be deleted any time."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    write_atomically(study.store.weights_path(cell.key), save(tensors))


def _corrupt(cell: Cell, model: torch.nn.Module) -> CorruptionReport:
    scattered = {"side": cell.side, "level": cell.level} if cell.side == "scattered" else None
    where = scattered or {"layers": list(cell.layers) or None}
    return corrupt(
        model, kind=cell.kind, seed=cell.seed, part=cell.part, strength=cell.strength, **where
    )


# -- training and scoring --------------------------------------------------------------------------


def _settings(study: Sources, cell: Cell, on_step: OnStep) -> dict[str, Any]:
    """What `fine_tune` is given for a cell, beside the model and the examples."""
    p = study.settings(cell)
    recipe = {name: p[name] for name in RECIPE if name != "max_length"}
    return {**recipe, "seed": cell.seed, "device": study.device, "on_step": on_step}


def _train_and_score(
    study: Sources, cell: Cell, model: torch.nn.Module, on_step: OnStep
) -> dict[str, Any]:
    examples, diverged = study.examples(cell), {}
    study.intact_models.clear()  # their place is for the training
    try:
        training = fine_tune(
            model, examples.train, examples.validation, **_settings(study, cell, on_step)
        )
    except Diverged as error:
        if cell.plain and cell.state == "intact":  # all else is compared with it
            raise
        training, diverged = error.training, {"diverged": str(error)}
    return {**_score(study, cell, model), **_trained(study, cell, training), **diverged}


def _heal(study: Sources, cell: Cell, on_step: OnStep) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Corrupt and heal; the model and its record. A loss that is no longer finite is a result: the
    model is then scored as training left it."""
    intact = intact_of(study, cell)
    model = network(study, intact) if cell.start == "fine-tuned" else _load(study, cell)
    report = _corrupt(cell, model)
    examples, training = study.examples(cell), _settings(study, cell, on_step)
    study.intact_models.clear()
    healing: dict[str, Any] = {}
    try:
        if cell.recipe == "full":
            done = fine_tune(model, examples.train, examples.validation, **training)
        else:
            taught = "teacher" in recipes.RECIPES[cell.recipe].needs
            healed = recipes.heal(
                model, cell.recipe, layers=cell.layers, train=examples.train,
                validation=examples.validation, pristine=lambda: _load(study, cell),
                teacher=network(study, intact) if taught else None,
                tokenizer=study.tokenizer(cell.model), **training,
            )  # fmt: skip
            done = healed.training
            healing = {"trained": healed.trained, "parameters": healed.parameters}
            if healed.warm_up:
                healing["warm_up_tokens"] = healed.warm_up.tokens
    except Diverged as error:
        done, healing = error.training, {"diverged": str(error)}
    scored, trained = _score(study, cell, model), _trained(study, cell, done)
    return model, {**scored, **trained, **healing, "changed": _summary(report)}


def _trained(study: Sources, cell: Cell, training: Training) -> dict[str, Any]:
    train = study.examples(cell).train
    return {
        "train_size": len(train),
        "train_tokens": training.tokens,
        "truncated": train.truncated,
        "steps": training.steps,
        "skipped_steps": training.skipped_steps,
        "max_tokens": training.max_tokens,
        "precision": training.precision,
        "shortcut": training.shortcut,
        "losses": [round(loss, 5) for loss in training.losses],
        "curve": training.curve,
    }


def _score(study: Sources, cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
    test = study.examples(cell).test
    logits = predict(model, test, device=study.device)
    scored = {
        "scores": grade(logits, test.labels),
        "chance": {**study.examples(cell).chance},
        "test_size": len(test),
    }
    if test.labels.dtype.kind != "f":  # so that the error of the test items can be paired
        right = answers(logits) == test.labels
        scored["right"] = "".join(map(str, right.astype(int)))
    return scored


def _floors(study: Sources, cell: Cell, model: torch.nn.Module) -> dict[str, Any]:
    p, data = study.settings(cell), study.task(cell.task)
    given = (*study.draw(cell), data.test, data.num_labels)
    table = model.get_input_embeddings().weight.detach().cpu().numpy()
    means = floors.static_means(study.tokenizer(cell.model), table, p["max_length"])
    with threadpool_limits(p["threads"]):  # with other threads, sums round otherwise
        return {"tfidf": floors.tfidf(*given), "static": floors.static(*given, means)}


def _summary(report: CorruptionReport) -> dict[str, Any]:
    """What a record keeps of a report: how much changed, and the change by tensor role."""
    by_role = report.to_frame().groupby("role")["relative_change"].mean()
    summary = {
        "tensors": len(report.tensors),
        "values": report.elements,
        "relative_change": {
            role: round(float(v), 5) for role, v in sorted(by_role.items()) if math.isfinite(v)
        },
    }
    if report.not_finite:
        summary["not_finite"] = report.not_finite
    if report.cannot_heal:
        summary["cannot_heal"] = True
    return summary
