"""Damage is exact: the planned tensors change as the kind says, and nothing else does."""

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, HEADS, LAYERS, tiny_batch, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from healing_utils.base.errors import HealingError
from healing_utils.healing.corruption import KINDS, CorruptionReport, corrupt
from healing_utils.healing.encoders import (
    OUTER_PARTS,
    PARTS,
    encoder_layers,
    layer_parameters,
    outer_parts,
    resolve_layers,
)

# Strong enough that every tensor of a tiny model, 16 values at the least, changes.
STRENGTHS = {
    "noise": 0.5, "sign_flip": 0.9, "bits_float32": 0.1, "bits_bfloat16": 0.2, "quantise": 3,
    "prune": 0.5,
}  # fmt: skip
REDRAWN = ("init", "reinit", "reinit_sqrt5")  # their values do not depend on those before
RANDOM = sorted(set(KINDS) - {"zero", "quantise", "prune"})


def damage(model, kind, **plan):
    """`corrupt` at the strength above."""
    return corrupt(model, kind=kind, strength=STRENGTHS.get(kind), **plan)


def spared(kind, name, parameter):
    return KINDS[kind].spares_vectors and (parameter.dim() < 2 or name.endswith("bias"))


def snapshot(model):
    """Copies of every parameter and buffer, those that are not saved included."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*bits)


def changed(before, model):
    after = snapshot(model)
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}


def names_in_model(model, names):
    """The model's own names for encoder-relative ones."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = layer_parameters(model)
    return {own[id(ours[name])] for name in names}


def digest(model):
    total = hashlib.sha256()
    for name, parameter in layer_parameters(model).items():
        total.update(name.encode() + parameter.detach().numpy().tobytes())
    return total.hexdigest()


# --- Exactly the plan -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@given(
    head=st.sampled_from(HEADS),
    side=st.sampled_from(["bottom", "top", "random"]),
    level=st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0]),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=15, deadline=None)
