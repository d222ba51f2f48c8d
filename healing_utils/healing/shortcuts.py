"""Shortcuts of a training step: less arithmetic, the same loss and the same gradients.

- `first_token_layers`: a classifier that reads only the first token's state needs the last layer
  for that token alone (an encoder of six layers then computes a sixth less);
- `quick_dropout`: dropout's random numbers on a CPU, some ten times as fast as torch's;
- `cut_embeddings`: only the rows of the embedding table that the task's ids use;
- `LowWeights`: in bfloat16, weights cast once a step instead of at every use; on a CPU the states
  between the layers' products stay in bfloat16 too;
- `keep_freed_memory`: no fresh pages from the system at every step;
- `own_memory`: weights are copied from their file at once, not page by page.

Each but the last two is taken back when its block ends; what cannot take one goes on without it.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from healing_utils.base.errors import HealingError
from healing_utils.healing.encoders import encoder_layers

if TYPE_CHECKING:
    from healing_utils.healing.training import Encoded

STEPS_OF_16_BITS = 1 << 16


# --- Dropout --------------------------------------------------------------------------------------


def _keep(x: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """A mask like `x` (1 is kept, 0 dropped) and the scale of what is kept, on a CPU.

    `p` is rounded to a multiple of 2^-16, and the scale is exactly 1 / (1 - that).
    """
    dropped = min(round(p * STEPS_OF_16_BITS), STEPS_OF_16_BITS - 1)
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    uniform = words.view(torch.int16)[:count].view(x.shape)  # from -2^15 to 2^15 - 1
    keep = torch.empty_like(x, requires_grad=False)
    torch.ge(uniform, dropped - STEPS_OF_16_BITS // 2, out=keep)  # a tenth of ge, then a cast
    return keep, STEPS_OF_16_BITS / (STEPS_OF_16_BITS - dropped)


def dropout(x: torch.Tensor, p: float, training: bool = True) -> torch.Tensor:
    """Inverted dropout (Srivastava et al. 2014), drawn 16 bits a value from torch's generator.

    On a GPU torch's own: its kernel draws in place.
    """
    if not training or p == 0 or x.device.type != "cpu":
        return F.dropout(x, p, training)
    keep, scale = _keep(x.detach(), p)
    return x * keep.mul_(scale)


def _add_dropped(residual: torch.Tensor, x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """``residual + dropout(x)``, in one pass over both on a CPU."""
    if not training or p == 0 or x.device.type != "cpu":
        return residual + dropout(x, p, training)
    keep, scale = _keep(x.detach(), p)
    return torch.addcmul(residual, x, keep, value=scale)


@contextlib.contextmanager
def quick_dropout(model: nn.Module) -> Iterator[None]:
    """Every `nn.Dropout` of the model draws through `dropout`."""
    modules = [m for m in model.modules() if type(m) is nn.Dropout]
    for module in modules:
        module.forward = lambda x, m=module: dropout(x, m.p, m.training)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


# --- Layers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """The modules of a post-LayerNorm encoder layer (Devlin et al. 2019), whatever their names."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_dropout: nn.Dropout
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    inner: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor]
    output: nn.Linear
    output_dropout: nn.Dropout
    output_norm: nn.LayerNorm
    heads: int
    attention_output_dropout: nn.Dropout | None = None  # DistilBERT has none
    biased: bool = False  # MPNet's layers are given a bias of the attention's logits


def _bert(layer: Any) -> _Layer:
    """As BERT, RoBERTa and ELECTRA name them."""
    attention, after, inner, output = (
        layer.attention.self, layer.attention.output, layer.intermediate, layer.output,
    )  # fmt: skip
    return _Layer(
        attention.query, attention.key, attention.value, attention.dropout, after.dense,
        after.LayerNorm, inner.dense, inner.intermediate_act_fn, output.dense, output.dropout,
        output.LayerNorm, attention.num_attention_heads, after.dropout,
    )  # fmt: skip


def _mpnet(layer: Any) -> _Layer:
    attention, inner, output = layer.attention, layer.intermediate, layer.output
    own = attention.attn
    return _Layer(
        own.q, own.k, own.v, own.dropout, own.o, attention.LayerNorm, inner.dense,
        inner.intermediate_act_fn, output.dense, output.dropout, output.LayerNorm,
        own.num_attention_heads, attention.dropout, biased=True,
    )  # fmt: skip


def _distilbert(layer: Any) -> _Layer:
    attention, ffn = layer.attention, layer.ffn
    return _Layer(
        attention.q_lin, attention.k_lin, attention.v_lin, attention.dropout, attention.out_lin,
        layer.sa_layer_norm, ffn.lin1, ffn.activation, ffn.lin2, ffn.dropout,
        layer.output_layer_norm, attention.n_heads,
    )  # fmt: skip


