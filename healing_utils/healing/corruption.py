"""Corrupt chosen layers of an encoder: exactly those, the same everywhere, and report it.

Values are drawn per parameter, on the CPU in float32, from a generator seeded with the call's seed
and the parameter's name inside the encoder. So a draw depends neither on device, precision, head
and process nor on what else is redrawn. (Between processors with and without fused multiply-add
torch's own draws can differ by rounding, seen up to 5e-8.)
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Generator, Tensor, nn

from healing_utils.base.errors import HealingError, choose
from healing_utils.healing import encoders
from healing_utils.healing.encoders import OUTER_PARTS, Piece


@dataclass(frozen=True)
class Kind:
    name: str
    draw: Callable[[Piece, Generator, float | None], Tensor]
    summary: str  # the first line of its docstring
    strength: str | None = None  # what its strength means, None where it has none
    allowed: tuple[float, float] = (0.0, math.inf)
    only: str = ""  # all that it changes: ``matrices`` or ``normalisations``
    cannot_heal: tuple[str, ...] = ()  # parts that no gradient can bring back


KINDS: dict[str, Kind] = {}
EXPONENT = 14  # the highest exponent bit of a bfloat16 value, whose 16 are counted from the lowest


def _kind(strength: str | None = None, **properties: Any) -> Callable[[Callable], Callable]:
    """Enter ``function(piece, generator, strength)``, which returns new values for the rows meant
    and draws from `generator` alone."""

    def enter(draw: Callable) -> Callable:
        name, summary = draw.__name__, draw.__doc__.split("\n")[0]
        KINDS[name] = Kind(name, draw, summary, strength, **properties)
        return draw

    return enter


@_kind()
def reinit(piece: Piece, generator: Generator, _: None, a: float = 0.0) -> Tensor:
    """LayerNorm weights 1, every other weight Kaiming-uniform, all biases 0.

    Han, Zhang and Simion (2024), arXiv 2406.14459, with torch's defaults: uniform within
    sqrt(6 / fan_in), where fan_in is the size of all axes but the first."""
    values = torch.zeros(piece.parameter.shape, dtype=torch.float32, device="cpu")
    if piece.role == "layernorm" and not piece.is_bias:
        values.fill_(1.0)
    elif not piece.is_bias:
        if values.dim() < 2:
            raise HealingError(f"{piece.name} has one axis and no fan_in: use another kind")
        nn.init.kaiming_uniform_(values, a=a, generator=generator)
    return values[piece.rows]


@_kind()
def reinit_sqrt5(piece: Piece, generator: Generator, _: None) -> Tensor:
    """As `reinit`, with Kaiming's a at √5: a draw smaller by √6.

    Torch's own linear layers start so, about as wide as BERT's own initial values."""
    return reinit(piece, generator, None, a=math.sqrt(5))


@_kind()
def init(piece: Piece, generator: Generator, _: None) -> Tensor:
    """The model's own initial values, as its architecture draws them before pre-training."""
    values = torch.full(piece.parameter.shape, math.nan, dtype=torch.float32, device="cpu")
    # On the meta device nothing is drawn for the layer's other parameters. New Parameter objects
    # also lack the mark by which transformers skips loaded weights.
    fresh = {
        id(p): nn.Parameter(values if p is piece.parameter else p.to("meta"), requires_grad=False)
        for p in piece.module.parameters()
    }
    blank, path = copy.deepcopy(piece.module, fresh), piece.path.split(".")[:-1]
    owners = (m for m in piece.model.modules() if hasattr(m, "_init_weights"))
    initialise = getattr(next(owners, None), "_init_weights", lambda _: None)
    with torch.random.fork_rng(devices=[]):  # initialisers draw from the global generator
        torch.default_generator.set_state(generator.get_state())
        for depth in range(len(path), -1, -1):  # the owner, then its parents, as transformers does
            initialise(blank.get_submodule(".".join(path[:depth])))
    if values.isnan().any():
        kind = type(piece.model).__name__
        raise HealingError(f"{kind} has no initial values for {piece.name}: use kind 'reinit'")
    return values[piece.rows]