def test_exactly_the_planned_tensors_change(family, head, side, level, kind, seed):
    model = tiny_model(family, head)
    before, identities = snapshot(model), [id(parameter) for parameter in model.parameters()]
    report = damage(model, kind, side=side, level=level, seed=seed)

    planned = resolve_layers(LAYERS, side, level, seed=seed)
    names = [
        name
        for name, parameter in layer_parameters(model).items()
        if int(name.split(".")[1]) in planned and not spared(kind, name, parameter)
    ]
    assert changed(before, model) == names_in_model(model, names)
    assert [tensor.name for tensor in report.tensors] == names
    assert report.layers == planned
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@given(
    layers=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    part=st.sampled_from(sorted(PARTS)),
    kind=st.sampled_from(sorted(KINDS)),
)
@settings(max_examples=15, deadline=None)
def test_a_part_of_chosen_layers_is_all_that_changes(family, layers, part, kind):
    if KINDS[kind].spares_vectors and part == "layernorm":
        with pytest.raises(HealingError, match="nothing of part 'layernorm' that kind .* changes"):
            damage(tiny_model(family), kind, layers=layers, part=part)
        return
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in layer_parameters(model).items()}
    rest = snapshot(model)
    report = damage(model, kind, layers=layers, part=part, seed=1)
    hit = {}  # name: rows that the report says were overwritten
    for tensor in report.tensors:
        name, _, rows = tensor.name.partition("[")
        hit[name] = slice(*map(int, rows[:-1].split(":"))) if rows else slice(None)
        assert tensor.role in PARTS[part] and tensor.layer in layers
    for name, parameter in layer_parameters(model).items():
        outside = torch.ones(parameter.shape[0], dtype=torch.bool)
        outside[hit.get(name, slice(0))] = False
        assert same_bits(parameter.detach()[outside], before[name][outside])
        if name in hit:
            assert (parameter != before[name])[hit[name]].any()  # unequal too where not a number
    assert changed(rest, model) == names_in_model(model, hit)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("head", ["none", "classification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_pooler_are_all_that_changes(family, head, kind):
    for part in OUTER_PARTS:
        model = tiny_model(family, head)
        before = snapshot(model)
        try:
            parts = outer_parts(model, part)
        except HealingError as error:
            assert part == "pooler" and "has no pooler" in str(error)
            with pytest.raises(HealingError, match="has no pooler"):
                damage(model, kind, part=part)
            assert not changed(before, model)
            continue
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        expected = {
            own[id(parameter)]: name
            for _, module, _ in parts
            for name, parameter in module.named_parameters()
            if not spared(kind, name, parameter)
        }
        report = damage(model, kind, part=part, side="top", level=1)  # which say nothing here
        got = changed(before, model)
        # A model's own initialiser leaves the row of the padding id at zero.
        assert got == set(expected) and len(report.tensors) == len(got)
        assert (report.side, report.layers, report.part) == ("none", (), part)
        assert {tensor.layer for tensor in report.tensors} == {-1}


def test_the_tables_of_every_family_count_as_embeddings():
    for family in FAMILIES:
        model = tiny_model(family, "classification")
        report = corrupt(model, part="embeddings")
        shapes = [tensor.shape for tensor in report.tensors]
        assert any(shape[0] == model.config.vocab_size for shape in shapes), family


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", ["bert", "xlnet", "modernbert"])
def test_scattered_damage_hits_its_share_of_every_tensor(family, kind):
    whole, model = tiny_model(family), tiny_model(family)
    before = {name: p.detach().clone() for name, p in layer_parameters(model).items()}
    damage(whole, kind, level=1)
    report = damage(model, kind, side="scattered", level="1/4")
    after, full = layer_parameters(model), layer_parameters(whole)
    assert (report.side, report.level, report.layers) == ("scattered", 0.25, (0, 1, 2))
    assert report.cannot_heal is False
    for tensor in report.tensors:
        old, new = before[tensor.name], after[tensor.name].detach()
        assert tensor.elements == round(old.numel() / 4)
        moved = new != old
        assert moved.sum() <= tensor.elements
        # What moved has the value that it has where all is hit.
        same = (new == full[tensor.name]) | (new.isnan() & full[tensor.name].isnan())
        assert same[moved].all()
    if kind in REDRAWN:
        weight = "layer.0.attn.Wqkv.weight" if family == "modernbert" else report.tensors[0].name
        hit = (after[weight] != before[weight]).sum()
        assert hit == round(before[weight].numel() / 4)


def test_random_layers_are_as_many_and_drawn_by_the_seed():
    drawn = {seed: resolve_layers(12, "random", "1/2", seed=seed) for seed in range(40)}
    assert all(len(set(layers)) == 6 for layers in drawn.values())
    assert len(set(drawn.values())) > 30
    counts = [sum(layer in layers for layers in drawn.values()) for layer in range(12)]
    assert 8 < min(counts) and max(counts) < 32  # 20 expected, four standard errors are 12.6
    assert resolve_layers(12, "random", "1/2", seed=3) == drawn[3]
    assert {sum(layer < 6 for layer in layers) for layers in drawn.values()} == {3}
    assert corrupt(tiny_model("bert"), side="random", level="1/3", seed=5).side == "random"


@given(n=st.integers(3, 24), data=st.data())
def test_random_layers_are_never_the_bottom_or_the_top_ones(n, data):
    count, seed = data.draw(st.integers(1, n - 1)), data.draw(st.integers(0, 1000))
    layers = resolve_layers(n, "random", f"{count}/{n}", seed=seed)
    assert len(layers) == count and set(layers) < set(range(n))
    assert layers != tuple(range(count)) and layers != tuple(range(n - count, n))
    lower = sum(layer < n // 2 for layer in layers)
    within = (count // 2, (count + 1) // 2)  # half of them, as far as a half of the stack has room
    assert lower in within or lower == n // 2 or count - lower == n - n // 2
    assert resolve_layers(n, "random", 1, seed=seed) == tuple(range(n))


def test_of_two_layers_none_is_a_control():
    with pytest.raises(HealingError, match="of 2 layers any 1 is the bottom or the top one"):
        resolve_layers(2, "random", "1/2")


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_a_slice_gets_the_same_values_as_in_the_whole(part):
    whole, sliced = tiny_model("modernbert"), tiny_model("modernbert")
    intact = layer_parameters(tiny_model("modernbert"))["layer.0.attn.Wqkv.weight"]
    corrupt(whole, layers=[0])
    report = corrupt(sliced, layers=[0], part=part)
    start = 16 * ["query", "key", "value"].index(part)
    assert report.tensors[0].name == f"layer.0.attn.Wqkv.weight[{start}:{start + 16}]"
    assert report.elements == 16 * 16
    redrawn = layer_parameters(whole)["layer.0.attn.Wqkv.weight"]
    mixed = layer_parameters(sliced)["layer.0.attn.Wqkv.weight"]
    expected = intact.detach().clone()
    expected[start : start + 16] = redrawn[start : start + 16]
    assert same_bits(mixed.detach(), expected)


# --- What the kinds do ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, gain", [("reinit", 6), ("reinit_sqrt5", 1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_reinit_follows_the_papers_rule(family, kind, gain):
    """Uniform within sqrt(6 / ((1 + a^2) fan_in)), for a = 0 and for torch's own sqrt(5)."""
    model = tiny_model(family)
    report = corrupt(model, level=1, kind=kind, seed=3)
    parameters = layer_parameters(model)
    drawn = []
    for tensor in report.tensors:
        values = parameters[tensor.name].detach()
        if tensor.name.endswith("bias"):
            assert (values == 0).all()
        elif tensor.role == "layernorm":
            assert (values == 1).all()
        else:
            bound = math.sqrt(gain / math.prod(values.shape[1:]))
            assert values.abs().max() <= bound
            drawn.append(values.flatten() / bound)
    # A uniform draw on [-1, 1]: mean 0, variance 1/3; 4 standard errors allowed.
    drawn = torch.cat(drawn)
    assert abs(drawn.mean()) < 4 * math.sqrt(1 / 3 / len(drawn))
    assert abs(drawn.var() - 1 / 3) < 4 * math.sqrt(4 / 45 / len(drawn))
    assert drawn.abs().max() > 0.99


def test_fan_in_is_the_number_of_inputs_summed_over():
    """XLNet's raw tensors have another layout than a linear layer: 16 inputs each, by einsum."""
    model = tiny_model("xlnet")
    corrupt(model, level=1)
    for name, values in layer_parameters(model).items():
        word = name.rsplit(".", 1)[1]
        if word in "qkvor":
            assert values.shape == (16, 2, 8)
            assert 0.97 * math.sqrt(6 / 16) < values.abs().max() <= math.sqrt(6 / 16)
    wide = layer_parameters(tiny_bert())["layer.0.output.dense.weight"]
    assert 0.97 * math.sqrt(6 / 24) < wide.abs().max() <= math.sqrt(6 / 24)


def tiny_bert(**plan):
    model = tiny_model("bert")
    corrupt(model, **plan)
    return model


@pytest.mark.parametrize("kind, a", [("reinit", 0), ("reinit_sqrt5", math.sqrt(5))])
def test_reinit_writes_what_torchs_own_function_draws(kind, a):
    model = tiny_bert(seed=5, kind=kind)
    name = "layer.0.attention.self.query.weight"
    seed = int.from_bytes(hashlib.blake2b(f"5:{name}".encode(), digest_size=4).digest(), "big")
    generator = torch.Generator().manual_seed(seed)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(16, 16), a=a, generator=generator)
    assert same_bits(layer_parameters(model)[name].detach(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_init_draws_what_the_model_class_draws(family):
    """Each tensor's scale is that of a freshly built model of the same configuration."""
    config = tiny_config(family)
    config.initializer_range = 0.07  # not the default, so that a constant of ours would show
    torch.manual_seed(0)
    fresh = layer_parameters(hf.AutoModel.from_config(config))
    model = hf.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0)
    corrupt(model, level=1, kind="init")
    weights = 0
    for name, parameter in layer_parameters(model).items():
        values, built = parameter.detach(), fresh[name].detach()
        if values.dim() == 1:  # biases and LayerNorms
            assert torch.equal(values, built)
        else:
            assert not torch.equal(values, built)  # drawn anew
            error = 1 / math.sqrt(2 * values.numel())  # of a normal's std, relative
            assert values.std().item() == pytest.approx(built.std().item(), rel=6 * error)
            if not name.endswith("Wo.weight"):  # ModernBERT's, narrower: see below
                # ModernBERT cuts its normal off at two standard deviations, the others do not.
                scale = 0.07 * (0.88 if family == "modernbert" else 1)
                assert values.std().item() == pytest.approx(scale, rel=5 * error)
            weights += 1
    assert weights >= 4 * LAYERS


def test_init_narrows_modernberts_output_projections_with_depth():
    model = tiny_model("modernbert")
    corrupt(model, level=1, kind="init")
    std = {n: p.std().item() for n, p in layer_parameters(model).items() if n.startswith("layer.1")}
    ratio = std["layer.1.attn.Wqkv.weight"] / std["layer.1.attn.Wo.weight"]
    assert ratio == pytest.approx(math.sqrt(2 * LAYERS), rel=0.2)


def test_init_also_redraws_a_loaded_checkpoint(tmp_path):
    """Loading marks weights as initialised, and transformers then skips them."""
    tiny_model("bert").save_pretrained(tmp_path)
    model = hf.AutoModel.from_pretrained(tmp_path)
    before = snapshot(model)
    report = corrupt(model, layers=[1], kind="init")
    assert len(changed(before, model)) == len(report.tensors) == 16
    again = tiny_model("bert")
    corrupt(again, layers=[1], kind="init")
    assert digest(model) == digest(again)


def test_init_refuses_a_model_without_an_initialiser():
    plain = torch.nn.Module()
    plain.layers = torch.nn.ModuleList(encoder_layers(tiny_model("bert")))
    before = snapshot(plain)
    with pytest.raises(HealingError, match="no initialiser of its own"):
        corrupt(plain, kind="init")
    assert not changed(before, plain)
    corrupt(plain, kind="reinit")
    assert changed(before, plain)


def test_init_refuses_a_parameter_that_the_initialiser_leaves_alone():
    model = tiny_model("bert")
    layer = encoder_layers(model)[2]
    layer.intermediate.scale = torch.nn.Parameter(torch.ones(3, 3))
    before = snapshot(model)
    with pytest.raises(HealingError, match=r"leaves layer\.2\.intermediate\.scale alone"):
        corrupt(model, level=1, kind="init")
    assert not changed(before, model)  # not even the layers before it


def test_reinit_refuses_a_weight_without_fan_in():
    model = tiny_model("bert")
    encoder_layers(model)[1].intermediate.scale = torch.nn.Parameter(torch.ones(3))
    before = snapshot(model)
    with pytest.raises(HealingError, match=r"layer\.1\.intermediate\.scale.*no fan_in"):
        corrupt(model, level=1)
    assert not changed(before, model)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_corrupted_model_still_runs(family, kind):
    model = tiny_model(family)
    with torch.no_grad():
        intact = model(**tiny_batch())[0]
        report = damage(model, kind)
        broken = model(**tiny_batch())[0]
    not_finite = sum(int((~p.isfinite()).sum()) for p in layer_parameters(model).values())
    assert report.not_finite == not_finite
    if not kind.startswith("bits"):  # whose values may be of any size
        assert not_finite == 0 and torch.isfinite(broken).all()
        assert (broken - intact).abs().max() > 0.01


def planted(shape=(200, 300), kind="noise", strength=None, seed=0, fill=None):
    """A BERT layer's inner weight, of a size at which rates can be told, before and after."""
    model = tiny_model("bert")
    dense = encoder_layers(model)[0].intermediate.dense
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(shape, generator=generator) if fill is None else fill
    dense.weight = torch.nn.Parameter(before.clone())
    corrupt(model, layers=[0], part="feed_forward", kind=kind, strength=strength, seed=seed)
    return before, dense.weight.detach()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.2, 1.0])
def test_signs_flip_at_their_rate(rate):
    before, after = planted(kind="sign_flip", strength=rate)
    assert torch.equal(before.abs(), after.abs())
    share = (before != after).double().mean().item()
    assert abs(share - rate) <= 5 * math.sqrt(rate * (1 - rate) / before.numel())


@pytest.mark.parametrize(
    ("kind", "stored", "whole", "bits"),
    [
        ("bits_float32", torch.float32, torch.int32, 32),
        ("bits_bfloat16", torch.bfloat16, torch.int16, 16),
    ],
)
@pytest.mark.parametrize("rate", [1e-5, 0.01, 0.5])
def test_every_bit_flips_at_its_rate(kind, stored, whole, bits, rate):
    # From 2 to 4 the exponent is 10000000: no single flip makes it all ones, which is not a number,
    # whose bits a cast may change. Values from 1 to 2 are one flip away from that.
    values = 2 + 1.9 * torch.rand(200, 300, generator=torch.Generator().manual_seed(1))
    before, after = planted(kind=kind, strength=rate, fill=values)
    flips = before.to(stored).view(whole) ^ after.to(stored).view(whole)
    per_bit = [((flips >> bit) & 1).double().mean().item() for bit in range(bits)]
    one = math.sqrt(rate * (1 - rate) / before.numel())
    if rate < 0.5:  # where 1 of 256 exponents is all ones
        assert max(abs(share - rate) for share in per_bit) <= 6 * one
    assert abs(sum(per_bit) / bits - rate) <= 5 * one / math.sqrt(bits) + (rate == 0.5) * 0.01


def test_flips_of_rate_zero_round_to_bfloat16_and_leave_float32():
    before, after = planted(kind="bits_float32", strength=0)
    assert same_bits(before, after)
    before, after = planted(kind="bits_bfloat16", strength=0)
    assert same_bits(before.bfloat16().float(), after)


def test_what_is_not_finite_is_counted_and_said():
    model = tiny_model("bert")
    report = corrupt(model, level=1, kind="bits_float32", strength=0.5, seed=0)
    values = torch.cat([p.detach().flatten() for p in layer_parameters(model).values()])
    # The exponent's eight bits are all ones for 1 of 256.
    assert report.not_finite == (~values.isfinite()).sum() > 0
    assert f"{report.not_finite:,} of them not finite" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


def test_noise_has_the_size_that_is_asked_for():
    before, after = planted(kind="noise", strength=0.25)
    difference = after - before
    n = before.numel()
    assert difference.std().item() == pytest.approx(
        0.25 * before.std(correction=0).item(), rel=5 / math.sqrt(2 * n)
    )
    assert abs(difference.mean()) < 5 * 0.25 / math.sqrt(n)
    same = torch.full((20, 16), 3.0)  # no scale to be relative to
    assert torch.equal(*planted(kind="noise", strength=2, fill=same))


def test_matched_draws_keep_mean_and_scale():
    fill = 3 + 0.01 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    before, after = planted(kind="matched", fill=fill)
    error = 0.01 / math.sqrt(before.numel())
    assert abs(after.mean() - before.mean()) < 5 * error + 1e-6
    assert after.std().item() == pytest.approx(before.std().item(), rel=0.02)
    correlation = torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]
    assert abs(correlation) < 5 / math.sqrt(before.numel())


def test_permuted_values_are_the_same_values_elsewhere():
    before, after = planted(kind="permute")
    assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    assert (before == after).double().mean() < 0.001


@pytest.mark.parametrize("sparsity", [0.0, 0.3333, 0.9, 1.0])
def test_pruning_takes_exactly_the_smallest(sparsity):
    before, after = planted(kind="prune", strength=sparsity)
    gone = after == 0
    assert gone.sum() == round(sparsity * before.numel())
    assert torch.equal(after[~gone], before[~gone])
    if gone.any() and not gone.all():
        assert before[gone].abs().max() <= before[~gone].abs().min()
    ties = torch.ones(10, 16)
    before, after = planted(kind="prune", strength=0.5, fill=ties)
    assert (after.flatten()[:80] == 0).all() and (after.flatten()[80:] == 1).all()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantised_rows_have_their_levels(bits):
    before, after = planted(kind="quantise", strength=bits)
    step = before.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Half a step, and float32 rounding of the product of level and step.
    assert ((after - before).abs() <= 0.5 * step + 1e-6).all()
    levels = after / step
    assert (levels - levels.round()).abs().max() < 0.01
    assert max(len(row.unique()) for row in after) <= 2**bits - 1
    zeros = torch.zeros(4, 16)
    assert torch.equal(*planted(kind="quantise", strength=bits, fill=zeros))


@pytest.mark.parametrize("part", [*PARTS, *OUTER_PARTS])
def test_a_kind_says_where_no_gradient_can_bring_a_part_back(part):
    """The gradient of every matrix of the part, summed over a batch, at the zeroed values."""
    model = tiny_model("bert", "classification")
    report = corrupt(model, level="1/3", kind="zero", part=part)
    model(**tiny_batch()).logits.square().sum().backward()
    own = dict(model.base_model.named_parameters())
    matrices = [
        own[f"encoder.{t.name}" if t.layer >= 0 else t.name].grad
        for t in report.tensors
        if len(t.shape) > 1
    ]
    stuck = all(not gradient.any() for gradient in matrices)
    assert report.cannot_heal == (stuck and bool(matrices))
    assert report.cannot_heal == ("no gradient can bring them back" in str(report))


# --- The same damage everywhere -------------------------------------------------------------------


@pytest.mark.parametrize("kind", RANDOM)
def test_same_seed_same_damage_other_seed_other_damage(kind):
    digests = [digest(damaged(kind, seed=seed)) for seed in (0, 0, 1, 2**32, "1")]
    assert digests[0] == digests[1]
    assert len({digests[0], digests[2], digests[3]}) == 3
    assert digests[4] == digests[2]


def damaged(kind, **plan):
    model = tiny_model("bert")
    damage(model, kind, **plan)
    return model


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_makes_no_difference(family, kind):
    plain, headed = tiny_model(family, "none", 1), tiny_model(family, "classification", 2)
    if kind not in REDRAWN:  # the others start from the values that are there
        with torch.no_grad():
            theirs = layer_parameters(headed)
            for name, parameter in layer_parameters(plain).items():
                theirs[name].copy_(parameter)
    damage(plain, kind, level=1, seed=7)
    damage(headed, kind, level=1, seed=7)
    assert digest(plain) == digest(headed)


def test_a_tensor_is_drawn_the_same_whatever_else_is_drawn():
    alone, together = tiny_bert(layers=[2], part="key"), tiny_bert(level=1)
    name = "layer.2.attention.self.key.weight"
    assert same_bits(
        layer_parameters(alone)[name].detach(), layer_parameters(together)[name].detach()
    )
    tensors = [p.detach() for p in layer_parameters(together).values() if p.shape == (16, 16)]
    assert all(
        not torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i]
    )  # no two tensors share a draw


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_get_the_cast_of_the_same_values(kind, dtype):
    reference, model = tiny_model("bert"), tiny_model("bert").to(dtype)
    if kind not in REDRAWN:
        reference = tiny_model("bert").to(dtype).float()
    damage(reference, kind)
    damage(model, kind)
    ours = layer_parameters(model)
    for name, values in layer_parameters(reference).items():
        assert same_bits(ours[name].detach(), values.detach().to(dtype))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_random_state_is_left_alone_and_does_not_matter(kind):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = damaged(kind)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert digest(damaged(kind)) == digest(first)


