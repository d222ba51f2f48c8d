"""Damage is exact: the planned tensors change as the kind says, and nothing else does."""

import copy
import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


SIDES = st.fixed_dictionaries(
    {
        "side": st.sampled_from(["bottom", "top", "random"]),
        "level": st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0]),
    }
)
NAMED = st.fixed_dictionaries({"layers": st.sets(st.integers(0, LAYERS - 1), min_size=1)})


@pytest.mark.parametrize("family", FAMILIES)
@given(
    head=st.sampled_from(HEADS),
    where=st.one_of(SIDES, NAMED),
    part=st.sampled_from(["all"] * 5 + sorted(PARTS)),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=25, deadline=None)
def test_exactly_what_is_planned_changes(family, head, where, part, kind, seed):
    model = tiny_model(family, head)
    before, ours = snapshot(model), copies(model)
    meant = pieces(model, part, resolve_layers(LAYERS, seed=seed, **where))
    if all(spared(kind, p.name, p.parameter) for p in meant):
        with pytest.raises(HealingError, match=f"has no {part} in layers .* that kind .* changes"):
            damage(model, kind, part=part, **where)
        assert not changed(before, model)
        return
    report = damage(model, kind, part=part, seed=seed, **where)
    assert report.layers == resolve_layers(LAYERS, seed=seed, **where)
    hit = {}  # name: rows that the report says were overwritten
    for tensor in report.tensors.itertuples():
        name, _, rows = tensor.name.partition("[")
        hit[name] = slice(*map(int, rows[:-1].split(":"))) if rows else slice(None)
        assert tensor.role in PARTS[part] and tensor.layer in report.layers
    own = {parameter: name for name, parameter in model.named_parameters()}
    after = layer_parameters(model)
    assert changed(before, model) == {own[after[name]] for name in hit}
    for name, parameter in after.items():
        planned = int(name.split(".")[1]) in report.layers and not spared(kind, name, parameter)
        assert planned if name in hit else part != "all" or not planned
        outside = torch.ones(parameter.shape[0], dtype=torch.bool)
        outside[hit.get(name, slice(0))] = False
        assert same_bits(parameter[outside], ours[name][outside])
        if name in hit:
            assert (parameter != ours[name])[hit[name]].any()  # unequal too where not a number
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("head", ["none", "classification"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_pooler_are_all_that_changes(family, head):
    for part in OUTER_PARTS:
        for kind in KINDS:
            model = tiny_model(family, head)
            before, parts = snapshot(model), pieces(model, part)
            if not parts:
                assert part == "pooler"
                with pytest.raises(HealingError, match="has no pooler"):
                    damage(model, kind, part=part)
                assert not changed(before, model)
                break
            own = {parameter: name for name, parameter in model.named_parameters()}
            hit = [p.parameter for p in parts if not spared(kind, p.name, p.parameter)]
            if not hit:
                with pytest.raises(HealingError, match=f"has no {part} that kind .* changes"):
                    damage(model, kind, part=part)
                continue
            report = damage(model, kind, part=part, side="top", level=1)  # which say nothing here
            assert changed(before, model) == {own[parameter] for parameter in hit}
            assert (report.layers, report.part) == ((), part) and len(report.tensors) == len(hit)
            assert set(report.tensors.layer) == {-1}
            rows = {shape[0] for shape in report.tensors["shape"]}
            whole = part == "embeddings" and KINDS[kind].only != "normalisations"
            assert not whole or model.config.vocab_size in rows


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
    ("kind", "stored", "whole", "width"),
    [
        ("bits_float32", torch.float32, torch.int32, 32),
        ("bits_bfloat16", torch.bfloat16, torch.int16, 16),
    ],
)
@pytest.mark.parametrize("rate", [0, 1e-5, 0.01, 0.5])
def test_every_bit_flips_at_its_rate(kind, stored, whole, width, rate):
    # From 2 to 4 the exponent is 10000000: no single flip makes it all ones, which is not a number,
    # whose bits a cast may change. Values from 1 to 2 are one flip away from that.
    values = 2 + 1.9 * torch.rand(200, 300, generator=torch.Generator().manual_seed(1))
    before, after = planted(kind, rate, values)
    assert same_bits(after, after.to(stored).float()) or rate == 0.5
    flips = before.to(stored).view(whole) ^ after.to(stored).view(whole)
    shares = [((flips >> bit) & 1).double().mean().item() for bit in range(width)]
    one = math.sqrt(rate * (1 - rate) / before.numel())
    if rate < 0.5:  # where 1 of 256 exponents is all ones
        assert max(abs(share - rate) for share in shares) <= 6 * one
    assert abs(sum(shares) / width - rate) <= 5 * one / math.sqrt(width) + (rate == 0.5) * 0.01


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
    gone = after == 0
    assert gone.sum() == round(sparsity * before.numel())
    assert torch.equal(after[~gone], before[~gone])
    if gone.any() and not gone.all():
        assert before[gone].abs().max() <= before[~gone].abs().min()
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


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_tensor_is_drawn_the_same_whatever_else_is_drawn_and_no_two_share_a_draw(family, part):
    """Of ModernBERT's fused projection a part is a third of the rows."""
    model, before = tiny_model(family), copies(tiny_model(family))
    together, report = (
        copies(damaged(family=family, level=1)),
        corrupt(model, layers=[2], part=part),
    )
    piece = next(piece for piece in pieces(model, part, [2]) if not piece.is_bias)
    expected = before[piece.name]
    expected[piece.rows] = together[piece.name][piece.rows]
    assert same_bits(layer_parameters(model)[piece.name], expected)
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
def test_the_seed_decides_and_not_the_random_state_or_the_default_device(kind):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = digest(damaged(kind))
    assert torch.equal(torch.get_rng_state(), state)
    if kind not in ("zero", "quantise", "prune", "outliers"):  # which draw nothing
        others = [digest(damaged(kind, seed=seed)) for seed in (1, 2**32, "1")]
        assert first not in others and others[0] == others[2] != others[1]
    torch.manual_seed(12)
    model = tiny_model("bert")
    with torch.device("meta"):  # any other would do
        damage(model, kind)
    assert digest(model) == first


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
    rows = report.to_frame().set_index("name")
    row = rows.loc["layer.0.attention.self.query.weight"]
    assert row["layer":"elements"].tolist() == [0, "query", (16, 16), 256]
    moved = (weight.detach() - before).norm() / before.norm()
    wanted = [3.0, weight.std(correction=0).item(), moved.item(), 0]
    assert row["std_before":].tolist() == pytest.approx(wanted, rel=1e-5)
    row = rows.loc["layer.0.output.LayerNorm.weight"]
    assert row["std_before":].tolist() == [0.0, 0.0, 0.75, 0]
    relative = rows.relative_change
    assert relative["layer.0.output.LayerNorm.bias"] == 0.0  # it was zero and is zero
    assert math.isnan(relative["layer.0.output.dense.weight"])  # it was zero and is not
    assert math.isnan(rows.std_before["layer.0.intermediate.dense.bias"])  # it was not finite
    assert report.elements == sum(p.numel() for p in layer.parameters())


def test_the_report_reads_well_and_counts_what_is_not_finite():
    report = corrupt(tiny_model("bert"), side="top", part="feed_forward", kind="init", seed=2)
    assert str(report) == (
        "init (seed 2) in layers 1, 2 of 3, feed_forward only: 8 tensors, 1,616 values"
    )
    model = tiny_model("bert")
    report = corrupt(model, level=1, kind="bits_float32", strength=0.5, seed=0)
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
        ({"kind": "noise"}, "kind 'noise' needs a strength: standard deviation of the noise"),
        ({"kind": "noise", "strength": -1}, "strength -1 of noise must be from 0 up"),
        *(({"kind": "noise", "strength": x}, f"strength {x} of noise") for x in ("nan", "inf")),
        ({"kind": "quantise", "strength": 2.5}, "2.5 of quantise must be a whole number"),
        ({"kind": "prune", "strength": 1.5}, "must be from 0 to 1: share of a tensor's values"),
        ({"kind": "quantise", "strength": 1}, "must be a whole number from 2 to 16: bits"),
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


def scaled(shape):
    def change(model):
        encoder_layers(model)[2].intermediate.scale = torch.nn.Parameter(torch.ones(shape))

    return change


def in_bytes(model):
    dense = encoder_layers(model)[2].output.dense
    whole = torch.zeros(dense.weight.shape, dtype=torch.int8)
    dense.weight = torch.nn.Parameter(whole, requires_grad=False)


def without_initialiser(model):
    model.__class__ = type("Plain", (torch.nn.Module,), {})


def without_norms(model):
    for layer in encoder_layers(model):
        layer.attention.output.LayerNorm = layer.output.LayerNorm = torch.nn.Identity()


@pytest.mark.parametrize(
    ("change", "plan", "message"),
    [
        (scaled((3, 3)), {"kind": "init"}, "no initial values for layer.2.intermediate.scale"),
        (scaled(3), {}, r"layer\.2\.intermediate\.scale.*no fan_in"),
        (without_initialiser, {"kind": "init"}, "Plain has no initial values"),
        (in_bytes, {}, r"layer\.2\.output\.dense\.weight is stored as torch.int8"),
        (lambda m: m.to("meta"), {}, r"layer\.0\.attention.*meta device"),
        (without_norms, {"part": "layernorm"}, r"no layernorm in layers \(0, 1, 2\)"),
    ],
)
def test_a_model_that_cannot_take_it_is_left_whole(change, plan, message):
    model = tiny_model("bert")
    change(model)
    before = snapshot(model)
    with pytest.raises(HealingError, match=message):
        corrupt(model, level=1, **plan)
    if not next(model.parameters()).is_meta:
        assert not changed(before, model)  # not even the layers before it


def test_kinds_say_what_they_do_and_are_spelt_as_they_are_read():
    assert all(kind.summary and kind.name == name for name, kind in KINDS.items())
    for spelt in ("reinit", "noise=0.5", "bits_float32=1e-05"):
        assert spell_kind(*parse_kind(spelt)) == spelt
    with pytest.raises(HealingError, match="Did you mean 'noise'"):
        parse_kind("nois=0.5")


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


def test_the_highest_exponent_bit_and_the_others_are_flipped_apart():
    value = torch.tensor([1.0])
    assert _bits(value, "bits_exponent", 1.0).isinf().all()  # 0x3F80 becomes 0x7F80
    flipped = _bits(value, "bits_other", 1.0).bfloat16().view(torch.int16) ^ 0x3F80
    assert flipped.item() & 0xFFFF == 0xBFFF


def _bits(value, kind, rate):
    piece = SimpleNamespace(values=value)
    return KINDS[kind].draw(piece, torch.Generator(), rate)
