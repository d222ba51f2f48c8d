"""The parameters of a study: what each means, what it may be, and its default (the `quick` run).

Every notebook declares those that it uses as plain literals; a profile is a YAML file of them. A
value may arrive as text from a command line (``1/6``, ``[0,2]``): it is understood or refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import yaml

from healing_utils.base.errors import HealingError, choose, nearest

SIDES = ("bottom", "top")
STARTS = ("pre-trained", "fine-tuned")
STATES = ("healed", "broken", "intact", "scratch")
BY_TASK = ("train_size", "epochs", "learning_rate")  # may have a value a task


@dataclass(frozen=True)
class Parameter:
    """A parameter: its default, how a given value is read, and what it means."""

    default: Any
    read: Callable[[Any], Any]
    help: str


def _plain(value: Any) -> Any:
    """Text from a command line as the YAML value it spells; ``1/6`` stays text."""
    if isinstance(value, str):
        if value.strip().lower() == "none":  # YAML's own word is null
            return None
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def _listed(value: Any) -> list[Any]:
    """One value or several: ``3``, ``[0, 2]``, ``0,2``."""
    value = _plain(value)
    if isinstance(value, str) and "," in value:
        value = [_plain(part.strip()) for part in value.split(",")]
    return list(value) if isinstance(value, list | tuple) else [value]


def _integer(low: int, optional: bool = False) -> Callable[[Any], int | None]:
    def read(value: Any) -> int | None:
        value = _plain(value)
        if value is None and optional:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            extra = " or null" if optional else ""
            raise HealingError(f"must be a whole number from {low} up{extra}")
        return value

    return read


def _number(low: float, high: float, open_low: bool = False) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        value = _plain(value)
        try:
            number = float(value)  # YAML 1.1 reads 2e-5 as text
        except (TypeError, ValueError):
            raise HealingError(f"must be a number from {low:g} to {high:g}") from None
        if isinstance(value, bool) or not low <= number <= high or (open_low and number == low):
            raise HealingError(
                f"must be a number {'above' if open_low else 'from'} {low:g}, at most {high:g}"
            )
        return number

    return read


def _text(optional: bool = False) -> Callable[[Any], str | None]:
    def read(value: Any) -> str | None:
        if value is None or (optional and value in ("null", "None", "")):
            if optional:
                return None
            raise HealingError("must be given")
        if not isinstance(value, str) or not value.strip():
            raise HealingError("must be text")
        return value

    return read


def _flag(value: Any) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise HealingError("must be true or false")
    return value


def _names(value: Any) -> list[str]:
    names = _listed(value)
    if not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise HealingError("must be a name or a list of names")
    return _unique(names)


def _tasks(value: Any) -> list[str] | None:
    return [] if _plain(value) == [] else _columns(value)


def _unique(values: list[Any]) -> list[Any]:
    if len(set(values)) < len(values):
        raise HealingError("names a value twice")
    return values


def _seeds(value: Any) -> list[int]:
    seeds = _unique([_integer(0)(v) for v in _listed(value)])
    if not seeds:
        raise HealingError("must name at least one seed")
    return seeds


def _columns(value: Any) -> list[str] | None:
    return None if _plain(value) is None else _names(value)


def _labels(value: Any) -> list[str] | None:
    """Columns by name or, in a file of columns, by number: ``upos``, ``1``, ``[1, -1]``."""
    if _plain(value) is None:
        return None
    return _names([str(c) if type(c) is int else c for c in _listed(value)])


def _levels(value: Any) -> list[str]:
    from healing_utils.healing.encoders import parse_level

    if _plain(value) is None or _listed(value) == []:
        return []
    levels = _listed(value)
    _unique([parse_level(level) for level in levels])
    return [str(level) for level in levels]


def _layers(value: Any) -> list[int] | None:
    value = _plain(value)
    return None if value is None else _unique([_integer(0)(v) for v in _listed(value)])


def _among(allowed: Callable[[], Any], what: str) -> Callable[[Any], list[str]]:
    def read(value: Any) -> list[str]:
        return _unique([choose(v, allowed(), what) for v in _listed(value)])

    return read


def _kinds(value: Any) -> list[str]:
    """Kinds of corruption, with a strength where they have one: ``reinit``, ``noise=0.5``."""
    from healing_utils.healing.corruption import parse_kind, spell_kind

    return _unique([spell_kind(*parse_kind(v)) for v in _listed(value)])


def _parts() -> tuple[str, ...]:
    from healing_utils.healing.encoders import OUTER_PARTS, PARTS

    return (*PARTS, *OUTER_PARTS)


def _controls() -> tuple[str, ...]:
    from healing_utils.healing.encoders import CONTROLS

    return (*SIDES, *CONTROLS)


def _recipes() -> Any:
    from healing_utils.healing.recipes import RECIPES

    return RECIPES


def _one(allowed: Callable[[], Any], what: str) -> Callable[[Any], str]:
    return lambda value: choose(_plain(value), allowed(), what)


def _several(read: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    return lambda value: _unique([read(v) for v in _listed(value)])


def _by_task(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """One value for all tasks, or a mapping by task: ``{sst2: 8000, emotion: 4000}``."""

    def each(value: Any) -> Any:
        value = _plain(value)
        if not isinstance(value, Mapping):
            return read(value)
        if not value:
            raise HealingError("must be a value, or a mapping of tasks to values")
        found = {}
        for task, one in value.items():
            try:
                found[str(task)] = read(one)
            except HealingError as error:
                raise HealingError(f"{task} {error}") from error
        return found

    return each


def for_task(parameters: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The parameters as they are for one task. Raises HealingError where a value is given by task
    and not for this one."""
    found = dict(parameters)
    for name in BY_TASK:
        given = found.get(name)
        if isinstance(given, Mapping):
            if task not in given:
                raise HealingError(
                    f"{name} is given for {', '.join(given)} and not for task {task!r}"
                )
            found[name] = given[task]
    return found


