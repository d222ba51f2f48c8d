"""Damage is exact: the planned tensors change as the kind says, and nothing else does."""

import copy
import hashlib
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
from test_encoders import layer_parameters

from healing_utils.base.errors import HealingError
from healing_utils.healing.corruption import KINDS, corrupt, parse_kind, spell_kind
from healing_utils.healing.encoders import (
    OUTER_PARTS,
    PARTS,
    encoder_layers,
    pieces,
    resolve_layers,
)

# Strong enough that every tensor of a tiny model, 16 values at the least, changes.
STRENGTHS = {
    "noise": 0.5, "sign_flip": 0.9, "bits_float32": 0.1, "bits_bfloat16": 0.2, "quantise": 3,
    "prune": 0.5, "bits_exponent": 0.9, "bits_other": 0.2, "outliers": 2, "outliers_control": 2,
}  # fmt: skip
BAD_SEEDS = (-1, 0.5, None, True, "x", 2**64, 10**5000, "9" * 5000)
REDRAWN = ("init", "reinit", "reinit_sqrt5")  # their values do not depend on those before


def damage(model, kind, **plan):
    """`corrupt` at the strength above."""
    return corrupt(model, kind=kind, strength=STRENGTHS.get(kind), **plan)


def damaged(kind="reinit", family="bert", **plan):
    model = tiny_model(family)
    damage(model, kind, **plan)
    return model


def spared(kind, name, parameter):
    vector = parameter.dim() < 2 or name.endswith("bias")
    norm = "norm" in name.lower()
    return {"matrices": vector, "normalisations": not norm}.get(KINDS[kind].only, False)


