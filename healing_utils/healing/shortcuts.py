"""Shortcuts of a training step: less arithmetic, the same loss and the same gradients.

Each but `own_memory` and `keep_freed_memory` is taken back when its block ends; what cannot take
one goes on without it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from healing_utils.healing.encoders import encoder_layers

STEPS_OF_16_BITS = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True, residual: Tensor | None = None) -> Tensor:
    """Inverted dropout (Srivastava et al. 2014), added to `residual` in the same pass; on a GPU
    torch's own. Drawn 16 bits a value, some ten times as fast as torch's: `p` is rounded to a
    multiple of 2^-16, and the scale of what is kept is exactly 1 / (1 - that)."""
    if not training or p == 0 or x.device.type != "cpu":
        out = F.dropout(x, p, training)
        return out if residual is None else residual + out
    dropped = min(round(p * STEPS_OF_16_BITS), STEPS_OF_16_BITS - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    uniform = words.view(torch.int16)[: x.numel()].view(x.shape)  # from -2^15 to 2^15 - 1
    keep = torch.empty_like(x, requires_grad=False)
    torch.ge(uniform, dropped - STEPS_OF_16_BITS // 2, out=keep)  # a tenth of ge, then a cast
    scale = STEPS_OF_16_BITS / (STEPS_OF_16_BITS - dropped)
    if residual is None:
        return x * keep.mul_(scale)
    return torch.addcmul(residual, x, keep, value=scale)


@contextlib.contextmanager
def _computing(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Inside the block the modules compute these functions."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def quick_dropout(model: nn.Module) -> AbstractContextManager[None]:
    """Every `nn.Dropout` of the model draws through `dropout`."""
    modules = [m for m in model.modules() if type(m) is nn.Dropout]
    return _computing({m: lambda x, m=m: dropout(x, m.p, m.training) for m in modules})


# The modules of a post-LayerNorm encoder layer (Devlin et al. 2019), whatever their names.
_Layer = namedtuple(
    "_Layer",
    "query key value attention_dropout attention_output attention_norm inner activation output "
    "output_dropout output_norm heads attention_output_dropout",
    defaults=[nn.Dropout(0.0)],  # DistilBERT has none
)
_INNER = "intermediate.dense intermediate.intermediate_act_fn"
_OUTPUT = "output.dense output.dropout output.LayerNorm"
# What its fields are called in BERT, RoBERTa and ELECTRA; in MPNet; in DistilBERT.
_NAMES = (
    "attention.self.query attention.self.key attention.self.value attention.self.dropout "
    f"attention.output.dense attention.output.LayerNorm {_INNER} {_OUTPUT} "
    "attention.self.num_attention_heads attention.output.dropout",
    "attention.attn.q attention.attn.k attention.attn.v attention.attn.dropout attention.attn.o "
    f"attention.LayerNorm {_INNER} {_OUTPUT} attention.attn.num_attention_heads attention.dropout",
    "attention.q_lin attention.k_lin attention.v_lin attention.dropout attention.out_lin "
    "sa_layer_norm ffn.lin1 ffn.activation ffn.lin2 ffn.dropout output_layer_norm "
    "attention.n_heads",
)


def _read(layer: nn.Module) -> _Layer:
    """Raises TypeError where the layer is not understood, or a product is not a plain one: an
    adapter around it starts at zero and would pass every comparison below."""
    for names in _NAMES:
        with contextlib.suppress(AttributeError):
            read = _Layer(*attrgetter(*names.split())(layer))
            products = (*read[:3], read.attention_output, read.inner, read.output)
            if all(type(m) is nn.Linear for m in products):
                return read
    raise TypeError(f"{type(layer).__name__} is not understood")


def _first_token(layer: _Layer, x: Tensor, mask: Tensor | None, training: bool) -> Tensor:
    """The layer's output for the first token, (batch, 1, hidden), of x (batch, length, hidden).

    Instead of keys and values of every token, each head's one query goes back through the key
    matrix, and the value matrix is applied to the weighted sum of the states. The key's bias adds
    the same to every weight's logit, so softmax drops it."""
    batch, heads = x.shape[0], layer.heads
    first = x[:, :1]  # (batch, 1, hidden)
    size = layer.query.out_features // heads
    query = layer.query(first).view(batch, heads, size).transpose(0, 1)  # (heads, batch, size)
    key = layer.key.weight.view(heads, size, -1)
    logits = (query @ key).transpose(0, 1) @ x.mT * size**-0.5  # (batch, heads, length)
    # Of the mask: (batch, 1 or heads, length), what the first token may see.
    weights = _weights(layer, logits, None if mask is None else mask[:, :, 0], training)
    states = (weights @ x).transpose(0, 1)  # (heads, batch, hidden)
    value = layer.value.weight.view(heads, size, -1)
    context = (states @ value.mT).transpose(0, 1)  # (batch, heads, size)
    # Under dropout the weights do not sum to one: the value's bias counts as often as they do.
    context = context + weights.sum(-1, keepdim=True) * layer.value.bias.view(heads, size)
    return _after_attention(layer, first, context.reshape(batch, 1, -1), training)