def _read(layer: nn.Module) -> _Layer | None:
    """The layer's modules; None where they are not understood, or a product is not a plain one:
    an adapter around it starts at zero and would pass every comparison below."""
    for reader in (_bert, _distilbert, _mpnet):
        with contextlib.suppress(AttributeError):
            read = reader(layer)
            products = (
                read.query, read.key, read.value, read.attention_output, read.inner, read.output,
            )  # fmt: skip
            return read if all(type(m) is nn.Linear for m in products) else None
    return None


def _first_token(
    layer: _Layer, x: torch.Tensor, mask: torch.Tensor | None, training: bool
) -> torch.Tensor:
    """The layer's output for the first token, (batch, 1, hidden), of x (batch, length, hidden).

    One query a sequence: instead of keys and values of every token, each head's query goes back
    through the key matrix, and the value matrix is applied to the weighted sum of the states. The
    key's bias adds the same to every weight's logit, so softmax drops it.
    """
    batch, heads = x.shape[0], layer.heads
    first = x[:, :1]  # (batch, 1, hidden)
    size = layer.query.out_features // heads
    query = layer.query(first).view(batch, heads, size).transpose(0, 1)  # (heads, batch, size)
    key = layer.key.weight.view(heads, size, -1)
    logits = (query @ key).transpose(0, 1) @ x.mT * size**-0.5  # (batch, heads, length)
    if mask is not None:
        row = mask[:, :, 0]  # (batch, 1 or heads, length): what the first token may see
        logits = (
            logits.masked_fill(~row, torch.finfo(logits.dtype).min)
            if row.dtype == torch.bool
            else logits + row
        )
    weights = dropout(logits.softmax(-1), layer.attention_dropout.p, training)
    states = (weights @ x).transpose(0, 1)  # (heads, batch, hidden)
    value = layer.value.weight.view(heads, size, -1)
    context = (states @ value.mT).transpose(0, 1)  # (batch, heads, size)
    # Under dropout the weights do not sum to one: the value's bias counts as often as they do.
    context = context + weights.sum(-1, keepdim=True) * layer.value.bias.view(heads, size)
    return _after_attention(layer, first, context.reshape(batch, 1, -1), training)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    p: float, training: bool,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention, all (batch, heads, length, size); what torch's kernels call `math`."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, mask, p if training else 0.0)
    logits = query @ key.mT * query.shape[-1] ** -0.5
    if mask is not None:
        low = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, low) if mask.dtype == torch.bool else logits + mask
    return dropout(logits.softmax(-1), p, training) @ value


def _all_tokens(
    layer: _Layer, x: torch.Tensor, mask: torch.Tensor | None, training: bool
) -> torch.Tensor:
    """The layer's output, (batch, length, hidden)."""
    batch, length, _ = x.shape
    projections = (layer.query, layer.key, layer.value)
    joined = F.linear(  # one product instead of three
        x, torch.cat([m.weight for m in projections]), torch.cat([m.bias for m in projections])
    )
    by_head = joined.view(batch, length, 3, layer.heads, -1).permute(2, 0, 3, 1, 4).contiguous()
    query, key, value = by_head.unbind()  # each (batch, heads, length, size)
    context = _attention(query, key, value, mask, layer.attention_dropout.p, training)
    context = context.transpose(1, 2).reshape(batch, length, -1)
    return _after_attention(layer, x, context, training)


def _after_attention(
    layer: _Layer, x: torch.Tensor, context: torch.Tensor, training: bool
) -> torch.Tensor:
    """The layer's output from its input `x` and what attention gathered for the same tokens."""
    after = layer.attention_output_dropout
    hidden = _add_dropped(
        x, layer.attention_output(context), 0.0 if after is None else after.p, training
    )
    hidden = layer.attention_norm(hidden)
    inner = layer.activation(layer.inner(hidden))
    outer = _add_dropped(hidden, layer.output(inner), layer.output_dropout.p, training)
    return layer.output_norm(outer)


@contextlib.contextmanager
def first_token_layers(model: nn.Module, batch: dict[str, torch.Tensor]) -> Iterator[str]:
    """Compute the encoder's layers as above, the last one for the first token alone.

    Nothing is assumed about the model's class: the states and gradients of `batch` (padded, a few
    examples) say whether the layers are understood, and whether the head reads any other token.
    Yields what is computed so: ``first token``, ``all tokens`` or ``nothing``.
    """
    try:
        modules = encoder_layers(model)
    except HealingError:
        modules = []
    read = [layer for module in modules if (layer := _read(module))]
    found = "nothing"
    try:
        if read and len(read) == len(modules):
            training = model.training
            model.eval()
            # Whatever goes wrong with a shortcut: what is as it was is always right.
            with contextlib.suppress(Exception):
                wanted, first, tupled = _states(model, modules, batch)
                for name in ["first token", "all tokens"] if first else ["all tokens"]:
                    _use(modules, read, name == "first token", tupled)
                    with contextlib.suppress(Exception):
                        if _alike(_states(model, modules, batch)[0], wanted):
                            found = name
                            break
                    _restore(modules)
            model.train(training)
        yield found
    finally:
        _restore(modules)