def snapshot(model):
    """Copies of every parameter and buffer, those that are not saved included."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def same_bits(one, other):
    alike = one.dtype == other.dtype and one.shape == other.shape
    bits = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return alike and torch.equal(*bits)


def changed(before, model):
    after = snapshot(model)
    assert before.keys() == after.keys()
    return {name for name in before if not same_bits(before[name], after[name])}


def copies(model):
    return {name: p.detach().clone() for name, p in layer_parameters(model).items()}


def digest(model):
    total = hashlib.sha256()
    for name, parameter in layer_parameters(model).items():
        total.update(name.encode() + parameter.detach().numpy().tobytes())
    return total.hexdigest()


LEVELS = st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0])
SIDES = {"side": st.sampled_from(["bottom", "top", "random"]), "level": LEVELS}
NAMED = {"layers": st.sets(st.integers(0, LAYERS - 1), min_size=1)}


@pytest.mark.parametrize("family", FAMILIES)
@given(
    head=st.sampled_from(HEADS),
    where=st.one_of(st.fixed_dictionaries(SIDES), st.fixed_dictionaries(NAMED)),
    part=st.sampled_from(["all"] * 5 + sorted(PARTS) + [*OUTER_PARTS] * 3),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=25, deadline=None)
def test_exactly_what_is_planned_changes(family, head, where, part, kind, seed):
    model = tiny_model(family, head)
    before, own = snapshot(model), {p: name for name, p in model.named_parameters()}
    outer = part in OUTER_PARTS
    layers = () if outer else resolve_layers(LAYERS, seed=seed, **where)
    meant = [p for p in pieces(model, part, layers) if not spared(kind, p.name, p.parameter)]
    if not meant:
        with pytest.raises(HealingError, match=f"has no {part}"):
            damage(model, kind, part=part, **where)
        assert not changed(before, model)
        return
    report = damage(model, kind, part=part, seed=seed, **where)
    assert (report.layers, report.part) == (layers, part)
    assert [t.name.split("[")[0] for t in report.tensors.itertuples()] == [p.name for p in meant]
    assert set(report.tensors.layer) <= ({-1} if outer else set(layers))
    assert outer or set(report.tensors.role) <= set(PARTS[part])
    hit = changed(before, model)
    assert hit == {own[piece.parameter] for piece in meant}
    if part == "all":  # by the parameters' names, whatever `pieces` says
        inside = layer_parameters(model).items()
        there = {name: p for name, p in inside if int(name.split(".")[1]) in layers}
        assert hit == {own[p] for name, p in there.items() if not spared(kind, name, p)}
    for piece in meant:
        old, new = before[own[piece.parameter]], piece.parameter.detach()
        assert (new != old)[piece.rows].any()  # unequal too where not a number
        kept = torch.ones(len(old), dtype=torch.bool)
        kept[piece.rows] = False
        assert same_bits(new[kept], old[kept])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", ["bert", "xlnet", "modernbert"])
def test_scattered_damage_hits_its_share_of_every_tensor(family, kind):
    model = tiny_model(family)
    before, full = copies(model), layer_parameters(damaged(kind, family, level=1))
    report = damage(model, kind, side="scattered", level="1/4")
    after = layer_parameters(model)
    assert report.layers == (0, 1, 2) and report.cannot_heal is False
    for tensor in report.tensors.itertuples():
        old, new = before[tensor.name], after[tensor.name].detach()
        assert tensor.elements == round(old.numel() / 4)
        moved = new != old
        assert moved.sum() <= tensor.elements
        # What moved has the value that it has where all is hit.
        same = (new == full[tensor.name]) | (new.isnan() & full[tensor.name].isnan())
        assert same[moved].all()
    if kind in REDRAWN:
        weight = "layer.0.attn.Wqkv.weight" if family == "modernbert" else report.tensors.name[0]
        assert (after[weight] != before[weight]).sum() == round(before[weight].numel() / 4)


@pytest.mark.parametrize("kind, a", [("reinit", 0), ("reinit_sqrt5", math.sqrt(5))])
@pytest.mark.parametrize("family", FAMILIES)
def test_reinit_writes_what_torchs_own_function_draws(family, kind, a):
    model = tiny_model(family)
    report, after = corrupt(model, level=1, kind=kind, seed=5), copies(model)
    for tensor in report.tensors.itertuples():
        values = after[tensor.name]
        if values.dim() == 1 or tensor.name.endswith("bias"):
            one = tensor.role == "layernorm" and tensor.name.endswith("weight")
            assert (values == float(one)).all()
            continue
        hashed = hashlib.blake2b(f"5:{tensor.name}".encode(), digest_size=4).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(hashed, "big"))
        expected = torch.empty(values.shape)
        torch.nn.init.kaiming_uniform_(expected, a=a, generator=generator)
        assert same_bits(values, expected)
        # XLNet's raw (16, 2, 8) have 16 inputs too
        bound = math.sqrt(6 / (1 + a**2) / math.prod(values.shape[1:]))
        assert 0.9 * bound < values.abs().max() <= bound


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
    matrices = 0
    for name, values in copies(model).items():
        built = fresh[name].detach()
        if values.dim() == 1:  # biases and LayerNorms
            assert torch.equal(values, built)
            continue
        assert not torch.equal(values, built)  # drawn anew
        error = 1 / math.sqrt(2 * values.numel())  # of a normal's std, relative
        assert values.std().item() == pytest.approx(built.std().item(), rel=6 * error)
        # ModernBERT cuts its normal off at two standard deviations and narrows outputs with depth.
        narrow = 1 / math.sqrt(2 * LAYERS) if name.endswith("Wo.weight") else 1
        scale = 0.07 * (0.88 * narrow if family == "modernbert" else 1)
        assert values.std().item() == pytest.approx(scale, rel=6 * error)
        matrices += 1
    assert matrices >= 4 * LAYERS


def test_init_also_redraws_a_loaded_checkpoint(tmp_path):
    """Loading marks weights as initialised, and transformers then skips them."""
    tiny_model("bert").save_pretrained(tmp_path)
    model = hf.AutoModel.from_pretrained(tmp_path)
    corrupt(model, layers=[1], kind="init")
    assert digest(model) == digest(damaged("init", layers=[1])) != digest(tiny_model("bert"))


def planted(kind, strength=None, fill=None):
    """A BERT layer's inner weight, of a size at which rates can be told, before and after."""
    model, generator = tiny_model("bert"), torch.Generator().manual_seed(1)
    fill = torch.randn(200, 300, generator=generator) if fill is None else fill
    dense = encoder_layers(model)[0].intermediate.dense
    dense.weight = torch.nn.Parameter(fill.clone())
    corrupt(model, layers=[0], part="feed_forward", kind=kind, strength=strength)
    return fill, dense.weight.detach()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.2, 1.0])