def _all_tokens(layer: _Layer, x: Tensor, mask: Tensor | None, training: bool) -> Tensor:
    """The layer's output, (batch, length, hidden)."""
    batch, length, _ = x.shape
    weight, bias = (torch.cat([getattr(m, n) for m in layer[:3]]) for n in ("weight", "bias"))
    joined = F.linear(x, weight, bias)  # one product instead of three
    by_head = joined.view(batch, length, 3, layer.heads, -1).permute(2, 0, 3, 1, 4).contiguous()
    query, key, value = by_head.unbind()  # each (batch, heads, length, size)
    if x.device.type == "cpu":  # what torch's kernels call `math`, with our dropout
        logits = query @ key.mT * query.shape[-1] ** -0.5
        context = _weights(layer, logits, mask, training) @ value
    else:
        p = layer.attention_dropout.p if training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, mask, p)
    context = context.transpose(1, 2).reshape(batch, length, -1)
    return _after_attention(layer, x, context, training)


def _weights(layer: _Layer, logits: Tensor, mask: Tensor | None, training: bool) -> Tensor:
    """Attention's weights; the mask says what is seen, or is added to the logits."""
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    elif mask is not None:
        logits = logits + mask
    return dropout(logits.softmax(-1), layer.attention_dropout.p, training)


def _after_attention(layer: _Layer, x: Tensor, context: Tensor, training: bool) -> Tensor:
    """The layer's output from its input `x` and what attention gathered for the same tokens."""
    first, second = layer.attention_output_dropout.p, layer.output_dropout.p
    hidden = layer.attention_norm(dropout(layer.attention_output(context), first, training, x))
    inner = layer.activation(layer.inner(hidden))
    return layer.output_norm(dropout(layer.output(inner), second, training, hidden))


