"""The parameters of a study: what each means, what it may be, and its default (the `quick` run).

Every notebook declares those that it uses as plain literals; a profile is a YAML file of them. A
value may arrive as text from a command line (``1/6``, ``[0,2]``): its parameter's type understands
or refuses it, and names and paths stay text. All is refused that can be before torch is imported,
which takes seconds: two looks, of which the second asks the floors below.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator as After
from pydantic import BaseModel, Discriminator, Field, Tag, ValidationError, ValidationInfo
from pydantic import BeforeValidator as Before

from healing_utils.base.errors import HealingError, choose, nearest
from healing_utils.base.records import read_json

ONE, EACH = "one for all", "by task"
NULL = ("", "null", "none", "~")
FLAGS = {"true": True, "yes": True, "false": False, "no": False}
FREE = ("run", "device", "workers")  # parameters that make no other study of one
DEEPEST = 20  # lists in lists; a scan by task has five
LEVEL = re.compile(r"[-+]?(\d{1,9}/\d{1,9}|\d{0,9}\.?\d{0,20})")
FILE = re.compile(r"\.[A-Za-z]\w*$")  # how the name of a data file ends


# -- how values are read ---------------------------------------------------------------------------


class _Texts(yaml.BaseLoader):
    """YAML of lists, mappings, null and text: what a number is, or a date, is not for it to say.
    Nothing that unfolds without end, makes an object, or is there twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event, self.depth = self.peek_event(), self.depth + 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None):
            raise yaml.YAMLError(f"has an alias or a tag in line {event.start_mark.line + 1}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> str | None:
        return None if node.style is None and node.value in ("", "null", "~") else node.value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            raise yaml.YAMLError(f"names a key twice from line {node.start_mark.line + 1} on")
        return found


def read_yaml(text: str) -> Any:
    """The lists, mappings, nulls and texts (``12`` too) of YAML. Raises HealingError."""
    try:
        return yaml.load(text, _Texts)
    except yaml.YAMLError as error:
        raise HealingError(f"cannot be read as YAML: {' '.join(str(error).split())}") from None


def _plain(value: Any) -> Any:
    """Text that spells a list, a mapping or null as that; other text stays what it is."""
    if isinstance(value, str):
        if value.strip().lower() in NULL:
            return None
        if value.lstrip()[0] in "[{":
            return read_yaml(value)
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which pydantic takes for 0 or 1
        raise HealingError("must be a number")
    if isinstance(value, str) and re.match(r"\s*[-+]?0\d|.*_", value):  # ... 012 for 12, 1_0 for 10
        raise HealingError("must be a number, without leading zeros and underscores")
    return value


def _listed(value: Any) -> Any:
    """One value or several: ``3``, ``[0, 2]``, ``0,2``; null stays null."""
    value = _plain(value)
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return value if value is None or isinstance(value, list | tuple) else [value]


def _names(value: Any) -> Any:
    """As `_listed`, but that a comma may be part of a file's name."""
    found = [value] if isinstance(value, str) and _is_file(value) else _listed(value)
    split = isinstance(value, str) and value.lstrip()[:1] not in ("[", "{")
    lost = split and any(FILE.search(name) and not _is_file(name) for name in found or ())
    return [value] if lost else found


def _is_file(name: str) -> bool:
    return os.path.exists(os.path.expanduser(os.path.expandvars(name)))


def _once(values: list[Any]) -> list[Any]:
    if len(set(map(str, values))) < len(values):
        raise HealingError("names a value twice")
    return values


def _layer_sets(value: Any) -> Any:
    """``each`` for one layer at a time, or lists of layers."""
    value = _plain(value)
    several = isinstance(value, list) and all(isinstance(v, list) for v in value)
    return value if several or value in (None, "each") else [_listed(value)]


def _below(read: Callable[[Any], Any]) -> Any:
    """Text that a floor below reads, in the second look."""

    def look(value: Any, info: ValidationInfo) -> Any:
        return read(value) if info.context else value

    return After(look)


def _ask(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"healing_utils.{module}"), name)


