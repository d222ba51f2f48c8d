"""The parameters of a study: what each means, what it may be, and its default (the `quick` run).

Every notebook declares those that it uses as plain literals; a profile is a YAML file of them. A
value may arrive as text from a command line (``1/6``, ``[0,2]``): it is understood or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator as After
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError
from pydantic import BeforeValidator as Before

from healing_utils.base.errors import HealingError, choose, nearest
from healing_utils.healing.corruption import parse_kind, spell_kind
from healing_utils.healing.encoders import CONTROLS, OUTER_PARTS, PARTS, SIDES, parse_level
from healing_utils.healing.models import HEADS
from healing_utils.healing.recipes import RECIPES
from healing_utils.healing.training import PRECISIONS
from healing_utils.probing.activations import AGGREGATIONS

ONE, EACH = "one for all", "by task"


# -- how values are read ---------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Text from a command line as the YAML value it spells; ``1/6`` stays text."""
    if not isinstance(value, str):
        return value
    try:  # YAML's own word is null
        return None if value.strip().lower() == "none" else yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _number(value: Any) -> Any:
    value = _plain(value)
    if isinstance(value, bool):  # which pydantic takes for 0 or 1
        raise HealingError("must be a number")
    return value


def _listed(value: Any) -> Any:
    """One value or several: ``3``, ``[0, 2]``, ``0,2``; null stays null."""
    value = _plain(value)
    if isinstance(value, str) and "," in value:
        value = [_plain(part.strip()) for part in value.split(",")]
    return value if value is None or isinstance(value, list | tuple) else [value]


def _once(values: list[Any]) -> list[Any]:
    if len(set(map(str, values))) < len(values):
        raise HealingError("names a value twice")
    return values


def _levels(value: Any) -> list[str]:
    """Fractions of the layers, as they are spelt."""
    found = _listed(value) or []
    _once([parse_level(level) for level in found])
    return [str(level) for level in found]


def _layer_sets(value: Any) -> Any:
    """``each`` for one layer at a time, or lists of layers."""
    value = _plain(value)
    several = isinstance(value, list) and all(isinstance(v, list) for v in value)
    return value if several or value in (None, "each") else [_listed(value)]


def _among(allowed: Iterable[str], what: str) -> Any:
    return Annotated[str, Before(lambda value: choose(_plain(value), allowed, what))]


def _several(read: Any, null: bool = False) -> Any:
    found = Annotated[list[read], Field(min_length=not null), After(_once)]
    return Annotated[found | None if null else found, Before(_listed)]


def _by_task(read: Any) -> Any:
    """One value for all tasks, or a mapping by task: ``{sst2: 8000, emotion: 4000}``."""
    one = Annotated[read, Tag(ONE)]
    each = Annotated[dict[str, read], Tag(EACH), Field(min_length=1)]
    which = Discriminator(lambda value: EACH if isinstance(value, Mapping) else ONE)
    return Annotated[Annotated[one | each, which], Before(_plain)]


Text = Annotated[str, Field(pattern=r"\S")]
TextOrNull = Annotated[Text | None, Before(lambda v: None if v in ("null", "None", "~", "") else v)]
Flag = Annotated[bool, Before(_plain), Field(strict=True)]
Whole = Annotated[int, Before(_number), Field(ge=0)]
Positive = Annotated[int, Before(_number), Field(ge=1)]
PositiveOrNull = Annotated[Positive | None, Before(_plain)]
Share = Annotated[float, Before(_number), Field(ge=0, le=1)]
Rate = Annotated[float, Before(_number), Field(gt=0, le=1)]
Epochs = Annotated[float, Before(_number), Field(gt=0, le=1000)]
Names, NamesOrNull, Seeds = _several(Text), _several(Text, null=True), _several(Whole)
# In a file of columns also by number.
Column = Annotated[Text, Before(lambda v: str(v) if type(v) is int else v)]
LayerSet = Annotated[list[Whole], Before(_listed), After(_once)]
Levels = Annotated[list[str], Before(_levels)]
# A kind may have a strength: ``reinit``, ``noise=0.5``.
Kind = Annotated[str, Before(lambda value: spell_kind(*parse_kind(value)))]
Part = _among((*PARTS, *OUTER_PARTS), "part")
Start = _among(("pre-trained", "fine-tuned"), "start")
Recipe, Head = _among(RECIPES, "recipe"), _among(HEADS, "head")
State = _among(("healed", "broken", "intact", "scratch"), "state")


