"""Corrupt chosen layers of an encoder: exactly those, the same everywhere, and report it.

`corrupt` plans which parameters a call stands for (`encoders`), asks the *kind* for each one's new
values and copies them in. The next kind is a function with a docstring under `@_kind`.

Values are drawn per parameter, on the CPU in float32, from a generator seeded with the call's seed
and the parameter's name inside the encoder. So a draw does not depend on the device, the precision,
the head, the process, or on which other parameters are redrawn. (Between processors with and
without fused multiply-add, torch's own draws can differ by rounding, seen up to 5e-8.)
"""

from __future__ import annotations

import copy
import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing.encoders import (
    OUTER_PARTS,
    PARTS,
    Piece,
    encoder_layers,
    outer_parts,
    parse_layers,
    parse_level,
    part_pieces,
    resolve_layers,
)


@dataclass(frozen=True)
class Target:
    """One parameter to corrupt: `piece` of `module`, which is a layer or stands beside the layers
    (`layer` is then -1). `name` is relative to the encoder."""

    name: str
    layer: int
    piece: Piece
    module: torch.nn.Module
    model: torch.nn.Module

    @property
    def parameter(self) -> torch.nn.Parameter:
        return self.module.get_parameter(self.piece.name)

    @property
    def rows(self) -> slice:
        return self.piece.rows or slice(None)

    @property
    def values(self) -> torch.Tensor:
        """The rows meant, a float32 copy on the CPU."""
        return self.parameter.detach()[self.rows].to("cpu", torch.float32, copy=True)


@dataclass(frozen=True)
class Kind:
    """A kind of corruption. `strength` says what its strength means, None where it has none, and
    `allowed` which values it may have. Where `spares_vectors`, biases and normalisations keep their
    values. `cannot_heal` names the parts that no gradient can bring back."""

    name: str
    draw: Callable[[Target, torch.Generator, float | None], torch.Tensor]
    summary: str  # the first line of its docstring
    strength: str | None = None
    allowed: tuple[float, float] = (0.0, math.inf)
    spares_vectors: bool = False
    cannot_heal: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {}


def _kind(strength: str | None = None, **properties: Any) -> Callable[[Callable], Callable]:
    """Enter ``function(target, generator, strength)`` into the table under its own name, with the
    properties of `Kind`. It changes nothing, returns new values for the rows meant, on the CPU, and
    draws from `generator` alone."""

    def enter(function: Callable) -> Callable:
        name, summary = function.__name__, function.__doc__.split("\n")[0]
        KINDS[name] = Kind(name, function, summary, strength, **properties)
        return function

    return enter