def test_signs_flip_at_their_rate(rate):
    before, after = planted("sign_flip", rate)
    assert torch.equal(before.abs(), after.abs())
    share = (before != after).double().mean().item()
    assert abs(share - rate) <= 5 * math.sqrt(rate * (1 - rate) / before.numel())


@pytest.mark.parametrize(
    ("kind", "stored", "whole", "bits"),
    [
        ("bits_float32", torch.float32, torch.int32, range(32)),
        ("bits_bfloat16", torch.bfloat16, torch.int16, range(16)),
        ("bits_exponent", torch.bfloat16, torch.int16, [14]),
        ("bits_other", torch.bfloat16, torch.int16, [*range(14), 15]),
    ],
)
@pytest.mark.parametrize("rate", [0, 1e-5, 0.01, 0.5])
def test_every_bit_flips_at_its_rate(kind, stored, whole, bits, rate):
    # From 2 to 4 the exponent is 10000000: no single flip makes it all ones, which is not a number,
    # whose bits a cast may change. Values from 1 to 2 are one flip away from that.
    values = 2 + 1.9 * torch.rand(200, 300, generator=torch.Generator().manual_seed(1))
    before, after = planted(kind, rate, values)
    assert same_bits(after, after.to(stored).float()) or rate == 0.5
    flips = before.to(stored).view(whole) ^ after.to(stored).view(whole)
    shares = [((flips >> bit) & 1).double().mean().item() for bit in range(8 * stored.itemsize)]
    one = math.sqrt(rate * (1 - rate) / before.numel())
    for bit, share in enumerate(shares):  # at 0.5, 1 of 256 exponents is all ones
        assert abs(share - rate * (bit in bits)) <= 6 * one + (rate == 0.5) * 0.01


def test_noise_has_the_size_that_is_asked_for():
    before, after = planted("noise", 0.25)
    difference, n = after - before, before.numel()
    size = 0.25 * before.std(correction=0).item()
    assert difference.std().item() == pytest.approx(size, rel=5 / math.sqrt(2 * n))
    assert abs(difference.mean()) < 5 * 0.25 / math.sqrt(n)
    assert torch.equal(*planted("noise", 2, torch.full((20, 16), 3.0)))  # no scale to relate to


def test_matched_draws_keep_mean_and_scale_and_permuted_values_are_the_same_elsewhere():
    fill = 3 + 0.01 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    before, after = planted("matched", fill=fill)
    error = 1 / math.sqrt(before.numel())
    assert abs(after.mean() - before.mean()) < 0.05 * error + 1e-6
    assert after.std().item() == pytest.approx(before.std().item(), rel=0.02)
    assert abs(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]) < 5 * error
    before, after = planted("permute")
    assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    assert (before == after).double().mean() < 0.001


@pytest.mark.parametrize("sparsity", [0.0, 0.3333, 0.9, 1.0])
def test_pruning_takes_exactly_the_smallest(sparsity):
    before, after = planted("prune", sparsity)
    sizes, gone = before.abs().flatten().sort().values, round(sparsity * before.numel())
    assert torch.equal(after.abs().flatten().sort().values[gone:], sizes[gone:])
    assert (after == 0).sum() == gone and torch.equal(after[after != 0], before[after != 0])
    before, after = planted("prune", 0.5, torch.ones(10, 16))
    assert (after.flatten()[:80] == 0).all() and (after.flatten()[80:] == 1).all()


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_quantised_rows_have_their_levels(bits):
    before, after = planted("quantise", bits)
    step = before.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    # Half a step, and float32 rounding of the product of level and step.
    assert ((after - before).abs() <= 0.5 * step + 1e-6).all()
    levels = after / step
    assert (levels - levels.round()).abs().max() < 0.01
    assert max(len(row.unique()) for row in after) <= 2**bits - 1
    assert torch.equal(*planted("quantise", bits, torch.zeros(4, 16)))