def _states(
    model: nn.Module, modules: list[nn.Module], batch: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor], bool, bool]:
    """Every layer's output, whether the logits depend on the last one's first token alone, and
    whether the layers answer in tuples of one."""
    outputs, tuples = [], []

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        tuples.append(isinstance(out, tuple))
        outputs.append(out[0] if tuples[-1] and len(out) == 1 else out)

    hooks = [m.register_forward_hook(keep) for m in modules]
    try:
        with torch.enable_grad():
            logits = model(**batch).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not all(isinstance(states, torch.Tensor) and states.ndim == 3 for states in outputs):
        raise TypeError("a layer's output is not (batch, length, hidden)")
    first = False
    if outputs[-1].requires_grad:  # else all is frozen up to here, and the head stays unknown
        (gradient,) = torch.autograd.grad(logits.float().square().sum(), outputs[-1])
        first = bool(gradient[:, 0].any()) and not bool(gradient[:, 1:].any())
    return [states.detach() for states in outputs], first, tuples[0]


def _alike(states: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    """Equal up to rounding, over the tokens that were computed."""
    return all(
        torch.allclose(a, b[:, : a.shape[1]], rtol=1e-3, atol=1e-4)
        for a, b in zip(states, wanted, strict=True)
    )


def _use(modules: list[nn.Module], read: list[_Layer], first_token: bool, tupled: bool) -> None:
    for i, (module, layer) in enumerate(zip(modules, read, strict=True)):
        compute = _first_token if first_token and i + 1 == len(read) else _all_tokens

        def forward(
            hidden_states, attention_mask=None, bias=None, *_, c=compute, m=module, r=layer, **__
        ):
            mask = attention_mask
            if r.biased and bias is not None:  # both are added to the logits
                mask = bias if mask is None else bias + mask
            out = c(r, _as_products(hidden_states), mask, m.training)
            return (out,) if tupled else out

        module.forward = forward


def _as_products(states: torch.Tensor) -> torch.Tensor:
    """Under autocast to bfloat16 on a CPU: the states in bfloat16, and all that follows with them.

    Sums and norms then pass half the bytes and cast nothing between the products; inside, LayerNorm
    and softmax still compute in float32. On a GPU autocast's own norms want float32.
    """
    if states.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return states.to(torch.get_autocast_dtype("cpu"))
    return states


def _restore(modules: list[nn.Module]) -> None:
    for module in modules:
        module.__dict__.pop("forward", None)


# --- Weights --------------------------------------------------------------------------------------


class LowWeights:
    """Weights of the model's products in the precision that autocast computes them in.

    Autocast casts a weight whenever it is used, and its gradient back. Inside this block the
    modules hold parameters in `dtype`, cast once a step; the optimizer goes on with float32 ones,
    and gets the same gradients. Takes plain `nn.Linear` layers, whose products are all that reads
    their weights; none where `dtype` is None.

    Of the weights that it takes, those of one of the optimizer's `groups` lie side by side in one
    block, which takes their places there: casts, norm and step are then one call for all of them.
    A weight that gets no gradient in a step decays with its block.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, groups: Sequence[dict[str, Any]] = ()
    ):
        modules = list(model.modules()) if dtype is not None else []
        linear = [m for m in modules if type(m) is nn.Linear]
        tied = {id(p) for m in modules if type(m) is not nn.Linear for p in m._parameters.values()}
        self.places = [
            (module, name, full)
            for module in linear
            for name, full in module.named_parameters(recurse=False)
            if full.requires_grad and id(full) not in tied
        ]
        taken = dict.fromkeys(full for _, _, full in self.places)
        self.low: dict[nn.Parameter, nn.Parameter] = {}
        self.gradients: dict[nn.Parameter, torch.Tensor] = {}
        self.blocks: list[tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = []
        for group in groups or ({"params": list(taken)},):
            mine = [p for p in group["params"] if p in taken]
            if mine:
                block = self._join(mine, dtype)
                group["params"] = [p for p in group["params"] if p not in taken] + [block]

    @torch.no_grad()
    def _join(self, full: list[nn.Parameter], dtype: torch.dtype) -> nn.Parameter:
        """Make views of one block of these, each as aligned, at 64 bytes, as if on its own."""
        sizes = [-(-p.numel() // 16) * 16 for p in full]
        block = torch.zeros(sum(sizes), device=full[0].device)
        low, gradient = torch.zeros_like(block, dtype=dtype), torch.zeros_like(block)
        slots = zip(*(x.split(sizes) for x in (block, low, gradient)), strict=True)
        for p, parts in zip(full, slots, strict=True):
            value, lower, grad = (part[: p.numel()].view(p.shape) for part in parts)
            p.data = value.copy_(p)
            self.low[p], self.gradients[p] = nn.Parameter(lower), grad
        low.copy_(block)
        self.blocks.append((nn.Parameter(block), low, gradient))
        return self.blocks[-1][0]

    def __enter__(self) -> LowWeights:
        for module, name, full in self.places:
            setattr(module, name, self.low[full])
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()
        for full in self.low:  # on their own again: files refuse tensors that share memory
            full.data = full.detach().clone()

    def _put_back(self) -> None:
        for module, name, full in self.places:
            setattr(module, name, full)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The float32 parameters in their places, inside the block."""
        self._put_back()
        try:
            yield
        finally:
            self.__enter__()

    @torch.no_grad()
    def collect(self) -> None:
        """Add the gradients to those of the float32 parameters and blocks, in float32."""
        for full, low in self.low.items():
            gradient = self.gradients[full]
            if full.grad is None:  # the first since they were cleared
                gradient.zero_() if low.grad is None else gradient.copy_(low.grad)
                full.grad = gradient
            elif low.grad is not None:
                gradient.add_(low.grad)
            low.grad = None
        for block, _, gradient in self.blocks:
            block.grad = gradient

    def clear(self) -> None:
        """Forget the gradients, collected or not."""
        for full, low in self.low.items():
            full.grad = low.grad = None
        for block, _, _ in self.blocks:
            block.grad = None

    def norm(self) -> torch.Tensor:
        """Of all gradients collected since they were last cleared."""
        return torch.stack([g.dot(g) for _, _, g in self.blocks]).sum().sqrt()

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the float32 parameters again, after a step."""
        for block, low, _ in self.blocks:
            low.copy_(block)


# --- Memory ---------------------------------------------------------------------------------------


@torch.no_grad()
def own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Copy loaded weights to memory of their own.

    They are mapped from their file, aligned as it happens: the first write would copy them page by
    page, at several times the cost, and every later pass reads them across cache lines.
    """
    for parameter in parameters:
        parameter.data = parameter.detach().clone()


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next step, up to 1 GiB; does nothing elsewhere.

    Else it hands large blocks back to the system, which maps and clears their pages anew at the
    next step. The setting is the process's, and stays.
    """
    trim_threshold, mmap_threshold = -1, -3  # names of mallopt's settings, from malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        libc.mallopt(trim_threshold, 1 << 30)


# --- Embeddings -----------------------------------------------------------------------------------


class _CutEmbedding(nn.Module):
    """An embedding that stores only the rows of `ids`; takes the full vocabulary's ids."""

    def __init__(self, full: nn.Embedding, ids: torch.Tensor):
        super().__init__()
        lookup = torch.full((full.num_embeddings,), -1, dtype=torch.long, device=ids.device)
        lookup[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("lookup", lookup, persistent=False)
        self.weight = nn.Parameter(full.weight.detach()[ids].clone())
        pad = full.padding_idx
        self.padding_idx = None if pad is None or lookup[pad] < 0 else int(lookup[pad])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(self.lookup[input_ids], self.weight, self.padding_idx)


@contextlib.contextmanager
def cut_embeddings(model: nn.Module, *data: Encoded) -> Iterator[dict[str, float]]:
    """Train with only the word-embedding rows that `data` uses; put the table back at the end.

    Yields ``{"decay": 1.0}``: multiply it by each step's (1 - learning rate x weight decay), and
    the rows that were away decay by as much when they return. Does nothing where the table is tied
    to an output layer, whose loss reaches every row.
    """
    state = {"decay": 1.0}
    full = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output is not None and getattr(output, "weight", None) is full.weight
    if tied or type(full) is not nn.Embedding or not full.weight.requires_grad:
        yield state
        return
    used = {d.pad[0] for d in data}
    for d in data:
        used.update(*d.ids)
    ids = torch.tensor(sorted(used), device=full.weight.device)
    cut = _CutEmbedding(full, ids)
    model.set_input_embeddings(cut)
    try:
        yield state
    finally:
        with torch.no_grad():
            # Not in place: a table that is mapped from its file would be copied page by page.
            full.weight.data = full.weight.mul(state["decay"]).index_copy_(0, ids, cut.weight)
        model.set_input_embeddings(full)