@_kind()
def reinit(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """LayerNorm weights 1, every other weight Kaiming-uniform, all biases 0.

    Han, Zhang and Simion (2024), arXiv 2406.14459, with torch's defaults: uniform within
    sqrt(6 / fan_in), where fan_in is the size of all axes but the first: the input width of a
    linear layer, and of XLNet's raw (d_model, heads, d_head) tensors too.
    """
    return _kaiming(target, generator, a=0.0)


@_kind()
def reinit_sqrt5(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """As `reinit`, with Kaiming's a at √5: a draw smaller by √6.

    Paper A does not say which it used. Torch's own linear layers start so, uniform within
    1 / sqrt(fan_in), about as wide as BERT's own initial values."""
    return _kaiming(target, generator, a=math.sqrt(5))


def _kaiming(target: Target, generator: torch.Generator, a: float) -> torch.Tensor:
    values = torch.empty(target.parameter.shape, dtype=torch.float32, device="cpu")
    if target.piece.is_bias:
        values.zero_()
    elif target.piece.role == "layernorm":
        values.fill_(1.0)
    elif values.dim() < 2:
        raise HealingError(
            f"{target.name} is neither a bias nor a LayerNorm, and a weight of shape "
            f"{tuple(values.shape)} has no fan_in: it cannot be redrawn by Kaiming's rule"
        )
    else:
        torch.nn.init.kaiming_uniform_(values, a=a, generator=generator)
    return values[target.rows]


@_kind()
def init(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """The model's own initial values, as its architecture draws them before pre-training.

    The model's `_init_weights` runs on a copy of the layer in which this parameter is real and
    every other one is on the meta device, so that nothing else is drawn. In most families that is a
    normal with the configuration's `initializer_range`, LayerNorms at 1 and biases at 0."""
    kind = type(target.model).__name__
    owners = [module for module in target.model.modules() if hasattr(module, "_init_weights")]
    if not owners:
        raise HealingError(f"{kind} has no initialiser of its own: use kind 'reinit'")
    # New Parameter objects also lack the mark by which transformers skips loaded weights.
    fresh = {
        id(parameter): torch.nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for parameter in target.module.parameters()
    }
    values = torch.full(target.parameter.shape, math.nan, dtype=torch.float32, device="cpu")
    fresh[id(target.parameter)] = torch.nn.Parameter(values, requires_grad=False)
    blank = copy.deepcopy(target.module, fresh)
    with torch.random.fork_rng(devices=[]):  # initialisers draw from the global generator
        torch.default_generator.set_state(generator.get_state())
        path = target.piece.name.split(".")[:-1]
        for depth in range(len(path), -1, -1):  # the owner, then its parents, as transformers does
            owners[0]._init_weights(blank.get_submodule(".".join(path[:depth])))
    if values.isnan().any():
        raise HealingError(
            f"the initialiser of {kind} leaves {target.name} alone: use kind 'reinit'"
        )
    return values[target.rows]


@_kind()
def matched(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """Normal values with each tensor's own mean and standard deviation.

    Beside `reinit`, whose draws are several times as large, it tells how much of the damage is
    scale. A tensor whose values are all alike stays as it is."""
    values = target.values
    noise = torch.randn(values.shape, generator=generator, device="cpu")
    return values.mean() + values.std(correction=0) * noise


@_kind("standard deviation of the noise, in units of the tensor's own")
def noise(target: Target, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Gaussian noise added, relative to each tensor's standard deviation."""
    values = target.values
    scale = strength * values.std(correction=0)
    return values + scale * torch.randn(values.shape, generator=generator, device="cpu")


@_kind(cannot_heal=("all", "attention", "feed_forward", "embeddings"))
def zero(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """Every value 0.

    Where a whole block is zero its matrices get no gradient, each one's being a product with
    another's values: it cannot heal, only be passed by through its residual connection."""
    return torch.zeros_like(target.values)


@_kind()
def permute(target: Target, generator: torch.Generator, strength: None) -> torch.Tensor:
    """The values of each tensor in random order: same distribution, no structure."""
    values = target.values
    order = torch.randperm(values.numel(), generator=generator, device="cpu")
    return values.flatten()[order]


@_kind("probability that a value changes its sign", allowed=(0.0, 1.0))
def sign_flip(target: Target, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Signs flipped at random, each value's with the same probability."""
    values = target.values
    return torch.where(_chosen(values, strength, generator), -values, values)


@_kind("probability that a bit flips, each of a value's 32", allowed=(0.0, 1.0))
def bits_float32(target: Target, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Random bit flips in the float32 representation, as faulty memory does.

    A flipped exponent bit can make a value infinite or not a number; the report counts those."""
    return _flip_bits(target.values, torch.int32, 32, strength, generator)


@_kind("probability that a bit flips, each of a value's 16", allowed=(0.0, 1.0))
def bits_bfloat16(target: Target, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Random bit flips in the bfloat16 representation: values are rounded to it, then flipped."""
    return _flip_bits(target.values.bfloat16(), torch.int16, 16, strength, generator).float()


@_kind("bits a value, from 2 to 16", allowed=(2, 16), spares_vectors=True)
def quantise(target: Target, generator: torch.Generator, strength: float) -> torch.Tensor:
    """Matrices rounded to 2^bits - 1 levels, symmetric, one scale a row of the first axis.

    The scale is the row's largest magnitude (Jacob et al. 2018, section 2, with the zero point at
    0); a row of torch's linear layers is an output. Biases and normalisations are spared."""
    rows = target.values.flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (int(strength) - 1) - 1)
    return torch.where(step > 0, (rows / step).round() * step, rows)


@_kind("share of a tensor's values set to 0", allowed=(0.0, 1.0), spares_vectors=True)
def prune(target: Target, generator: torch.Generator, strength: float) -> torch.Tensor:
    """The values of smallest magnitude in each matrix set to 0 (Han et al. 2015).

    Exactly the share asked for, rounded to whole values; of equal magnitudes the first go first.
    Biases and normalisations are spared."""
    flat = target.values.flatten()
    smallest = flat.abs().argsort(stable=True)[: round(strength * flat.numel())]
    return flat.index_fill(0, smallest, 0.0)


def _chosen(values: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    """Which values are hit, each with `probability`; drawn with 53 bits, for small ones."""
    drawn = torch.rand(values.shape, dtype=torch.float64, generator=generator, device="cpu")
    return drawn < probability


def _flip_bits(
    values: torch.Tensor, whole: torch.dtype, bits: int, rate: float, generator: torch.Generator
) -> torch.Tensor:
    """Each of the `bits` bits of every value flipped with probability `rate`."""
    mask = torch.zeros(values.shape, dtype=torch.int64, device="cpu")
    for bit in range(bits):
        mask |= _chosen(values, rate, generator).long() << bit
    mask = torch.where(mask >= 1 << bits - 1, mask - (1 << bits), mask)  # as a signed number
    return (values.contiguous().view(whole) ^ mask.to(whole)).view(values.dtype)


@dataclass(frozen=True)
class TensorChange:
    """What happened to one parameter, or to the rows of it that were meant. Figures that are not
    finite are None."""

    name: str
    layer: int
    role: str
    shape: tuple[int, ...]
    elements: int  # were put through the kind
    std_before: float | None
    std_after: float | None
    relative_change: float | None  # of the norm; None where all was zero and is not any more
    not_finite: int = 0  # values that are infinite or not a number now


@dataclass(frozen=True)
class CorruptionReport:
    """What `corrupt` did."""

    kind: str
    side: str  # as asked for; all, custom (`layers` were named) or none (a part beside the layers)
    level: float  # as asked for, of custom layers the fraction that they are
    layers: tuple[int, ...]
    n_layers: int
    part: str
    strength: float | None
    seed: int
    tensors: tuple[TensorChange, ...]
    cannot_heal: bool = False  # no gradient can bring the part back

    @property
    def elements(self) -> int:
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def not_finite(self) -> int:
        return sum(tensor.not_finite for tensor in self.tensors)

    def to_frame(self) -> Any:
        """A data frame: one row a tensor, with the columns of `TensorChange`."""
        import pandas

        numbers = ["std_before", "std_after", "relative_change"]
        return pandas.DataFrame(self.tensors).astype(dict.fromkeys(numbers, float))

    def __repr__(self) -> str:
        strength = "" if self.strength is None else f" at strength {self.strength:g}"
        where = self.part
        if self.layers:
            layers = "layer" if len(self.layers) == 1 else "layers"
            where = f"{layers} {', '.join(map(str, self.layers))} of {self.n_layers}"
            where += "" if self.part == "all" else f", {self.part} only"
        notes = f", {self.not_finite:,} of them not finite" if self.not_finite else ""
        notes += "; no gradient can bring them back" if self.cannot_heal else ""
        return (
            f"{self.kind}{strength} (seed {self.seed}) in {where}: "
            f"{len(self.tensors)} tensors, {self.elements:,} values{notes}"
        )


def corrupt(
    model: torch.nn.Module, side: str = "bottom", level: float | str = 0.5, kind: str = "reinit",
    seed: int = 0, layers: Sequence[int] | str | None = None, part: str = "all",
    strength: float | None = None,
) -> CorruptionReport:  # fmt: skip
    """Corrupt some layers of `model` in place and report what changed.

    `side`, `level` and `layers` say which layers, see `encoders.resolve_layers`; the control
    ``scattered`` hits a share `level` of the values of every tensor in every layer. `kind` is a key
    of `KINDS`, and `strength` for those that have one. `part` is a key of `encoders.PARTS`, or
    ``embeddings`` or ``pooler``, for which side, level and layers say nothing; the head is never
    touched. The same `seed` gives the same values everywhere, in lower precision their cast.

    Nothing has changed when it raises HealingError: for an unknown name, a plan that selects
    nothing, an unsupported model, or a parameter that holds no floating-point values."""
    rule = KINDS[choose(kind, KINDS, "kind of corruption")]
    seed = _clean_seed(seed)
    strength = _clean_strength(rule, strength)
    stack = encoder_layers(model)
    choose(part, (*PARTS, *OUTER_PARTS), "part")
    if part in OUTER_PARTS:
        side, level, chosen = "none", 0.0, ()
        found = [(name, -1, module, pieces) for name, module, pieces in outer_parts(model, part)]
    else:
        chosen = resolve_layers(len(stack), side, level, layers, seed)
        found = [(f"layer.{i}", i, stack[i], part_pieces(stack[i], part)) for i in chosen]
        if parse_layers(layers) is not None:
            side, level = "custom", len(chosen) / len(stack)
        elif len(chosen) == len(stack) and side != "scattered":
            side = "all"
        level = parse_level(level)
    targets = [
        Target(f"{name}.{piece.name}", layer, piece, module, model)
        for name, layer, module, pieces in found
        for piece in pieces
    ]
    if rule.spares_vectors:
        targets = [t for t in targets if t.parameter.dim() > 1 and not t.piece.is_bias]
    if not targets:
        where = f"layers {list(chosen)} of {type(model).__name__}" if chosen else "It"
        raise HealingError(
            f"{where} hold{'' if chosen else 's'} nothing of part {part!r}"
            + (f" that kind {kind!r} changes: it spares vectors" if rule.spares_vectors else "")
        )
    for target in targets:
        if target.parameter.is_meta:
            raise HealingError(
                f"{target.name} is on the meta device: load the weights before corrupting them"
            )
        if not target.parameter.is_floating_point():
            dtype = str(target.parameter.dtype).removeprefix("torch.")
            raise HealingError(
                f"{target.name} is stored as {dtype}: only floating-point weights can be "
                "corrupted (load the model without quantisation)"
            )

    # All is drawn before any is written: a kind that refuses one parameter leaves the model whole.
    values = [rule.draw(target, _generator(seed, target.name), strength) for target in targets]
    hit = [_scattered(target, level, seed) if side == "scattered" else None for target in targets]
    changes = tuple(map(_write, targets, values, hit))
    return CorruptionReport(
        kind, side, level, chosen, len(stack), part, strength, seed, changes,
        cannot_heal=part in rule.cannot_heal and side != "scattered",
    )  # fmt: skip


def parse_kind(value: Any) -> tuple[str, float | None]:
    """A kind as a plan spells it, ``reinit`` or ``noise=0.5``, as its name and strength."""
    name, _, strength = str(value).partition("=")
    rule = KINDS[choose(name.strip(), KINDS, "kind of corruption")]
    return rule.name, _clean_strength(rule, strength.strip() or None)


def spell_kind(name: str, strength: float | None) -> str:
    """The reverse of `parse_kind`."""
    none = strength is None or math.isnan(strength)
    return name if none else f"{name}={strength:g}"


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
        if strength is None:
            return None
        raise HealingError(
            f"kind {rule.name!r} has no strength, but strength={strength!r} was given"
        )
    try:
        value = float(strength)
    except (TypeError, ValueError):
        raise HealingError(f"kind {rule.name!r} needs a strength: {rule.strength}") from None
    low, high = rule.allowed
    if not low <= value <= high:
        allowed = f"from {low:g} up" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise HealingError(
            f"strength {value:g} of kind {rule.name!r} must be {allowed}: {rule.strength}"
        )
    return value


def _generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for each (seed, name), by a hash that no process salts."""
    # Four bytes, because torch's Mersenne twister uses only the low 32 bits of a seed.
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))


def _scattered(target: Target, level: float, seed: int) -> torch.Tensor:
    """Which values of the rows meant are hit: exactly a share `level` of them, rounded."""
    region = target.parameter[target.rows]
    generator = _generator(seed, f"scattered:{target.name}")
    order = torch.randperm(region.numel(), generator=generator, device="cpu")
    hit = torch.zeros(region.numel(), dtype=torch.bool, device="cpu")
    hit[order[: round(level * region.numel())]] = True
    return hit.view(region.shape)


@torch.no_grad()
def _write(target: Target, values: torch.Tensor, hit: torch.Tensor | None) -> TensorChange:
    """Copy the new values of the rows meant, or of what is `hit` of them; measure the change."""
    rows, region = target.rows, target.parameter[target.rows]
    before = region.detach().to("cpu", torch.float64, copy=True)
    values = values.view(region.shape)
    if hit is not None:
        values = torch.where(hit.to(region.device), values.to(region), region)
    region.copy_(values)
    after = region.detach().to("cpu", torch.float64)
    size, moved = before.norm().item(), (after - before).norm().item()
    sliced = "" if target.piece.rows is None else f"[{rows.start}:{rows.stop}]"
    return TensorChange(
        name=target.name + sliced,
        layer=target.layer,
        role=target.piece.role,
        shape=tuple(region.shape),
        elements=region.numel() if hit is None else int(hit.sum()),
        std_before=_finite(before.std(correction=0).item()),
        std_after=_finite(after.std(correction=0).item()),
        relative_change=_finite(moved / size) if size else (0.0 if moved == 0 else None),
        not_finite=int((~after.isfinite()).sum()),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