@pytest.mark.parametrize("part", [*PARTS, *OUTER_PARTS])
def test_a_kind_says_where_no_gradient_can_bring_a_part_back(part):
    """The gradient of every matrix of the part, summed over a batch, at the zeroed values."""
    model = tiny_model("bert", "classification")
    report = corrupt(model, level="1/3", kind="zero", part=part)
    model(**tiny_batch()).logits.square().sum().backward()
    hit = [p.parameter for p in pieces(model, part, report.layers) if p.parameter.dim() > 1]
    stuck = bool(hit) and not any(parameter.grad.any() for parameter in hit)
    assert report.cannot_heal == stuck
    assert report.cannot_heal == ("no gradient can bring them back" in str(report))


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_tensor_is_drawn_the_same_whatever_else_is_drawn_and_no_two_share_a_draw(family, part):
    """Of ModernBERT's fused projection a part is a third of the rows."""
    model, together = tiny_model(family), copies(damaged(family=family, level=1))
    expected = copies(model)
    report = corrupt(model, layers=[2], part=part)
    piece = next(piece for piece in pieces(model, part, [2]) if not piece.is_bias)
    expected[piece.name][piece.rows] = together[piece.name][piece.rows]
    assert same_bits(piece.parameter, expected[piece.name])
    start = 16 * ("query", "key", "value").index(part)
    sliced = f"[{start}:{start + 16}]" if family == "modernbert" else ""
    assert report.tensors.name[0] == piece.name + sliced
    tensors = [values for values in together.values() if values.shape == (16, 16)]
    assert not any(torch.equal(a, b) for i, a in enumerate(tensors) for b in tensors[:i])


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
        assert same_bits(ours[name], values.to(dtype))


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_and_not_head_random_state_or_default_device(family, kind):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = digest(damaged(kind, family))
    assert torch.equal(torch.get_rng_state(), state)
    if family == "bert" and kind not in ("zero", "quantise", "prune", "outliers"):  # no draw
        others = [digest(damaged(kind, family, seed=seed)) for seed in (1, 2**32, "1")]
        assert first not in others and others[0] == others[2] != others[1]
    torch.manual_seed(12)
    headed, theirs = tiny_model(family, "classification", 2), copies(tiny_model(family))
    for name, parameter in layer_parameters(headed).items():
        parameter.data.copy_(theirs[name])
    with torch.device("meta"):  # any other would do
        damage(headed, kind)
    assert digest(headed) == first


def test_another_process_breaks_the_model_in_the_same_way():
    code = (
        "import torch, test_corruption as t;"
        "torch.set_num_threads(2); torch.manual_seed(99);"
        "print(*[t.digest(t.damaged(k, seed=4)) for k in sorted(t.KINDS)])"
    )
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, *here.parents[:2])))
    # A hash of Python's own would be salted differently in that process.
    given = {"env": {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": path}, "text": True}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, **given)
    assert ran.stdout.split() == [digest(damaged(kind, seed=4)) for kind in sorted(KINDS)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_gpu_gets_the_same_values(kind):
    model = tiny_model("bert").to("cuda")
    state = torch.cuda.get_rng_state()
    damage(model, kind)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert digest(model.cpu()) == digest(damaged(kind))


def test_the_report_measures_a_planted_change():
    model = tiny_model("bert")
    layer = encoder_layers(model)[0]
    weight, norm = layer.attention.self.query.weight, layer.output.LayerNorm
    before = torch.tensor([[3.0], [-3.0]]).repeat(8, 16)
    with torch.no_grad():
        weight.copy_(before)
        norm.weight.fill_(4.0)
        norm.bias.zero_()
        layer.intermediate.dense.bias.fill_(float("inf"))
        layer.output.dense.weight.zero_()
    report = corrupt(model, layers=[0])
    rows = report.tensors.set_index("name").rename(lambda name: name.removeprefix("layer.0."))
    row = rows.loc["attention.self.query.weight"]
    assert row["layer":"elements"].tolist() == [0, "query", (16, 16), 256]
    moved = (weight.detach() - before).norm() / before.norm()
    wanted = [3.0, weight.std(correction=0).item(), moved.item(), 0]
    assert row["std_before":].tolist() == pytest.approx(wanted, rel=1e-5)
    assert rows.loc["output.LayerNorm.weight", "std_before":].tolist() == [0.0, 0.0, 0.75, 0]
    assert rows.relative_change["output.LayerNorm.bias"] == 0.0  # it was zero and is zero
    assert math.isnan(rows.relative_change["output.dense.weight"])  # it was zero and is not
    assert math.isnan(rows.std_before["intermediate.dense.bias"])  # it was not finite
    assert report.elements == sum(p.numel() for p in layer.parameters())


def test_the_report_reads_well_and_counts_what_is_not_finite():
    report = corrupt(tiny_model("bert"), side="top", part="feed_forward", kind="init", seed=2)
    said = "init (seed 2) in layers 1, 2 of 3, feed_forward only: 8 tensors, 1,616 values"
    assert str(report) == said
    model = tiny_model("bert")
    report = corrupt(model, level=1, kind="bits_float32", strength=0.5)
    values = torch.cat([values.flatten() for values in copies(model).values()])
    # The exponent's eight bits are all ones for 1 of 256.
    assert report.not_finite == (~values.isfinite()).sum() > 0
    assert f"{report.not_finite:,} of them not finite" in str(report)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"kind": "reinitialise"}, "unknown kind of corruption.*Did you mean 'reinit'"),
        ({"side": "buttom"}, "unknown side.*Did you mean 'bottom'"),
        ({"part": "poler"}, "unknown part.*Did you mean 'pooler'"),
        ({"kind": "noise"}, "kind 'noise' needs a strength that is from 0 up: standard deviation"),
        *(({"kind": "noise", "strength": x}, f"not {x}: stand") for x in (-1, "nan", "inf", "x")),
        ({"kind": "prune", "strength": 1.5}, "a strength that is from 0 to 1, not 1.5: share of a"),
        *(
            ({"kind": "quantise", "strength": x}, "a whole number from 2 to 16, not .*: bits")
            for x in (2.5, 1)
        ),
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"strength": 0.5}, "kind 'reinit' has no strength"),
        *(({"seed": seed}, "not a whole number") for seed in BAD_SEEDS),
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


