"""Shortcuts of a training step: the same function and the same gradients, with less arithmetic."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from families import FAMILIES, WIDTH, tiny_config
from helpers import examples
from test_training import QUIET, classifier, identical, largest_difference, weights
from torch.nn import functional as F
from transformers import BertForMaskedLM

from healing_utils.healing import shortcuts
from healing_utils.healing.encoders import encoder_layers
from healing_utils.healing.shortcuts import LowWeights, dropout, first_token_layers, quick_dropout
from healing_utils.healing.training import collate, fine_tune

SHORTENED = {"bert", "roberta", "electra", "distilbert", "mpnet"}


def batch(family: str = "bert", seed: int = 0) -> dict[str, torch.Tensor]:
    """Five random examples of different lengths, padded."""
    return collate(examples(family, 5, seed), torch.arange(5).numpy(), torch.device("cpu"))


def untouched(model):
    inside = [module for layer in encoder_layers(model) for module in layer.modules()]
    return not any("forward" in vars(module) for module in inside)


@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(401, 999)
    out = dropout(x, p)
    share = (out == 0).double().mean().item()
    # Five standard errors of a share over 400,599 values, and p's rounding to 2^-16.
    assert abs(share - p) < 5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-16
    kept = out[out != 0].unique()
    assert len(kept) == 1 and abs(kept.item() * (1 - p) - 1) < 2**-15 / (1 - p)
    # No pattern along the four values that share one 64-bit draw, nor from row to row.
    zeros = (out == 0).double().flatten()[: 401 * 996]
    lags = [((zeros - share) * (zeros.roll(k) - share)).mean().item() for k in (1, 2, 3, 4, 999)]
    assert max(map(abs, lags)) < 5 * p * (1 - p) / zeros.numel() ** 0.5
    assert not torch.equal(out, dropout(x, p))
    torch.manual_seed(0)
    assert torch.equal(out, dropout(x, p))
    assert dropout(x, p, training=False) is x and dropout(x, 0.0) is x
    assert not dropout(torch.ones(7, 3), 0.99999).any()  # not a multiple of four values


def test_dropping_and_adding_in_one_pass_is_both_in_turn():
    x, residual = (torch.randn(50, 8, requires_grad=True) for _ in range(2))

    def computed(function):
        torch.manual_seed(3)
        out = function()
        return out, *torch.autograd.grad(out.square().sum(), (residual, x))

    want = computed(lambda: residual + dropout(x, 0.3))
    got = computed(lambda: dropout(x, 0.3, residual=residual))
    # A product more or less is rounded: float32 keeps 24 bits of values around 1.
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, want, strict=True))
    assert torch.equal(dropout(x, 0.3, False, residual), residual + x)
    # Under autocast the products are bfloat16 and the residual is not.
    assert dropout(x.bfloat16(), 0.3, True, residual).dtype == torch.float32


def test_every_dropout_of_a_model_is_quick_inside_the_block_and_torchs_outside():
    module, x = classifier(dropout=0.5).train().bert.embeddings.dropout, torch.ones(100)
    for block, wanted in ((quick_dropout(module), dropout), (contextlib.nullcontext(), F.dropout)):
        with block:
            torch.manual_seed(0)
            got = module(x)
            torch.manual_seed(0)
            assert torch.equal(got, wanted(x, 0.5, True))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_the_whole_computation(family):
    model = classifier(family)
    if family == "mpnet":  # at its initial size the bias by distance would be lost in rounding
        torch.nn.init.normal_(model.mpnet.encoder.relative_attention_bias.weight)

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        logits = model(**batch(family)).logits
        logits.square().sum().backward()
        none = torch.zeros(())
        named = model.named_parameters()
        return logits.detach(), {n: none if p.grad is None else p.grad.clone() for n, p in named}

    logits, gradients = run()
    with first_token_layers(model, batch(family, seed=1)) as used:
        short_logits, short_gradients = run()
    assert used == ("first token" if family in SHORTENED else "nothing")
    assert torch.allclose(short_logits, logits, atol=1e-6)
    # Float32 rounding; a gradient of a tiny model is around 0.01 to 1.
    assert largest_difference(short_gradients, gradients) < 1e-5
    assert untouched(model)


def test_attention_weights_that_do_not_sum_to_one_count_the_values_bias(monkeypatch):
    """Under dropout they do not: here every second column is dropped, the others doubled."""

    def every_second(x, p, training=True, residual=None):
        if residual is not None:  # these draw for more tokens in the one than in the other
            return residual + x
        columns = torch.arange(x.shape[-1])
        return x * (2.0 * (columns % 2 == 0)) if training else x

    monkeypatch.setattr(shortcuts, "dropout", every_second)
    model = classifier("bert", dropout=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    layer, x = shortcuts._read(encoder_layers(model)[-1]), torch.randn(4, 9, 16)
    mask = torch.ones(4, 1, 9, 9, dtype=torch.bool)
    mask[1, :, :, 5:] = False
    whole = shortcuts._all_tokens(layer, x, mask, training=True)
    first = shortcuts._first_token(layer, x, mask, training=True)
    assert torch.allclose(first, whole[:, :1], atol=1e-5)
    assert not torch.allclose(whole, shortcuts._all_tokens(layer, x, mask, training=False))


def used_for(model):
    """What is computed otherwise, with the same logits."""
    wanted = model(**batch()).logits
    with first_token_layers(model, batch()) as used:
        assert torch.allclose(model(**batch()).logits, wanted, atol=1e-6)
    assert untouched(model)
    return used


def test_a_head_that_reads_every_token_gets_every_token():
    model = classifier("bert")
    pooler = model.bert.pooler
    pooler.forward = lambda states: torch.tanh(pooler.dense(states.mean(1)))
    assert used_for(model) == "all tokens"
    del pooler.forward
    assert used_for(model) == "first token"
    torch.nn.init.zeros_(model.classifier.weight)  # tells nothing about what it reads
    assert used_for(model) == "all tokens"
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    assert used_for(model) == "all tokens"


def test_a_layer_that_only_looks_like_berts_is_left_alone():
    model = classifier("bert")
    layer = encoder_layers(model)[0]
    original = type(layer).forward

    class Louder(type(layer)):
        def forward(self, *given, **named):
            return 1.1 * original(self, *given, **named)

    layer.__class__ = Louder
    assert used_for(model) == "nothing"


def test_an_adapter_around_a_product_is_not_passed_over():
    """It adds nothing at the start (Hu et al. 2021), so that comparing states cannot find it."""
    model = classifier("bert")
    attention = encoder_layers(model)[0].attention.self
    attention.query.__class__ = type("Adapted", (torch.nn.Linear,), {})
    assert used_for(model) == "nothing"


def test_failures_leave_the_model_as_it_was():
    model = classifier("bert")
    with pytest.raises(KeyError), first_token_layers(model, batch()), quick_dropout(model):
        raise KeyError
    assert untouched(model)


def low_weights(model, dtype=torch.bfloat16):
    return LowWeights(model, dtype, [{"params": list(model.parameters())}])


def gradients(model, low=None):
    """Of the float32 parameters, of a loss on one padded batch under autocast, where with `low`."""
    model.zero_grad()
    names = dict(model.named_parameters())
    with low or contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=low is not False):
            logits = model(**batch()).logits
        logits.float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in names.items() if p.grad is not None}
    if low:
        summed = [gradient for _, _, gradient in low.blocks]
        sizes = [-(-p.numel() // 16) * 16 for p in low.low]
        places = zip(low.low, summed[0].split(sizes), strict=True)
        of = {p: part[: p.numel()].view(p.shape).clone() for p, part in places}
        found |= {name: of[p] for name, p in names.items() if p in of}
    return found


@pytest.mark.parametrize("family", [*sorted(SHORTENED), "modernbert"])
def test_low_weights_get_the_gradients_that_autocast_gives(family):
    """The same products of the same bfloat16 values: equal to the last bit, and those of float32 up
    to rounding. bfloat16 keeps 8 bits, so a value is rounded by up to 1/256 of itself; a few dozen
    roundings in turn, of random sign, are some hundredths of a gradient's size."""
    model = classifier(family)
    exact, wanted = gradients(model, low=False), gradients(model)
    low = low_weights(model)
    assert len(low.low) > 12 and {p.dtype for p in low.low.values()} == {torch.bfloat16}
    got = gradients(model, low)
    assert identical({name: got[name] for name in wanted}, wanted)
    with first_token_layers(model, batch(seed=1)):
        short = gradients(model, low_weights(model))
    for name, want in exact.items():
        # The key's bias has no gradient but rounding's: softmax drops what it adds.
        if want.norm() > 1e-4:
            assert (short[name] - want).norm() < 0.05 * want.norm(), name