def _among(module: str, tables: str, what: str) -> Any:
    """One of the names in `tables` of a module."""

    def read(value: str) -> str:
        return choose(value, chain(*(_ask(module, table) for table in tables.split())), what)

    return Annotated[str, _below(read)]


def _kind(value: str) -> str:
    parse, spell = (_ask("healing.corruption", name) for name in ("parse_kind", "spell_kind"))
    return spell(*parse(value))


def _spelt_levels(value: Any) -> list[Any]:
    found = _listed(value) or []
    if any(isinstance(level, str) and not LEVEL.fullmatch(level) for level in found):
        raise HealingError("must be a fraction such as 0.5 or 1/6")
    return found


def _levels(values: list[Any]) -> list[str]:
    """Fractions of the layers, as they are spelt."""
    _once([_ask("healing.encoders", "parse_level")(value) for value in values])
    return [str(value) for value in values]


def _several(read: Any, null: bool = False, by: Any = _listed) -> Any:
    found = Annotated[list[read], Field(min_length=not null), After(_once)]
    return Annotated[found | None if null else found, Before(by)]


def _by_task(read: Any) -> Any:
    """One value for all tasks, or a mapping by task: ``{sst2: 8000, emotion: 4000}``."""
    one = Annotated[read, Tag(ONE)]
    each = Annotated[dict[str, read], Tag(EACH), Field(min_length=1)]
    which = Discriminator(lambda value: EACH if isinstance(value, Mapping) else ONE)
    return Annotated[Annotated[one | each, which], Before(_plain)]


def _or_null(read: Any) -> Any:
    return Annotated[read | None, Before(_plain)]


# One line, with something in it.
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f]*[^\x00-\x20][^\x00-\x1f]*$")]
# A column may be called 1, or be given by its number.
Column = Annotated[Text, Before(lambda v: str(v) if type(v) is int else v)]
TextOrNull, ColumnOrNull = (
    Annotated[text | None, Before(lambda v: None if str(v).lower() in NULL else v)]
    for text in (Text, Column)
)
Flag = Annotated[bool, Before(lambda v: FLAGS.get(str(v).lower(), v)), Field(strict=True)]
Whole = Annotated[int, Before(_number), Field(ge=0, lt=2**31)]
Positive = Annotated[Whole, Field(ge=1)]
PositiveOrNull = _or_null(Positive)
Share = Annotated[float, Before(_number), Field(ge=0, le=1)]
Rate = Annotated[Share, Field(gt=0)]
Epochs = Annotated[float, Before(_number), Field(gt=0, le=1000)]
Points = Annotated[Positive, Field(le=10_000)]
Names, NamesOrNull = _several(Text, by=_names), _several(Text, null=True, by=_names)
Columns, Seeds = _several(Column, null=True), _several(Whole)
LayerSet = Annotated[list[Whole], Before(_listed), Field(min_length=1), After(_once)]
Levels = Annotated[list[Any], Before(_spelt_levels), _below(_levels)]
# A kind may have a strength: ``reinit``, ``noise=0.5``.
Kind = Annotated[str, _below(_kind)]
Part = _among("healing.encoders", "PARTS OUTER_PARTS", "part")
Side = _among("healing.encoders", "SIDES", "side")
Start = Literal["pre-trained", "fine-tuned"]
Recipe = _among("healing.recipes", "RECIPES", "recipe")
Head = _among("healing.models", "HEADS", "head")
Precision = _among("healing.training", "PRECISIONS", "precision")
Aggregation = _among("probing.activations", "AGGREGATIONS", "aggregation")
State = Literal["healed", "broken", "intact", "scratch"]


# -- the parameters --------------------------------------------------------------------------------


class Scan(BaseModel, extra="forbid"):
    """The fields of a scan: its cells are the product of their values. What is not given is as in
    the main grid, with `levels` at one half."""

    state: _several(State) = ["healed"]
    broken: Flag = True  # score what is healed broken too, without training
    task: Names | None = None  # some of the study's
    seeds: Seeds | None = None
    sides: _several(_among("healing.encoders", "SIDES CONTROLS", "side")) | None = None
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
    evaluations: _several(Points) | None = None  # points on a learning curve
    probed: Flag = False  # look inside its intact models too (04_linguistics)


