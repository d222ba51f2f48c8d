"""Similarity of representations: the layer that was damaged is the layer named."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import FAMILIES, LAYERS, tiny_model
from helpers import examples, random_examples

from healing_utils.healing.corruption import corrupt
from healing_utils.healing.similarity import layer_similarity, layer_states, passing_stream


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_is_like_itself_in_every_layer_of_every_family(family):
    model = tiny_model(family, "classification")
    got = layer_similarity(model, copy.deepcopy(model), examples(family, 40))
    for measure in ("cosine", "cka"):
        assert len(got[measure]) == LAYERS + 1
        assert np.allclose(got[measure], 1, atol=1e-9)
    assert got["stream"] == passing_stream(model, examples(family, 40))
    assert got["stream"][0] == pytest.approx(1) and max(got["stream"][1:]) < 1


@pytest.mark.parametrize("layer", range(LAYERS))
def test_layers_below_the_damage_are_the_same_and_those_above_are_not(layer):
    model = tiny_model("bert", "classification")
    broken = copy.deepcopy(model)
    corrupt(broken, layers=[layer], kind="reinit", seed=0)
    got = layer_similarity(model, broken, examples(count=40))
    for measure in ("cosine", "cka"):
        below, above = got[measure][: layer + 1], got[measure][layer + 1 :]
        assert np.allclose(below, 1, atol=1e-9) and max(above) < 0.99
    states = list(layer_states(model, examples(count=40)))  # stand for the model that gave them
    assert sum(batch.shape[1] for batch in states) == examples(count=40).tokens
    assert layer_similarity(states, broken, examples(count=40)) == got


class Streams(torch.nn.Module):
    """Hidden states looked up by token id: what they are is up to the test."""

    def __init__(self, *tables: torch.Tensor):
        super().__init__()
        self.tables = torch.nn.ParameterList(tables)

    def forward(self, input_ids, output_hidden_states=True, **_):
        hidden = tuple(table[input_ids] for table in self.tables)
        return type("Output", (), {"hidden_states": hidden})()


def test_the_stream_that_passes_is_the_cosine_with_the_embeddings():
    """A layer that adds nothing passes all of it, one that turns it by a right angle none."""
    x = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
    stream = passing_stream(Streams(x, 3 * x, turned, -x), random_examples(50, ids=(0, 60)))
    assert np.allclose(stream, [1, 1, 0, -1], atol=1e-12)


def test_cka_tells_a_rotated_stream_from_a_lost_one_and_agrees_with_its_definition():
    generator = torch.Generator().manual_seed(0)
    data = random_examples(400, ids=(0, 60))
    x, noise = (torch.randn(60, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x @ torch.diag(torch.arange(1.0, 9, dtype=torch.float64))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    moved = x @ rotation * 3 + 5
    got = layer_similarity(Streams(x, x, x), Streams(x, moved, noise), data)
    same, rotated, lost = got["cka"]
    assert same == pytest.approx(1) and rotated == pytest.approx(1) and lost < 0.3
    assert got["cosine"][0] == pytest.approx(1) and abs(got["cosine"][1]) < 0.9
    # Kornblith et al. 2019, section 3, equation 4 on centred features, over all tokens at once.
    tokens = [i for row in data.ids for i in row]
    a, b = (m[tokens].numpy() - m[tokens].numpy().mean(0) for m in (x, noise))
    norm = np.linalg.norm
    assert lost == pytest.approx(norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b)))
    cosine = torch.cosine_similarity(x[tokens], noise[tokens], dim=-1).mean().item()
    assert got["cosine"][2] == pytest.approx(cosine)
    got = layer_similarity(Streams(x, x), Streams(x, float("nan") * x), data)
    assert np.isnan([got["cka"][1], got["cosine"][1]]).all() and got["cka"][0] == pytest.approx(1)