@contextlib.contextmanager
def first_token_layers(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[str]:
    """Compute the encoder's layers as above, the last one for the first token alone.

    Nothing is assumed about the model's class: the states and gradients of `batch` (padded, a few
    examples) say whether the layers are understood, and whether the head reads any other token.
    Yields what is computed so: ``first token``, ``all tokens`` or ``nothing``."""
    found, chosen, training = "nothing", {}, model.training
    model.eval()
    # Whatever goes wrong with a shortcut: what is as it was is always right.
    with contextlib.suppress(Exception):
        modules = encoder_layers(model)
        read = list(map(_read, modules))
        wanted, first, tupled = _states(model, modules, batch)
        for name in ["first token", "all tokens"] if first else ["all tokens"]:
            computed = [_all_tokens] * len(read)
            if name == "first token":
                computed[-1] = _first_token
            how = zip(modules, read, computed, strict=True)
            forwards = {module: _forward(module, *given, tupled) for module, *given in how}
            with contextlib.suppress(Exception), _computing(forwards):
                pairs = zip(_states(model, modules, batch)[0], wanted, strict=True)
                # Up to rounding, over the tokens that were computed.
                if all(torch.allclose(a, b[:, : a.shape[1]], 1e-3, 1e-4) for a, b in pairs):
                    found, chosen = name, forwards
                    break
    model.train(training)
    with _computing(chosen):
        yield found


def _forward(module: nn.Module, layer: _Layer, compute: Callable, tupled: bool) -> Callable:
    """What a layer computes instead of its own `forward`."""

    def forward(hidden_states, attention_mask=None, bias=None, *_, **__):
        mask, x = attention_mask, hidden_states
        if bias is not None:  # MPNet's; both are added to the logits
            mask = bias if mask is None else bias + mask
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Sums and norms then pass half the bytes and cast nothing between the products; inside,
            # LayerNorm and softmax compute in float32. On a GPU autocast's own norms want float32.
            x = x.to(torch.get_autocast_dtype("cpu"))
        out = compute(layer, x, mask, module.training)
        return (out,) if tupled else out

    return forward


def _states(
    model: nn.Module, modules: list[nn.Module], batch: dict[str, Tensor]
) -> tuple[list[Tensor], bool, bool]:
    """Every layer's output, whether the logits depend on the last one's first token alone, and
    whether the layers answer in tuples of one."""
    outputs: list[Any] = []
    with torch.enable_grad(), contextlib.ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_hook(lambda _, __, out: outputs.append(out))
            hooks.enter_context(hook)
        logits = model(**batch).logits
    states = [out[0] if isinstance(out, tuple) and len(out) == 1 else out for out in outputs]
    if not all(isinstance(one, Tensor) and one.ndim == 3 for one in states):
        raise TypeError("a layer's output is not (batch, length, hidden)")
    first = False
    if states[-1].requires_grad:  # else all is frozen up to here, and the head stays unknown
        (gradient,) = torch.autograd.grad(logits.float().square().sum(), states[-1])
        first = bool(gradient[:, 0].any()) and not bool(gradient[:, 1:].any())
    return [one.detach() for one in states], first, isinstance(outputs[0], tuple)


class LowWeights:
    """Weights cast once a step, where autocast casts one whenever it is used.

    Inside this block plain `nn.Linear` layers, whose products are all that reads their weights,
    hold parameters in `dtype` (none where that is None); the optimizer goes on with float32 ones,
    and gets the same gradients. Those of one of its `groups` lie side by side in one block, which
    takes their places there: casts, norm and step are then one call for all."""

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, groups: list[dict[str, Any]]
    ) -> None:
        modules = [] if dtype is None else list(model.modules())
        tied = {p for m in modules if type(m) is not nn.Linear for p in m._parameters.values()}
        self.places = [
            (module, name, full)
            for module in modules
            if type(module) is nn.Linear
            for name, full in module.named_parameters(recurse=False)
            if full.requires_grad and full not in tied
        ]
        taken = {full for _, _, full in self.places}
        self.low: dict[nn.Parameter, nn.Parameter] = {}
        self.blocks: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # float32, low, gradient
        for group in groups:
            if mine := [p for p in group["params"] if p in taken]:
                block = self._join(mine, dtype)
                group["params"] = [*(p for p in group["params"] if p not in taken), block]

    @torch.no_grad()
    def _join(self, full: list[nn.Parameter], dtype: torch.dtype) -> nn.Parameter:
        """Make views of one block of these, each as aligned, at 64 bytes, as if on its own."""
        sizes = [-(-p.numel() // 16) * 16 for p in full]
        block = nn.Parameter(torch.zeros(sum(sizes), device=full[0].device))
        low, gradient = torch.zeros_like(block, dtype=dtype), torch.zeros_like(block)
        for p, *parts in zip(full, *(x.split(sizes) for x in (block, low, gradient)), strict=True):
            value, lower, summed = (part[: p.numel()].view(p.shape) for part in parts)
            p.data = value.copy_(p)
            self.low[p] = nn.Parameter(lower)

            def collect(lower: nn.Parameter, summed: Tensor = summed) -> None:
                summed.add_(lower.grad)  # in float32
                lower.grad = None

            self.low[p].register_post_accumulate_grad_hook(collect)
        low.copy_(block)
        block.grad = gradient
        self.blocks.append((block, low, gradient))
        return block

    def put(self, low: bool) -> None:
        """The parameters in `dtype` in their places, or the float32 ones."""
        for module, name, full in self.places:
            setattr(module, name, self.low[full] if low else full)

    def __enter__(self) -> LowWeights:
        self.put(low=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.put(low=False)
        own_memory(self.low)  # files refuse tensors that share memory

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        for block, _, gradient in self.blocks:
            block.grad = gradient.zero_()

    def norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Of the gradients of all `parameters`, the model's float32 ones."""
        others = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(others, foreach=True)
        if self.blocks:
            squares = torch.stack([g.dot(g) for _, _, g in self.blocks])
            norm = torch.hypot(norm, squares.sum().sqrt())
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the float32 parameters again, after a step."""
        for block, low, _ in self.blocks:
            low.copy_(block)


def own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Copy loaded weights to aligned memory of their own: they are mapped from their file, and
    every pass would read them across cache lines."""
    for parameter in parameters:
        parameter.data = parameter.detach().clone()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, up to 1 GiB; nothing elsewhere. The
    setting is the process's, and stays."""
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt's settings, from malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        libc.mallopt(trim_threshold, 1 << 30)


@contextlib.contextmanager
def cut_embeddings(model: nn.Module, used: Iterable[int]) -> Iterator[dict[str, float]]:
    """Train with only the word-embedding rows of the ids `used`, where the table is not tied to an
    output layer, whose loss reaches every row; put the table back at the end. Yields ``{"decay":
    1.0}``, by which the rows that were away are then multiplied."""
    state = {"decay": 1.0}
    full, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output is not None and getattr(output, "weight", None) is full.weight
    if tied or type(full) is not nn.Embedding or not full.weight.requires_grad:
        yield state
        return
    ids = torch.tensor(sorted(used), device=full.weight.device)
    place = torch.full((full.num_embeddings,), -1, device=ids.device)  # of an id among `ids`
    place[ids] = torch.arange(len(ids), device=ids.device)
    pad = None if full.padding_idx is None else int(place[full.padding_idx])
    rows = full.weight.detach()[ids]
    cut = nn.Embedding(*rows.shape, padding_idx=None if pad == -1 else pad, _weight=rows)
    cut.register_forward_pre_hook(lambda _, given: (place[given[0]],))
    model.set_input_embeddings(cut)
    try:
        yield state
    finally:
        with torch.no_grad():
            # Not in place: a table that is mapped from its file would be copied page by page.
            full.weight.data = full.weight.mul(state["decay"]).index_copy_(0, ids, cut.weight)
        model.set_input_embeddings(full)