def _layer_sets(value: Any) -> str | list[list[int]]:
    """``each`` for one layer at a time, or lists of layers."""
    value = _plain(value)
    if value == "each":
        return value
    sets = value if isinstance(value, list) and all(isinstance(v, list) for v in value) else [value]
    if value is None or not sets:
        raise HealingError("must be each, a list of layers, or several such lists")
    return [_layers(layers) for layers in sets]


def _scans(value: Any) -> dict[str, dict[str, Any]]:
    """Scans by name, each a mapping of the fields of `SCAN`."""
    value = _plain(value)
    if not isinstance(value, Mapping):
        raise HealingError("must be scans by name, each a mapping such as {part: attention}")
    scans: dict[str, dict[str, Any]] = {}
    for name, given in value.items():
        if not isinstance(given, Mapping):
            raise HealingError(f"scan {name!r} must be a mapping such as {{part: attention}}")
        scans[str(name)] = {}
        for entry, one in given.items():
            field = SCAN[choose(entry, SCAN, f"field of scan {name!r}")]
            try:
                scans[str(name)][entry] = field.read(one)
            except HealingError as error:
                raise HealingError(f"{entry} of scan {name!r} is {one!r}: {error}") from error
    return scans


def _precision(value: Any) -> str:
    from healing_utils.healing.training import PRECISIONS

    return choose(value, PRECISIONS, "precision")


def _heads() -> tuple[str, ...]:
    from healing_utils.healing.models import HEADS

    return HEADS


def _aggregation(value: Any) -> str:
    from healing_utils.probing.activations import AGGREGATIONS

    return choose(value, AGGREGATIONS, "aggregation")