def test_another_process_breaks_the_model_in_the_same_way():
    code = (
        "import torch, test_corruption as t;"
        "torch.set_num_threads(2); torch.manual_seed(99);"
        "print(*[t.digest(t.damaged(k, seed=4)) for k in sorted(t.KINDS)])"
    )
    here = Path(__file__).parent
    # A hash of Python's own would be salted differently in that process.
    path = os.pathsep.join(map(str, (here, *here.parents[:2])))
    environment = dict(os.environ, PYTHONHASHSEED="5", PYTHONPATH=path)
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ran.stdout.split() == [digest(damaged(kind, seed=4)) for kind in sorted(KINDS)]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_default_device_makes_no_difference(kind):
    model = tiny_model("bert")
    with torch.device("meta"):  # any other would do
        damage(model, kind)
    assert digest(model) == digest(damaged(kind))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_gpu_gets_the_same_values(kind):
    model = tiny_model("bert").to("cuda")
    state = torch.cuda.get_rng_state()
    damage(model, kind)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert digest(model.cpu()) == digest(damaged(kind))


# --- The report -----------------------------------------------------------------------------------


def test_the_report_measures_a_planted_change():
    model = tiny_model("bert")
    weight = encoder_layers(model)[0].attention.self.query.weight
    norm = encoder_layers(model)[0].output.LayerNorm.weight
    with torch.no_grad():
        weight.copy_(torch.tensor([[3.0], [-3.0]]).repeat(8, 16))
        norm.fill_(4.0)
        encoder_layers(model)[0].output.LayerNorm.bias.zero_()
        encoder_layers(model)[0].intermediate.dense.bias.fill_(float("inf"))
    report = corrupt(model, layers=[0])
    rows = {tensor.name: tensor for tensor in report.tensors}
    row = rows["layer.0.attention.self.query.weight"]
    assert (row.shape, row.elements, row.role, row.layer) == ((16, 16), 256, "query", 0)
    assert row.std_before == 3.0
    assert row.std_after == pytest.approx(weight.std(correction=0).item(), rel=1e-5)
    before = torch.tensor([[3.0], [-3.0]]).repeat(8, 16)
    assert row.relative_change == pytest.approx(
        ((weight.detach() - before).norm() / before.norm()).item(), rel=1e-5
    )
    row = rows["layer.0.output.LayerNorm.weight"]
    assert (row.std_before, row.std_after, row.relative_change) == (0.0, 0.0, 0.75)
    assert rows["layer.0.output.LayerNorm.bias"].relative_change == 0.0  # it was zero and is zero
    assert rows["layer.0.intermediate.dense.bias"].std_before is None  # it was not finite
    assert report.elements == sum(p.numel() for p in encoder_layers(model)[0].parameters())


