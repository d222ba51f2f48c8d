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

from healing_utils.corruption import KINDS, CorruptionReport, corrupt
from healing_utils.encoders import PARTS, encoder_layers, layer_parameters, resolve_layers
from healing_utils.errors import HealingError


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
    side=st.sampled_from(["bottom", "top"]),
    level=st.sampled_from([1 / 3, 0.5, 2 / 3, 1.0]),
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 2**40),
)
@settings(max_examples=6, deadline=None)
def test_exactly_the_planned_tensors_change(family, head, side, level, kind, seed):
    model = tiny_model(family, head)
    before, identities = snapshot(model), [id(parameter) for parameter in model.parameters()]
    report = corrupt(model, side, level, kind, seed)

    planned = resolve_layers(LAYERS, side, level)
    names = [n for n in layer_parameters(model) if int(n.split(".")[1]) in planned]
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
@settings(max_examples=6, deadline=None)
def test_a_part_of_chosen_layers_is_all_that_changes(family, layers, part, kind):
    model = tiny_model(family)
    before = {name: p.detach().clone() for name, p in layer_parameters(model).items()}
    rest = snapshot(model)
    report = corrupt(model, layers=layers, part=part, kind=kind, seed=1)
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
            assert (parameter != before[name])[hit[name]].any()
    assert changed(rest, model) == names_in_model(model, hit)


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


@pytest.mark.parametrize("family", FAMILIES)
def test_reinit_follows_the_papers_rule(family):
    model = tiny_model(family)
    report = corrupt(model, level=1, kind="reinit", seed=3)
    parameters = layer_parameters(model)
    drawn = []
    for tensor in report.tensors:
        values = parameters[tensor.name].detach()
        if tensor.name.endswith("bias"):
            assert (values == 0).all()
        elif tensor.role == "layernorm":
            assert (values == 1).all()
        else:
            bound = math.sqrt(6 / math.prod(values.shape[1:]))
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


def test_reinit_writes_what_torchs_own_function_draws():
    model = tiny_bert(seed=5)
    name = "layer.0.attention.self.query.weight"
    seed = int.from_bytes(hashlib.blake2b(f"5:{name}".encode(), digest_size=4).digest(), "big")
    generator = torch.Generator().manual_seed(seed)
    expected = torch.nn.init.kaiming_uniform_(torch.empty(16, 16), generator=generator)
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
        corrupt(model, kind=kind)
        broken = model(**tiny_batch())[0]
    assert torch.isfinite(broken).all()
    assert (broken - intact).abs().max() > 0.01


# --- The same damage everywhere -------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_same_seed_same_damage_other_seed_other_damage(kind):
    digests = [digest(tiny_bert(kind=kind, seed=seed)) for seed in (0, 0, 1, 2**32, "1")]
    assert digests[0] == digests[1]
    assert len({digests[0], digests[2], digests[3]}) == 3
    assert digests[4] == digests[2]


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_makes_no_difference(family, kind):
    plain, headed = tiny_model(family, "none", 1), tiny_model(family, "classification", 2)
    corrupt(plain, level=1, kind=kind, seed=7)
    corrupt(headed, level=1, kind=kind, seed=7)
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
    corrupt(reference, kind=kind)
    corrupt(model, kind=kind)
    ours = layer_parameters(model)
    for name, values in layer_parameters(reference).items():
        assert same_bits(ours[name].detach(), values.detach().to(dtype))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_random_state_is_left_alone_and_does_not_matter(kind):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = tiny_bert(kind=kind)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    assert digest(tiny_bert(kind=kind)) == digest(first)


def test_another_process_breaks_the_model_in_the_same_way():
    code = (
        "import torch, test_corruption as t;"
        "torch.set_num_threads(2); torch.manual_seed(99);"
        "print(*[t.digest(t.tiny_bert(kind=k, seed=4)) for k in sorted(t.KINDS)])"
    )
    here = Path(__file__).parent
    # A hash of Python's own would be salted differently in that process.
    environment = dict(
        os.environ, PYTHONHASHSEED="5", PYTHONPATH=os.pathsep.join([str(here), str(here.parent)])
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert ran.stdout.split() == [digest(tiny_bert(kind=kind, seed=4)) for kind in sorted(KINDS)]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_default_device_makes_no_difference(kind):
    model = tiny_model("bert")
    with torch.device("meta"):  # any other would do
        corrupt(model, kind=kind)
    assert digest(model) == digest(tiny_bert(kind=kind))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_gpu_gets_the_same_values(kind):
    model = tiny_model("bert").to("cuda")
    state = torch.cuda.get_rng_state()
    corrupt(model, kind=kind)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert digest(model.cpu()) == digest(tiny_bert(kind=kind))


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
        ({"part": "atention"}, "unknown part of a layer.*Did you mean 'attention'"),
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
    from healing_utils import corruption

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
