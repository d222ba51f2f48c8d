"""Corrupt chosen layers of an encoder: exactly those, the same everywhere, and report it.

`corrupt` plans which parameters a call stands for (`healing_utils.encoders`), asks the *kind* for
each one's new values and copies them in. The kinds stand in one table, `KINDS`; the next one is a
function with a docstring under `@_kind`.

Values are drawn per parameter, on the CPU in float32, from a generator seeded with the call's seed
and the parameter's name inside the encoder. So a draw does not depend on the device, the precision,
the head, the process, or on which other parameters are redrawn, and torch's global random state is
left alone. (Between processors with and without fused multiply-add, torch's own draws can differ by
rounding, seen up to 5e-8.)
"""

from __future__ import annotations

import copy
import hashlib
import html
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from healing_utils.encoders import (
    Piece,
    encoder_layers,
    parse_layers,
    parse_level,
    part_pieces,
    resolve_layers,
)
from healing_utils.errors import HealingError, choose

if TYPE_CHECKING:
    import pandas

# --- What a kind gets and gives -------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """One parameter to corrupt, as a kind sees it.

    `name` is relative to the encoder, `piece` says its role inside `layer`, `layer_index` where it
    is.
    """

    name: str
    layer_index: int
    piece: Piece
    parameter: torch.nn.Parameter
    layer: torch.nn.Module
    model: torch.nn.Module


@dataclass(frozen=True)
class Kind:
    """A kind of corruption. `strength` says what its strength means; None: it has none."""

    name: str
    values: Callable[[Target, torch.Generator, float | None], torch.Tensor]
    strength: str | None

    @property
    def summary(self) -> str:
        """The first line of the kind's docstring."""
        return (self.values.__doc__ or "").strip().split("\n")[0]


KINDS: dict[str, Kind] = {}


def _kind(strength: str | None = None) -> Callable[[Callable], Callable]:
    """Enter a function into the table under its own name.

    It is called as ``function(target, generator, strength)``, must not change anything, and returns
    the new values of the *whole* parameter, shaped like it, on the CPU; every random draw uses
    `generator`.
    """

    def enter(function: Callable) -> Callable:
        KINDS[function.__name__] = Kind(function.__name__, function, strength)
        return function

    return enter


# --- The kinds ------------------------------------------------------------------------------------