# -- the parameters --------------------------------------------------------------------------------


class Scan(BaseModel, extra="forbid"):
    """The fields of a scan: its cells are the product of their values. What is not given is as in
    the main grid, with `levels` at one half."""

    state: _several(State) = ["healed"]
    broken: Flag = True  # score what is healed broken too, without training
    task: Names | None = None  # some of the study's
    seeds: Seeds | None = None
    sides: _several(_among((*SIDES, *CONTROLS), "side")) | None = None
    levels: Levels = ["1/2"]
    layers: Annotated[Literal["each"] | list[LayerSet] | None, Before(_layer_sets)] = None
    kind: _several(Kind) = ["reinit"]
    part: _several(Part) = ["all"]
    start: _several(Start) = ["pre-trained"]
    recipe: _several(Recipe) = ["full"]
    head: _several(Head) | None = None
    train_size: _by_task(_several(Positive)) | None = None
    epochs: _by_task(_several(Epochs)) | None = None
    learning_rate: _by_task(_several(Rate)) | None = None
    evaluations: _several(Positive) | None = None  # points on a learning curve
    probed: Flag = False  # look inside its intact models too (04_linguistics)


SCAN: dict[str, Any] = Scan().model_dump()  # what is not given
Scans = Annotated[dict[str, Scan], Before(_plain)]


class Parameters(BaseModel, extra="forbid"):
    """A study's parameters, in the order in which they are told."""

    run: Text = "data/runs/quick"  # the run's folder: records, tables, figures
    model: Names = ["organism"]  # hub name or folder of the encoder, or several
    model_revision: TextOrNull = None
    task: Names = ["sentiment", "topic"]  # registered task, hub data set or file, or several
    text_column: NamesOrNull = None  # or two for pairs, where they are not found
    label_column: TextOrNull = None
    data_revision: TextOrNull = None
    metric: TextOrNull = None  # score to use instead of the task's own
    seeds: Seeds = [0, 1, 2]
    sides: _several(_among(SIDES, "side")) = list(SIDES)
    levels: Levels = ["1/6", "1/2", "1"]  # corrupted fractions of the layers
    layers: _several(Whole, null=True) = None  # these instead of sides and levels
    kind: _several(Kind) = ["reinit"]
    part: Part = "all"  # what of a layer, or beside them, is corrupted
    start: Start = "pre-trained"  # which model is corrupted, then fine-tuned
    recipe: Recipe = "full"  # how corrupted models are healed
    init_levels: Levels = []  # that are also redrawn with the model's own initialiser
    scratch: Flag = True  # also train from random initial values
    scans: Scans = {}  # cells beside that grid
    head: Head = "first"  # reads the first token (the model's own), or the mean
    train_size: _by_task(PositiveOrNull) = 1000  # labelled examples, null for all
    validation_size: Positive = 500  # held out of training for learning curves
    test_size: PositiveOrNull = None  # scored examples, null for all
    epochs: _by_task(Epochs) = 4.0
    batch_size: Positive = 32
    learning_rate: _by_task(Rate) = 5e-4  # the peak
    weight_decay: Share = 0.01  # of AdamW
    warmup: Share = 0.1  # fraction of the steps with a rising rate
    max_grad_norm: Annotated[float, Before(_number), Field(gt=0, le=1e6)] = 1.0
    max_length: Annotated[Positive, Field(ge=4)] = 128  # tokens a text is cut to
    max_tokens: Annotated[Positive, Field(ge=16)] = 8192  # computed at once, padding included
    evaluations: Positive = 12  # points on a learning curve after the first
    precision: _among(PRECISIONS, "precision") = "auto"
    device: TextOrNull = None  # cpu or cuda, null for the best there is
    threads: Positive = 1  # of a CPU; results repeat for the same number
    workers: Positive = 2  # processes that share the cells
    # 04_linguistics
    corpus: Names = ["organism"]  # whose words are labelled: a name or a file, or several
    column: _several(Column, null=True) = ["pos"]  # its labels; of several corpora one each
    word_column: Whole = 0  # of the words, in a file of columns
    corpus_test: TextOrNull = None  # file of the test part, where it is another one
    aggregation: _among(AGGREGATIONS, "aggregation") = "last"  # subword that speaks for a word
    probe_train: PositiveOrNull = 200  # sentences, null for all
    probe_test: PositiveOrNull = 200
    probe_models: NamesOrNull = None  # null for the study's own
    probe_tasks: NamesOrNull = None  # whose fine-tuned models are probed
    neuron_delta: Annotated[Share, Field(le=0.99)] = 0.01  # accuracy the minimal set may lose
    healed_tasks: NamesOrNull = None  # whose broken and healed models are probed
    probe_levels: Levels = ["1/2"]  # at which those are probed, kind reinit
    # 00_model_organism only
    pretraining_steps: Positive = 40
    publish: Flag = False  # train fully and replace the shipped organism
    organism_seeds: Seeds = [0, 1, 2, 3, 4]