PARAMETERS: dict[str, Parameter] = {
    "run": Parameter("data/runs/quick", _text(), "the run's folder: records, tables, figures"),
    "model": Parameter("organism", _names, "hub name or folder of the encoder, or several"),
    "model_revision": Parameter(None, _text(True), "hub revision of the model"),
    "task": Parameter(
        ["sentiment", "topic"], _names, "registered task, hub data set or file, or several"
    ),
    "text_column": Parameter(None, _columns, "text column, or two for pairs, where not found"),
    "label_column": Parameter(None, _text(True), "label column, where it is not found"),
    "data_revision": Parameter(None, _text(True), "hub revision of the data set"),
    "metric": Parameter(None, _text(True), "score to use instead of the task's own"),
    "seeds": Parameter([0, 1, 2], _seeds, "one unit of inference for each task and seed"),
    "sides": Parameter(
        list(SIDES), _among(lambda: SIDES, "side"), "which end of the encoder is corrupted"
    ),
    "levels": Parameter(["1/6", "1/2", "1"], _levels, "corrupted fractions of the layers"),
    "layers": Parameter(None, _layers, "these layers instead of sides and levels"),
    "kind": Parameter(["reinit"], _kinds, "kinds of corruption, such as reinit or noise=0.5"),
    "part": Parameter("all", _one(_parts, "part"), "what of a layer, or beside them, is corrupted"),
    "start": Parameter(
        "pre-trained", _one(lambda: STARTS, "start"), "which model is corrupted, then fine-tuned"
    ),
    "recipe": Parameter("full", _one(_recipes, "recipe"), "how corrupted models are healed"),
    "init_levels": Parameter(
        [], _levels, "levels that are also redrawn with the model's own initialiser"
    ),
    "scratch": Parameter(True, _flag, "also train from random initial values"),
    "scans": Parameter({}, _scans, "cells beside that grid, by scan: see the parameters' `SCAN`"),
    "head": Parameter(
        "first", _one(_heads, "head"), "reads the first token (the model's own), or the mean"
    ),
    "train_size": Parameter(
        1000, _by_task(_integer(1, True)), "labelled examples, null for all; or by task"
    ),
    "validation_size": Parameter(500, _integer(1), "held out of training for learning curves"),
    "test_size": Parameter(None, _integer(1, True), "scored examples, null for all"),
    "epochs": Parameter(
        4.0, _by_task(_number(0, 1000, True)), "passes over the training examples; or by task"
    ),
    "batch_size": Parameter(32, _integer(1), "examples in a step"),
    "learning_rate": Parameter(
        5e-4, _by_task(_number(0, 1, True)), "peak learning rate; or by task"
    ),
    "weight_decay": Parameter(0.01, _number(0, 1), "of AdamW"),
    "warmup": Parameter(0.1, _number(0, 1), "fraction of the steps with a rising rate"),
    "max_grad_norm": Parameter(1.0, _number(0, 1e6, True), "gradients are clipped to this norm"),
    "max_length": Parameter(128, _integer(4), "tokens a text is cut to"),
    "max_tokens": Parameter(8192, _integer(16), "tokens computed at once, padding included"),
    "evaluations": Parameter(12, _integer(1), "points on a learning curve after the first"),
    "precision": Parameter("auto", _precision, "auto, float32, bfloat16 or float16"),
    "device": Parameter(None, _text(True), "cpu or cuda, null for the best there is"),
    "threads": Parameter(1, _integer(1), "CPU threads; results repeat for the same number"),
    "workers": Parameter(2, _integer(1), "processes that share the cells of a stage"),
    # 04_linguistics
    "corpus": Parameter(
        ["organism"], _names, "corpus whose words are labelled: a name or a file, or several"
    ),
    "column": Parameter(["pos"], _labels, "its labels; of several corpora one each"),
    "word_column": Parameter(0, _integer(0), "column of the words in a file of columns, from 0"),
    "corpus_test": Parameter(None, _text(True), "file of the test part, where it is another one"),
    "aggregation": Parameter(
        "last", _aggregation, "which of a word's subwords speaks for it: first, last or mean"
    ),
    "probe_train": Parameter(
        200, _integer(2, True), "training sentences of a corpus, null for all"
    ),
    "probe_test": Parameter(200, _integer(1, True), "scored sentences of a corpus, null for all"),
    "probe_models": Parameter(
        None,
        _columns,
        "models that are probed, null for the study's own",
    ),
    "probe_tasks": Parameter(
        None, _columns, "tasks whose fine-tuned models are probed, null for the study's own"
    ),
    "neuron_delta": Parameter(
        0.01, _number(0, 0.99), "accuracy that the minimal set of neurons may lose"
    ),
    "healed_tasks": Parameter(
        None, _tasks, "tasks whose broken and healed models are probed, null for all"
    ),
    "probe_levels": Parameter(["1/2"], _levels, "levels at which those are probed, kind reinit"),
    # 00_model_organism only
    "pretraining_steps": Parameter(40, _integer(1), "steps of the pre-training shown"),
    "publish": Parameter(False, _flag, "train fully and replace the shipped organism"),
    "organism_seeds": Parameter([0, 1, 2, 3, 4], _seeds, "seeds of the organism's table"),
}