def with_scale(shape):
    scale = torch.nn.Parameter(torch.ones(shape))
    return lambda model: setattr(encoder_layers(model)[2].intermediate, "scale", scale)


def in_bytes(model):
    dense = encoder_layers(model)[2].output.dense
    whole = torch.zeros(dense.weight.shape, dtype=torch.int8)
    dense.weight = torch.nn.Parameter(whole, requires_grad=False)


def without_initialiser(model):
    model.__class__ = type("Plain", (torch.nn.Module,), {})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (with_scale((3, 3)), "init", "no initial values for layer.2.intermediate.scale"),
        (with_scale(3), "reinit", r"layer\.2\.intermediate\.scale.*no fan_in"),
        (without_initialiser, "init", "Plain has no initial values"),
        (in_bytes, "reinit", r"layer\.2\.output\.dense\.weight is stored as torch.int8"),
        (lambda m: m.to("meta"), "reinit", r"layer\.0\.attention.* on device meta"),
    ],
)
def test_a_model_that_cannot_take_it_is_left_whole(change, kind, message):
    model = tiny_model("bert")
    change(model)
    before = snapshot(model)
    with pytest.raises(HealingError, match=message):
        corrupt(model, level=1, kind=kind)
    if not next(model.parameters()).is_meta:
        assert not changed(before, model)  # not even the layers before it


@pytest.mark.parametrize(
    "spelt", ["reinit", "noise=0.12345678", "quantise=4", "bits_float32=1e-05"]
)
def test_kinds_are_spelt_as_they_are_read(spelt):
    assert spell_kind(*parse_kind(spelt)) == spelt


def test_outliers_are_the_planted_features_and_their_control_as_many_others():
    model = tiny_model("bert")
    norms = [p for p in pieces(model, "layernorm") if p.name.endswith("weight")]
    for norm in norms:
        norm.module.get_parameter(norm.path).data[[3, 11]] = torch.tensor([9.0, -7.0])
    before = layer_parameters(copy.deepcopy(model))
    corrupt(model, level=1, kind="outliers", strength=2)
    for name, parameter in layer_parameters(model).items():
        zeroed = (parameter != before[name]).nonzero().flatten().tolist()
        assert zeroed == ([3, 11] if "norm" in name.lower() else []), name
    other = tiny_model("bert")
    report = corrupt(other, level=1, kind="outliers_control", strength=2)
    assert all((p == 0).sum() == 2 for n, p in layer_parameters(other).items() if "Norm" in n)
    assert len(report.tensors) == 2 * len(norms)