@_kind()
def matched(piece: Piece, generator: Generator, _: None) -> Tensor:
    """Normal values with each tensor's own mean and standard deviation."""
    values = piece.values
    noise = torch.randn(values.shape, generator=generator, device="cpu")
    return values.mean() + values.std(correction=0) * noise


@_kind("standard deviation of the noise, in units of the tensor's own")
def noise(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Gaussian noise added, relative to each tensor's standard deviation."""
    values = piece.values
    scale = strength * values.std(correction=0)
    return values + scale * torch.randn(values.shape, generator=generator, device="cpu")


@_kind(cannot_heal=("all", "attention", "feed_forward", "embeddings"))
def zero(piece: Piece, generator: Generator, _: None) -> Tensor:
    """Every value 0."""  # in a whole block, a matrix's gradient is a product with others' zeros
    return torch.zeros_like(piece.values)


@_kind()
def permute(piece: Piece, generator: Generator, _: None) -> Tensor:
    """The values of each tensor in random order: same distribution, no structure."""
    values = piece.values
    order = torch.randperm(values.numel(), generator=generator, device="cpu")
    return values.flatten()[order]


@_kind("probability that a value changes its sign", allowed=(0.0, 1.0))
def sign_flip(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Signs flipped at random, each value's with the same probability."""
    values = piece.values
    return torch.where(_chosen(values, strength, generator), -values, values)


@_kind("probability that a bit flips, each of a value's 32", allowed=(0.0, 1.0))
def bits_float32(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Random bit flips in the float32 representation, as faulty memory does."""
    return _flip_bits(piece.values, range(32), strength, generator)


@_kind("probability that a bit flips, each of a value's 16", allowed=(0.0, 1.0))
def bits_bfloat16(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Random bit flips in the bfloat16 representation: values are rounded to it, then flipped."""
    return _flip_bits(piece.values.bfloat16(), range(16), strength, generator)


@_kind("probability that it flips, of each value", allowed=(0.0, 1.0))
def bits_exponent(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Random flips of the highest exponent bit in the bfloat16 representation alone."""
    return _flip_bits(piece.values.bfloat16(), [EXPONENT], strength, generator)


@_kind("probability that a bit flips, each of a value's other 15", allowed=(0.0, 1.0))
def bits_other(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Random bit flips in the bfloat16 representation, the highest exponent bit spared."""
    other = [bit for bit in range(16) if bit != EXPONENT]
    return _flip_bits(piece.values.bfloat16(), other, strength, generator)


@_kind("features of each normalisation", allowed=(1, 4096), only="normalisations")
def outliers(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """The features whose weight is farthest from its normalisation's mean: weight and bias 0.

    After Kovaleva et al. (2021, arXiv 2105.06990), who find a few such features by their size."""
    weight = piece.module.get_parameter(piece.path.rpartition(".")[0] + ".weight").detach().cpu()
    far = (weight - weight.mean()).abs().argsort(descending=True, stable=True)
    return piece.values.index_fill(0, far[: int(strength)], 0.0)


@_kind("values of each weight and each bias", allowed=(1, 4096), only="normalisations")
def outliers_control(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """As many values of each normalisation, drawn at random, 0: the control of `outliers`."""
    order = torch.randperm(piece.values.numel(), generator=generator, device="cpu")
    return piece.values.index_fill(0, order[: int(strength)], 0.0)


@_kind("bits a value, from 2 to 16", allowed=(2, 16), only="matrices")
def quantise(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """Matrices rounded to 2^bits - 1 levels, symmetric, one scale a row of the first axis.

    The scale is the row's largest magnitude (Jacob et al. 2018, section 2, zero point 0); a row of
    torch's linear layers is an output."""
    rows = piece.values.flatten(1)
    step = rows.abs().amax(dim=1, keepdim=True) / (2 ** (int(strength) - 1) - 1)
    return torch.where(step > 0, (rows / step).round() * step, rows)


@_kind("share of a tensor's values set to 0", allowed=(0.0, 1.0), only="matrices")
def prune(piece: Piece, generator: Generator, strength: float) -> Tensor:
    """The values of smallest magnitude in each matrix set to 0 (Han et al. 2015).

    Exactly the share, rounded to whole values; of equal magnitudes the first go first."""
    flat = piece.values.flatten()
    smallest = flat.abs().argsort(stable=True)[: round(strength * flat.numel())]
    return flat.index_fill(0, smallest, 0.0)


def _chosen(values: Tensor, probability: float, generator: Generator) -> Tensor:
    """Which values are hit; drawn with 53 bits, for small probabilities."""
    drawn = torch.rand(values.shape, dtype=torch.float64, generator=generator, device="cpu")
    return drawn < probability


def _flip_bits(values: Tensor, bits: Iterable[int], rate: float, generator: Generator) -> Tensor:
    """Each of `bits` (0 is the lowest) of every value flipped with probability `rate`."""
    whole = torch.int16 if values.itemsize == 2 else torch.int32
    mask = torch.zeros(values.shape, dtype=torch.int64, device="cpu")
    for bit in bits:
        mask |= _chosen(values, rate, generator).long() << bit
    return (values.contiguous().view(whole) ^ mask.to(whole)).view(values.dtype).float()


@dataclass(frozen=True)
class CorruptionReport:
    """What `corrupt` did. `tensors` has a row a parameter, or the rows of it that were meant: the
    `elements` put through the kind, the change relative to the norm, the values `not_finite` now.
    Figures that are not finite are missing."""

    kind: str
    layers: tuple[int, ...]
    n_layers: int
    part: str
    strength: float | None
    seed: int
    tensors: pd.DataFrame
    cannot_heal: bool  # no gradient can bring the part back

    @property
    def elements(self) -> int:
        return int(self.tensors["elements"].sum())

    @property
    def not_finite(self) -> int:
        return int(self.tensors["not_finite"].sum())

    def __repr__(self) -> str:
        where = self.part
        if self.layers:
            where = "layer" if len(self.layers) == 1 else "layers"
            where += f" {', '.join(map(str, self.layers))} of {self.n_layers}"
            where += "" if self.part == "all" else f", {self.part} only"
        notes = f", {self.not_finite:,} of them not finite" if self.not_finite else ""
        notes += "; no gradient can bring them back" if self.cannot_heal else ""
        strength = "" if self.strength is None else f" at strength {self.strength:g}"
        changed = f"{len(self.tensors)} tensors, {self.elements:,} values"
        return f"{self.kind}{strength} (seed {self.seed}) in {where}: {changed}{notes}"


def corrupt(
    model: nn.Module, side: str = "bottom", level: float | str = 0.5, kind: str = "reinit",
    seed: int = 0, layers: Sequence[int] | str | None = None, part: str = "all",
    strength: float | None = None,
) -> CorruptionReport:  # fmt: skip
    """Corrupt some layers of `model` in place and report what changed.

    `side`, `level` and `layers` say which layers, see `encoders.resolve_layers`; ``scattered`` hits
    a share `level` of the values of every tensor. `kind` is a key of `KINDS`; `part` is one of
    `encoders.PARTS` or `OUTER_PARTS`, for which side, level and layers say nothing. Nothing has
    changed when it raises HealingError: for an unknown name, a plan that selects nothing, an
    unsupported model, or a parameter that holds no floating-point values."""
    rule = KINDS[choose(kind, KINDS, "kind of corruption")]
    strength, seed = _clean_strength(rule, strength), encoders.parse_seed(seed)
    n_layers, chosen = len(encoders.encoder_layers(model)), ()
    if part not in OUTER_PARTS:
        chosen = encoders.resolve_layers(n_layers, side, level, layers, seed)
    scattered = bool(chosen) and side == "scattered" and encoders.parse_layers(layers) is None
    share = encoders.parse_level(level) if scattered else 1.0
    planned = encoders.pieces(model, part, chosen)
    if rule.only == "matrices":
        planned = [p for p in planned if p.parameter.dim() > 1 and not p.is_bias]
    elif rule.only:
        planned = [p for p in planned if p.role == "layernorm"]
    if not planned:
        where = f"{type(model).__name__} has no {part}" + (f" in layers {chosen}" if chosen else "")
        spared = f" that kind {kind!r} changes: it is for {rule.only}" if rule.only else ""
        raise HealingError(where + spared)
    for piece in planned:
        held = piece.parameter
        if held.is_meta or not held.is_floating_point():
            place = f"stored as {held.dtype} on device {held.device}"
            raise HealingError(f"{piece.name} is {place}: load the model whole, not quantised")
    # All is drawn before any is written: a kind that refuses one parameter leaves the model whole.
    values = [rule.draw(piece, _generator(seed, piece.name), strength) for piece in planned]
    if scattered:
        values = [_scattered(*pair, share, seed) for pair in zip(planned, values, strict=True)]
    changes = [_write(*pair, share) for pair in zip(planned, values, strict=True)]
    tensors = pd.DataFrame(changes).replace([math.inf, -math.inf], math.nan)
    stuck = part in rule.cannot_heal and not scattered
    return CorruptionReport(kind, chosen, n_layers, part, strength, seed, tensors, stuck)


def parse_kind(value: Any) -> tuple[str, float | None]:
    """A kind as a plan spells it, ``reinit`` or ``noise=0.5``, as its name and strength."""
    name, _, strength = str(value).partition("=")
    rule = KINDS[choose(name.strip(), KINDS, "kind of corruption")]
    return rule.name, _clean_strength(rule, strength.strip() or None)


def spell_kind(name: str, strength: float | None) -> str:
    """The reverse of `parse_kind`."""
    return name if strength is None else f"{name}={repr(strength).removesuffix('.0')}"


def _clean_strength(rule: Kind, strength: Any) -> float | None:
    if rule.strength is None:
        if strength is not None:
            raise HealingError(f"kind {rule.name!r} has no strength, and {strength!r} was given")
        return None
    try:
        value = float(strength)
    except (TypeError, ValueError):
        value = math.nan
    low, high = rule.allowed
    whole = isinstance(low, int)
    if not low <= value <= high or math.isinf(value) or (whole and value % 1):
        allowed = f"{'a whole number ' if whole else ''}from {low:g} "
        allowed += "up" if math.isinf(high) else f"to {high:g}"
        said = "" if strength is None else f", not {strength}"
        need = f"kind {rule.name!r} needs a strength"
        raise HealingError(f"{need} that is {allowed}{said}: {rule.strength}")
    return value


def _generator(seed: int, name: str) -> Generator:
    """A CPU generator of its own for each (seed, name), by a hash that no process salts."""
    # Four bytes, because torch's Mersenne twister uses only the low 32 bits of a seed.
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=4).digest()
    return Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))


def _scattered(piece: Piece, values: Tensor, level: float, seed: int) -> Tensor:
    """The new values for exactly a share `level` of the rows meant, rounded, and the old ones."""
    old = piece.parameter.detach()[piece.rows]
    generator = _generator(seed, f"scattered:{piece.name}")
    order = torch.randperm(old.numel(), generator=generator, device="cpu")
    hit = order[: round(level * old.numel())].to(old.device)
    return old.flatten().index_copy(0, hit, values.to(old).flatten()[hit])


@torch.no_grad()
def _write(piece: Piece, values: Tensor, share: float) -> dict[str, Any]:
    """Copy the new values of the rows meant, of which a `share` is new: a row of the report."""
    rows, region = piece.rows, piece.parameter[piece.rows]
    before = region.to("cpu", torch.float64, copy=True)
    region.copy_(values.view(region.shape))
    after = region.to("cpu", torch.float64)
    size, moved = before.norm().item(), (after - before).norm().item()
    return {
        "name": piece.name + ("" if rows is ... else f"[{rows.start}:{rows.stop}]"),
        "layer": piece.layer,
        "role": piece.role,
        "shape": tuple(region.shape),
        "elements": round(share * region.numel()),
        "std_before": before.std(correction=0).item(),
        "std_after": after.std(correction=0).item(),
        "relative_change": moved / size if size else (math.inf if moved else 0.0),
        "not_finite": int((~after.isfinite()).sum()),
    }