# The fields of a scan: its cells are the product of their values. What is not given is as in the
# main grid, with `levels` at one half.
SCAN: dict[str, Parameter] = {
    "state": Parameter(
        ["healed"], _among(lambda: STATES, "state"), "healed, broken, intact, scratch"
    ),
    "broken": Parameter(True, _flag, "score what is healed broken too, without training"),
    "task": Parameter(None, _names, "some of the study's tasks"),
    "seeds": Parameter(None, _seeds, "seeds"),
    "sides": Parameter(None, _among(_controls, "side"), "also random and scattered, the controls"),
    "levels": Parameter(["1/2"], _levels, "corrupted fractions of the layers"),
    "layers": Parameter(None, _layer_sets, "each, or lists of layers, instead of sides and levels"),
    "kind": Parameter(["reinit"], _kinds, "kinds, with their strengths"),
    "part": Parameter(["all"], _among(_parts, "part"), "parts"),
    "start": Parameter(["pre-trained"], _among(lambda: STARTS, "start"), "starts"),
    "recipe": Parameter(["full"], _among(_recipes, "recipe"), "recipes"),
    "head": Parameter(None, _among(_heads, "head"), "heads"),
    "train_size": Parameter(None, _by_task(_several(_integer(1))), "labelled examples; or by task"),
    "epochs": Parameter(
        None, _by_task(_several(_number(0, 1000, True))), "passes over them; or by task"
    ),
    "learning_rate": Parameter(
        None, _by_task(_several(_number(0, 1, True))), "peak learning rates; or by task"
    ),
    "probed": Parameter(False, _flag, "look inside its intact models too (04_linguistics)"),
    "evaluations": Parameter(None, _several(_integer(1)), "points on a learning curve"),
}


def read_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Clean values for what is `given`, defaults for the rest.

    Raises HealingError naming the parameter, what is allowed, and for an unknown name the nearest.
    """
    values = {}
    for name in given:
        if name not in PARAMETERS:
            guess = nearest(name, PARAMETERS)
            hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(PARAMETERS)}"
            raise HealingError(f"unknown parameter {name!r}; {hint}")
    for name, parameter in PARAMETERS.items():
        try:
            values[name] = parameter.read(given.get(name, parameter.default))
        except HealingError as error:
            raise HealingError(f"parameter {name} is {given[name]!r}: {error}") from error
    return values


def notebook_parameters(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """The parameters among a notebook's variables, checked.

    Called with ``globals()`` right after the parameter cell, when the only plain public variables
    are parameters: any other was injected under a wrong name and is refused. When the cell is run
    again later, in the same kernel, the notebook's own variables are there too and are passed over.
    """
    plain = (str, int, float, bool, list, tuple, dict, type(None))
    given = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ("In", "Out")
    }
    if namespace.get("_parameters_checked"):
        given = {name: value for name, value in given.items() if name in PARAMETERS}
    namespace["_parameters_checked"] = True
    return read_parameters(given)