SCAN: dict[str, Any] = Scan().model_dump()  # what is not given
Scans = Annotated[dict[str, Scan], Before(_plain)]


class Parameters(BaseModel, extra="forbid"):
    """A study's parameters, in the order in which they are told."""

    run: Text = "data/runs/quick"  # the run's folder: records, tables, figures
    model: Names = ["organism"]  # hub name or folder of the encoder, or several
    model_revision: TextOrNull = None
    task: Names = ["sentiment", "topic"]  # registered task, hub data set or file, or several
    text_column: Columns = None  # or two for pairs, where they are not found
    label_column: ColumnOrNull = None
    data_revision: TextOrNull = None
    metric: TextOrNull = None  # score to use instead of the task's own
    seeds: Seeds = [0, 1, 2]
    sides: _several(Side) = ["bottom", "top"]
    levels: Levels = ["1/6", "1/2", "1"]  # corrupted fractions of the layers
    layers: _or_null(LayerSet) = None  # these instead of sides and levels
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
    evaluations: Points = 12  # points on a learning curve after the first
    precision: Precision = "auto"
    device: TextOrNull = None  # cpu or cuda, null for the best there is
    threads: Annotated[Positive, Field(le=1024)] = 1  # of a CPU; results repeat for the same number
    workers: Annotated[Positive, Field(le=256)] = 2  # processes that share the cells
    # 04_linguistics
    corpus: Names = ["organism"]  # whose words are labelled: a name or a file, or several
    column: Columns = ["pos"]  # its labels; of several corpora one each
    word_column: Whole = 0  # of the words, in a file of columns
    corpus_test: TextOrNull = None  # file of the test part, where it is another one
    aggregation: Aggregation = "last"  # subword that speaks for a word
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
        for below in (False, True):
            found = Parameters.model_validate(dict(given), context=below)
    except ValidationError as error:
        raise HealingError(_told(error.errors()[0], given)[:1000]) from None
    scans = {name: scan.model_dump(exclude_unset=True) for name, scan in found.scans.items()}
    return found.model_dump() | {"scans": scans}


def has_records(folder: Path) -> bool:
    return any(folder.glob("records/*/*.json"))


def refuse_another(folder: Path, given: Mapping[str, Any]) -> None:
    """Raise HealingError where a run's folder has records of a study with other parameters than
    those that are `given`."""
    there = read_json(folder / "parameters.json") if has_records(folder) else {}
    for name, value in given.items():
        known = there.get(name, value)
        if name == "scans" and isinstance(known, dict):  # a notebook declares those that it is for
            known = {scan: known.get(scan, fields) for scan, fields in value.items()}
        if name not in FREE and known != value:
            raise HealingError(
                f"{folder} holds a run with other parameters ({name} {_shown(there[name])} there, "
                f"{_shown(value)} now); choose another folder"
            )


def _shown(value: object) -> str:
    try:
        return repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]}..."
    except ValueError:  # Python spells no such numbers
        return "a number of thousands of digits"


def _told(error: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What pydantic found, in one line."""
    if not error["loc"]:
        return f"the names of parameters: {error['msg']}"
    name, *rest = [part for part in error["loc"] if part not in (ONE, EACH)]
    rest = [part for part in rest if isinstance(part, str)]  # a place in a list says nothing
    if error["type"] == "extra_forbidden":
        what, known = "parameter", Parameters.model_fields
        if rest:
            what, known, name = f"field of scan {_shown(rest[0])}", Scan.model_fields, rest[-1]
        guess = nearest(name, known)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(known)}"
        return f"unknown {what} {_shown(name)}; {hint}"
    where = f"{', '.join(rest)} " if rest else ""
    said = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] in ("string_type", "string_pattern_mismatch"):
        said = "must be text, of one line"
    return f"parameter {name} is {_shown(given[name])}: {where}{said}"


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
    """The parameters among a notebook's variables, checked; for a `Study`, which knows the others.

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
    found = read_parameters(given)
    return {name: found[name] for name in given}