def backward(parameter, size):
    (parameter * size).sum().backward()


def test_low_weights_add_up_in_float32_follow_the_optimizer_and_go():
    model = classifier()
    names, before = dict(model.named_parameters()), weights(model)
    place = model.bert.pooler.dense
    full, size = place.weight, place.weight.numel() ** 0.5
    with pytest.raises(KeyError), low_weights(model) as low:
        for part in (1.0, 2.0**-10):  # their sum needs 11 bits
            backward(place.weight, part)
        assert low.norm(names.values()) == pytest.approx(size * (1 + 2.0**-10), rel=1e-6)
        low.clear(torch.optim.SGD(names.values()))
        backward(model.bert.embeddings.LayerNorm.weight, 3.0)  # which stays in float32
        backward(place.weight, 1.0)
        want = math.hypot(size, 3 * WIDTH**0.5)
        assert low.norm(names.values()) == pytest.approx(want, rel=1e-6)
        low.blocks[0][0].data.add_(1)  # as an optimizer does
        low.refresh()
        assert torch.equal(place.weight, full.bfloat16())
        low.put(False)
        assert place.weight is full
        low.put(True)
        raise KeyError
    assert all(p is names[name] for name, p in model.named_parameters())
    moved = {name: before[name] + float(p in low.low) for name, p in names.items()}
    assert largest_difference(weights(model), moved) < 1e-6
    storages = [p.untyped_storage().data_ptr() for p in names.values()]
    assert len(set(storages)) == len(storages)  # as files want them


def test_tied_and_frozen_weights_stay_and_float32_takes_none():
    tied = BertForMaskedLM(tiny_config("bert"))
    table = tied.get_input_embeddings().weight
    frozen = tied.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
    low = low_weights(tied)
    assert low.low and table not in low.low and frozen not in low.low
    assert not low_weights(tied, None).low


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_trains_in_bfloat16_in_parts_and_scored_in_between(family):
    data, settings = examples(family, 16), {"max_tokens": 40, "precision": "bfloat16", **QUIET}
    plain, scored = classifier(family), classifier(family)
    fine_tune(plain, data, epochs=2, batch_size=8, **settings)
    done = fine_tune(scored, data, data, epochs=2, batch_size=8, **settings)
    assert len(done.curve) == 4 and {p.dtype for p in scored.parameters()} == {torch.float32}
    assert identical(weights(plain), weights(scored))
    assert not identical(weights(plain), weights(classifier(family)))