def test_a_change_from_all_zeros_has_no_relative_size():
    model = tiny_model("bert")
    with torch.no_grad():
        encoder_layers(model)[0].attention.self.query.weight.zero_()
    report = corrupt(model, layers=[0], part="query")
    assert report.tensors[0].relative_change is None
    assert report.to_frame().relative_change.isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("plan", "side", "level", "layers"),
    [
        ({"side": "top", "level": "1/3"}, "top", 1 / 3, (2,)),
        ({"side": "top", "level": 1}, "all", 1.0, (0, 1, 2)),
        ({"side": "bottom", "level": 1.0}, "all", 1.0, (0, 1, 2)),
        ({"layers": "[2,0]", "level": 0.1}, "custom", 2 / 3, (0, 2)),
    ],
)
def test_the_report_says_what_was_planned(plan, side, level, layers):
    report = corrupt(tiny_model("bert"), seed=9, **plan)
    assert (report.side, report.level, report.layers) == (side, level, layers)
    assert (report.kind, report.seed, report.part, report.strength) == ("reinit", 9, "all", None)


def test_the_report_reads_well_and_survives_json():
    report = corrupt(tiny_model("bert"), side="top", part="feed_forward", kind="init", seed=2)
    assert isinstance(report, CorruptionReport)
    assert str(report) == (
        "init (seed 2) in layers 1, 2 of 3, feed_forward only: 8 tensors, 1,616 values"
    )
    assert str(report) in report._repr_html_()
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert record == report.to_dict()
    assert record["tensors"][0]["name"] == "layer.1.intermediate.dense.weight"
    assert record["tensors"][0]["shape"] == [24, 16]
    frame = report.to_frame()
    assert len(frame) == 8 and frame.elements.sum() == report.elements
    assert frame.relative_change.dtype == float


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"kind": "reinitialise"}, "unknown kind of corruption.*Did you mean 'reinit'"),
        ({"side": "buttom"}, "unknown side.*Did you mean 'bottom'"),
        ({"part": "atention"}, "unknown part.*Did you mean 'attention'"),
        ({"part": "poler"}, "unknown part.*Did you mean 'pooler'"),
        ({"kind": "noise"}, "kind 'noise' needs a strength: standard deviation of the noise"),
        ({"kind": "noise", "strength": -1}, "strength -1 of kind 'noise' must be from 0 up"),
        ({"kind": "noise", "strength": math.nan}, "strength nan of kind 'noise' must be"),
        ({"kind": "prune", "strength": 1.5}, "must be from 0 to 1: share of a tensor's values"),
        ({"kind": "quantise", "strength": 1}, "must be from 2 to 16: bits a value"),
        ({"kind": "prune", "strength": 0.5, "part": "layernorm"}, "it spares vectors"),
        ({"level": 0.05}, "rounds to no layer"),
        ({"level": "much"}, "not a number"),
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"strength": 0.5}, "kind 'reinit' has no strength"),
        ({"kind": "init", "strength": 0}, "kind 'init' has no strength"),
        ({"seed": -1}, "negative"),
        ({"seed": 0.5}, "not a whole number"),
        ({"seed": None}, "not a whole number"),
        ({"seed": True}, "not a whole number"),
    ],
)
def test_a_bad_plan_changes_nothing(plan, message):
    model = tiny_model("bert")
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(HealingError, match=message) as error:
        corrupt(model, **plan)
    assert "\n" not in str(error.value)
    assert not changed(before, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_part_that_the_layers_lack_is_refused():
    model = tiny_model("bert")
    layer = encoder_layers(model)[0]
    layer.attention.output.LayerNorm = layer.output.LayerNorm = torch.nn.Identity()
    with pytest.raises(HealingError, match=r"layers \[0\] of BertModel hold nothing of part"):
        corrupt(model, layers=[0], part="layernorm")


def test_shared_layers_are_refused():
    with pytest.raises(HealingError, match="share weights, as in ALBERT"):
        corrupt(tiny_model("albert", "classification"))


def test_weights_without_floating_point_values_are_refused():
    with torch.device("meta"):
        empty = hf.BertModel(tiny_config("bert"))
    with pytest.raises(HealingError, match=r"layer\.0\.attention.*meta device"):
        corrupt(empty)
    model = tiny_model("bert")
    dense = encoder_layers(model)[1].output.dense
    whole = torch.zeros(dense.weight.shape, dtype=torch.int8)
    dense.weight = torch.nn.Parameter(whole, requires_grad=False)
    before = snapshot(model)
    with pytest.raises(HealingError, match=r"layer\.1\.output\.dense\.weight is stored as int8"):
        corrupt(model)
    assert not changed(before, model)
    corrupt(model, layers=[0])  # the layers that are stored well can still be corrupted


def test_a_new_kind_is_one_function_in_the_table(monkeypatch):
    """The table is all there is to a kind: its strength arrives, its values are written."""
    from healing_utils.healing import corruption

    monkeypatch.setattr(corruption, "KINDS", dict(KINDS))

    @corruption._kind(strength="what every value is multiplied by")
    def scaled(target, generator, strength):
        """Every value times the strength."""
        return target.parameter.detach().cpu() * strength

    model, intact = tiny_model("bert"), tiny_model("bert")
    report = corrupt(model, layers=[1], kind="scaled", strength="0.25")
    assert [tensor.relative_change for tensor in report.tensors] == [pytest.approx(0.75)] * 16
    assert "scaled at strength 0.25 (seed 0) in layer 1 of 3" in str(report)
    expected = copy.deepcopy(layer_parameters(intact)["layer.1.output.dense.weight"]) * 0.25
    assert torch.equal(layer_parameters(model)["layer.1.output.dense.weight"], expected)
    assert corruption.KINDS["scaled"].summary == "Every value times the strength."
    with pytest.raises(HealingError, match="needs a strength: what every value"):
        corrupt(model, kind="scaled")


def test_every_kind_says_what_it_does():
    assert {"reinit", "init"} <= set(KINDS)
    assert all(kind.summary and kind.name == name for name, kind in KINDS.items())
