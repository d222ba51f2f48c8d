"""How far a damaged encoder's representations are from the intact one's, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from healing_utils.healing.examples import Encoded, collate


@torch.inference_mode()
def layer_states(model: nn.Module, data: Encoded) -> Iterator[torch.Tensor]:
    """Hidden states of all real tokens of `data`, embeddings first: a batch at a time, each
    (layers + 1, tokens, hidden)."""
    device, order = next(model.parameters()).device, np.argsort(data.lengths, kind="stable")
    model.eval()
    for start in range(0, len(order), 32):
        batch = collate(data, order[start : start + 32], device)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        yield torch.stack(model(**batch, output_hidden_states=True).hidden_states)[:, mask]


@torch.inference_mode()
def layer_similarity(
    intact: nn.Module | Iterable[torch.Tensor], other: nn.Module, data: Encoded
) -> dict[str, list[float]]:
    """Similarity of two models' hidden states over all real tokens of `data`; `intact` may be what
    `layer_states` gives for it.

    Returns ``cosine``, ``cka`` (linear centred kernel alignment, Kornblith et al. 2019, section 3)
    and ``stream`` (`passing_stream` of `other`), each (layers + 1,), embeddings first. Values that
    are not finite come out as NaN."""
    if isinstance(intact, nn.Module):
        intact = layer_states(intact, data)
    found = []
    for pair in zip(intact, layer_states(other, data), strict=True):
        x, y = (p.double() for p in pair)
        cosine = torch.cosine_similarity(x, y, dim=-1).sum(dim=1)
        found.append((cosine, _stream(y), x.mT @ y, x.mT @ x, y.mT @ y, x.sum(1), y.sum(1)))
    cosine, stream, xy, xx, yy, x, y = (sum(batches) for batches in zip(*found, strict=True))

    def centred(product: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Squared Frobenius norm of the centred cross product, (layers + 1,)."""
        mean = a[:, :, None] * b[:, None, :] / data.tokens
        return (product - mean).square().sum(dim=(1, 2))

    cka = centred(xy, x, y) / (centred(xx, x, x) * centred(yy, y, y)).sqrt()
    means = {"cosine": cosine / data.tokens, "cka": cka, "stream": stream / data.tokens}
    return {name: values.tolist() for name, values in means.items()}


@torch.inference_mode()
def passing_stream(model: nn.Module, data: Encoded) -> list[float]:
    """How much of the embeddings' output still stands in every layer's: their cosine, the mean over
    all real tokens of `data`, embeddings (1) first: (layers + 1,)."""
    return (sum(_stream(s.double()) for s in layer_states(model, data)) / data.tokens).tolist()


def _stream(states: torch.Tensor) -> torch.Tensor:
    """Cosines with the first layer of `states` (layers + 1, tokens, hidden), summed over tokens."""
    return torch.cosine_similarity(states, states[:1], dim=-1).sum(dim=1)