@_kind()
def reinit(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """LayerNorm weights 1, every other weight Kaiming-uniform, all biases 0.

    Han, Zhang and Simion (2024), arXiv 2406.14459. Weights are drawn by
    `torch.nn.init.kaiming_uniform_` with its defaults: uniform within sqrt(6 / fan_in). Torch takes
    as fan_in the size of all axes but the first: the input width of a linear layer, and for XLNet's
    raw (d_model, heads, d_head) tensors heads x d_head = d_model, which is the number of inputs
    summed over in q, k, v, r and o alike. The same convention is kept for XLNet's seg_embed (2,
    heads, d_head). Its 2-D biases are set to 0.
    """
    values = torch.empty(target.parameter.shape, dtype=torch.float32, device="cpu")
    if target.piece.is_bias:
        return values.zero_()
    if target.piece.role == "layernorm":
        return values.fill_(1.0)
    if values.dim() < 2:
        raise HealingError(
            f"{target.name} is neither a bias nor a LayerNorm, and a weight of shape "
            f"{tuple(values.shape)} has no fan_in: kind 'reinit' cannot redraw it"
        )
    return torch.nn.init.kaiming_uniform_(values, generator=generator)


@_kind()
def init(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """The model's own initial values, as its architecture draws them before pre-training.

    The model's `_init_weights` runs on a copy of the layer in which this parameter is real and
    every other one is on the meta device, so that nothing else is drawn and the values depend on
    this parameter's generator alone. For most families that is a normal with the configuration's
    `initializer_range`, LayerNorms at 1 and biases at 0; XLNet draws its 2-D biases too, and
    ModernBERT truncates the normal and narrows its output projections with depth.
    """
    owners = (module for module in target.model.modules() if hasattr(module, "_init_weights"))
    initialise = getattr(next(owners, None), "_init_weights", None)
    if initialise is None:
        raise HealingError(
            f"{type(target.model).__name__} has no initialiser of its own (no _init_weights, as "
            "transformers models have): use kind 'reinit'"
        )
    # New Parameter objects also lack the mark by which transformers skips loaded weights.
    fresh = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for parameter in target.layer.parameters()
    }
    values = torch.full(target.parameter.shape, math.nan, dtype=torch.float32, device="cpu")
    fresh[id(target.parameter)] = torch.nn.Parameter(values, requires_grad=False)
    blank = copy.deepcopy(target.layer, fresh)
    with torch.random.fork_rng(devices=[]):  # initialisers draw from the global generator
        torch.default_generator.set_state(generator.get_state())
        path = target.piece.name.split(".")[:-1]
        for depth in range(len(path), -1, -1):  # the owner, then its parents, as transformers does
            initialise(blank.get_submodule(".".join(path[:depth])))
    if torch.isnan(values).any():
        raise HealingError(
            f"the initialiser of {type(target.model).__name__} leaves {target.name} alone: "
            "use kind 'reinit'"
        )
    return values


# --- The report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorChange:
    """What happened to one parameter, or to the rows of it that were meant.

    `std_before` and `std_after` are population standard deviations; `relative_change` is the norm
    of the difference over the norm before, None where the tensor was all zeros and is not any more.
    Figures that are not finite are None.
    """

    name: str
    layer: int
    role: str
    shape: tuple[int, ...]
    elements: int
    std_before: float | None
    std_after: float | None
    relative_change: float | None


@dataclass(frozen=True)
class CorruptionReport:
    """What `corrupt` did. `side` is bottom, top, all (every layer) or custom (`layers` were named);
    `level` is the fraction asked for, for custom layers the fraction that they are.
    """

    kind: str
    side: str
    level: float
    layers: tuple[int, ...]
    n_layers: int
    part: str
    strength: float | None
    seed: int
    tensors: tuple[TensorChange, ...]

    @property
    def elements(self) -> int:
        """Number of values that were overwritten."""
        return sum(tensor.elements for tensor in self.tensors)

    def to_frame(self) -> pandas.DataFrame:
        """One row a tensor, with the columns of `TensorChange`."""
        import pandas

        names = [field.name for field in fields(TensorChange)]
        frame = pandas.DataFrame([asdict(tensor) for tensor in self.tensors], columns=names)
        numbers = ["std_before", "std_after", "relative_change"]
        return frame.astype(dict.fromkeys(numbers, float))

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and text, fit for JSON."""
        record = asdict(self)
        record["layers"] = list(self.layers)
        record["tensors"] = [{**t, "shape": list(t["shape"])} for t in record["tensors"]]
        return record

    def __str__(self) -> str:
        part = "" if self.part == "all" else f", {self.part} only"
        strength = "" if self.strength is None else f" at strength {self.strength:g}"
        which = ", ".join(map(str, self.layers))
        layers = "layer" if len(self.layers) == 1 else "layers"
        return (
            f"{self.kind}{strength} (seed {self.seed}) in {layers} {which} of {self.n_layers}"
            f"{part}: {len(self.tensors)} tensors, {self.elements:,} values"
        )

    def _repr_html_(self) -> str:
        return f"<p><strong>corrupted</strong> {html.escape(str(self))}</p>"


# --- Corrupting -----------------------------------------------------------------------------------


def corrupt(
    model: torch.nn.Module,
    side: str = "bottom",
    level: float | str = 0.5,
    kind: str = "reinit",
    seed: int = 0,
    layers: Sequence[int] | str | None = None,
    part: str = "all",
    strength: float | None = None,
) -> CorruptionReport:
    """Corrupt some layers of `model` in place and report what changed.

    Parameters
    ----------
    side, level, layers : which layers; see `encoders.resolve_layers`. Embeddings, pooler and head
        are never touched.
    kind : a key of `KINDS`.
    seed : a whole number from 0 up; the same seed gives the same values on every device, in every
        process and with every head, and in lower precision the cast of the same values.
    part : a key of `encoders.PARTS`; the default is everything in a layer.
    strength : for kinds that have one; refused by the others.

    Nothing has changed when it raises HealingError: for an unknown name, a plan that selects
    nothing, an unsupported model, or a parameter that holds no floating-point values (meta device,
    quantised).
    """
    rule = KINDS[choose(kind, KINDS, "kind of corruption")]
    seed = _clean_seed(seed)
    strength = _clean_strength(rule, strength)
    stack = encoder_layers(model)
    chosen = resolve_layers(len(stack), side, level, layers)
    targets = [
        Target(
            name=f"layer.{index}.{piece.name}",
            layer_index=index,
            piece=piece,
            parameter=stack[index].get_parameter(piece.name),
            layer=stack[index],
            model=model,
        )
        for index in chosen
        for piece in part_pieces(stack[index], part)
    ]
    if not targets:
        raise HealingError(
            f"layers {list(chosen)} of {type(model).__name__} hold nothing of part {part!r}"
        )
    for target in targets:
        _check_storage(target)

    # All is drawn before any is written: a kind that refuses one parameter leaves the model whole.
    values = [rule.values(target, _generator(seed, target.name), strength) for target in targets]
    changes = tuple(map(_write, targets, values))
    if parse_layers(layers) is not None:
        side, level = "custom", len(chosen) / len(stack)
    elif len(chosen) == len(stack):
        side = "all"
    return CorruptionReport(
        kind, side, parse_level(level), chosen, len(stack), part, strength, seed, changes
    )


def _clean_seed(seed: Any) -> int:
    try:
        if isinstance(seed, bool):
            raise TypeError
        seed = int(seed) if isinstance(seed, str) else operator.index(seed)
    except (TypeError, ValueError):
        raise HealingError(f"seed {seed!r} is not a whole number") from None
    if seed < 0:
        raise HealingError(f"seed {seed} is negative; seeds start at 0")
    return seed


def _clean_strength(rule: Kind, strength: Any) -> float | None:
    if rule.strength is None:
        if strength is not None:
            raise HealingError(
                f"kind {rule.name!r} has no strength, but strength={strength!r} was given"
            )
        return None
    try:
        return float(strength)
    except (TypeError, ValueError):
        raise HealingError(f"kind {rule.name!r} needs a strength: {rule.strength}") from None


def _check_storage(target: Target) -> None:
    if target.parameter.is_meta:
        raise HealingError(
            f"{target.name} is on the meta device: load the weights before corrupting them"
        )
    if not target.parameter.is_floating_point():
        dtype = str(target.parameter.dtype).removeprefix("torch.")
        raise HealingError(
            f"{target.name} is stored as {dtype}: only floating-point weights can be corrupted "
            "(load the model without quantisation)"
        )


def _generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, name), by a hash that no process salts."""
    # Four bytes, because torch's Mersenne twister uses only the low 32 bits of a seed.
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))


@torch.no_grad()
def _write(target: Target, values: torch.Tensor) -> TensorChange:
    """Copy the rows meant from the new values of the whole parameter; measure the difference."""
    rows = slice(None) if target.piece.rows is None else target.piece.rows
    region = target.parameter[rows]
    before = region.detach().to("cpu", torch.float64, copy=True)
    region.copy_(values[rows])
    after = region.detach().to("cpu", torch.float64)
    size, moved = before.norm().item(), (after - before).norm().item()
    sliced = "" if target.piece.rows is None else f"[{rows.start}:{rows.stop}]"
    return TensorChange(
        name=target.name + sliced,
        layer=target.layer_index,
        role=target.piece.role,
        shape=tuple(region.shape),
        elements=region.numel(),
        std_before=_finite(before.std(correction=0).item()),
        std_after=_finite(after.std(correction=0).item()),
        relative_change=_finite(moved / size) if size else (0.0 if moved == 0 else None),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