def read_parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """Clean values for what is `given`, defaults for the rest.

    Raises HealingError naming the parameter, what is allowed, and for an unknown name the nearest.
    """
    try:
        found = Parameters.model_validate(dict(given))
    except ValidationError as error:
        raise HealingError(_told(error.errors()[0], given)) from None
    scans = {name: scan.model_dump(exclude_unset=True) for name, scan in found.scans.items()}
    return found.model_dump() | {"scans": scans}


def _told(error: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What pydantic found, in one line."""
    name, *rest = [part for part in error["loc"] if part not in (ONE, EACH)]
    rest = [part for part in rest if isinstance(part, str)]  # a place in a list says nothing
    if error["type"] == "extra_forbidden":
        what, known = "parameter", Parameters.model_fields
        if rest:
            what, known, name = f"field of scan {rest[0]!r}", Scan.model_fields, rest[-1]
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}"
        return f"unknown {what} {name!r}; {hint}"
    where = f"{', '.join(rest)} " if rest else ""
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] in ("string_type", "string_pattern_mismatch"):
        said = "must be text"
    return f"parameter {name} is {given[name]!r}: {where}{said}"


def for_task(parameters: Mapping[str, Any], task: str) -> dict[str, Any]:
    """The parameters as they are for one task. Raises HealingError where a value is given by task
    and not for this one."""
    found = dict(parameters)
    for name in ("train_size", "epochs", "learning_rate"):
        given = found[name]
        if isinstance(given, Mapping):
            if task not in given:
                known = ", ".join(given)
                raise HealingError(f"{name} is given for {known} and not for task {task!r}")
            found[name] = given[task]
    return found


def notebook_parameters(namespace: MutableMapping[str, Any]) -> dict[str, Any]:
    """The parameters among a notebook's variables, checked.

    Called with ``globals()`` right after the parameter cell, when the only plain public variables
    are parameters: any other was injected under a wrong name and is refused. When the cell is run
    again later, the notebook's own variables are there too and are passed over.
    """
    plain = str | int | float | list | tuple | dict | None
    given = {
        name: value
        for name, value in namespace.items()
        if isinstance(value, plain) and not name.startswith("_") and name not in ("In", "Out")
        if name in Parameters.model_fields or "_parameters_checked" not in namespace
    }
    namespace["_parameters_checked"] = True
    return read_parameters(given)
