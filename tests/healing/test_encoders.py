"""Layers, parts and plans are found from the model: what is named is what is there."""

import json
import subprocess
import sys

import pytest
import torch
import transformers as hf
from families import FAMILIES, HEADS, LAYERS, WIDTH, tiny_batch, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from healing_utils.base.errors import HealingError
from healing_utils.healing.encoders import (
    PARTS,
    encoder_layers,
    layer_parameters,
    parse_layers,
    parse_level,
    part_pieces,
    resolve_layers,
)

PART_NAMES = ("query", "key", "value", "attention_output", "feed_forward", "layernorm")
# The weights of each family's parts, written down by hand from the published architectures.
WEIGHTS = {
    "bert": (
        "attention.self.query attention.self.key attention.self.value attention.output.dense",
        "intermediate.dense output.dense",
        "attention.output.LayerNorm output.LayerNorm",
    ),
    "distilbert": (
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin",
        "ffn.lin1 ffn.lin2",
        "sa_layer_norm output_layer_norm",
    ),
    "xlnet": (
        "rel_attn.q rel_attn.k rel_attn.v rel_attn.o",
        "ff.layer_1 ff.layer_2",
        "rel_attn.layer_norm ff.layer_norm",
    ),
    "deberta-v2": (
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj "
        "attention.output.dense",
        "intermediate.dense output.dense",
        "attention.output.LayerNorm output.LayerNorm",
    ),
    "mpnet": (
        "attention.attn.q attention.attn.k attention.attn.v attention.attn.o",
        "intermediate.dense output.dense",
        "attention.LayerNorm output.LayerNorm",
    ),
    "modernbert": (
        "attn.Wqkv attn.Wqkv attn.Wqkv attn.Wo",
        "mlp.Wi mlp.Wo",
        "attn_norm mlp_norm",
    ),
}
WEIGHTS["roberta"] = WEIGHTS["electra"] = WEIGHTS["bert"]


def region(layer, piece):
    return layer.get_parameter(piece.name)[slice(None) if piece.rows is None else piece.rows]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_the_order_in_which_they_run_whatever_the_head(family, head):
    model = tiny_model(family, head)
    layers = encoder_layers(model)
    ran = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    model(**tiny_batch())
    assert ran == list(range(LAYERS)) and len(layers) == LAYERS
    ours = layer_parameters(model)
    shapes = {name: p.shape for name, p in ours.items()}
    assert shapes == {n: p.shape for n, p in layer_parameters(tiny_model(family)).items()}
    assert all(name.startswith("layer.") for name in ours)
    inside = {id(parameter) for parameter in ours.values()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    assert any("embed" in name for name in outside)
    assert not any(".layer.1." in name or ".layers.1." in name for name in outside)


def tied(model):
    layers = model.encoder.layer
    layers[2].intermediate.dense.weight = layers[0].intermediate.dense.weight
    return model


def with_gadget(model):
    model.encoder.layer[1].attention.self.gadget = torch.nn.Linear(16, 16)
    return model


def decoder():
    config = hf.BertConfig(**tiny_model("bert").config.to_diff_dict())
    config.is_decoder = config.add_cross_attention = True
    return hf.BertModel(config)


def bart():
    sizes = {"vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2}
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return hf.BartModel(hf.BartConfig(**sizes))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        *((lambda h=h: tiny_model("albert", h), "share weights, as in ALBERT") for h in HEADS),
        (lambda: torch.nn.Sequential(tiny_model("albert")), "share weights"),
        (lambda: tied(tiny_model("bert")), r"layer\.0\.intermediate.*layer\.2\.intermediate"),
        (lambda: torch.nn.Linear(3, 3), "no stack of encoder layers"),
        (lambda: "bert-base-uncased", "expected a torch model, got str"),
        (bart, r"several stacks.*encoder\.layers.*decoder\.layers"),
        (lambda: hf.GPT2Model(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2)), "GPT2Model"),
        (decoder, "cross-attention"),
        (lambda: with_gadget(tiny_model("bert")), r"cannot tell.*attention\.self\.gadget\.weight"),
    ],
)
def test_models_without_one_encoder_are_refused_with_the_reason(made, message):
    with pytest.raises(HealingError, match=message):
        encoder_layers(made())


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_hold_what_the_architecture_says_and_make_up_a_layer(family):
    attention, *others = WEIGHTS[family]
    for layer in encoder_layers(tiny_model(family))[1:]:
        for part, names in zip(PART_NAMES, [*attention.split(), *others], strict=True):
            pieces = [p.name for p in part_pieces(layer, part) if not p.is_bias]
            assert [name.removesuffix(".weight") for name in pieces] == names.split(), part
        names = [piece.name for piece in part_pieces(layer, "all")]
        thirds = [
            piece.name
            for part in ("attention", "feed_forward", "layernorm")
            for piece in part_pieces(layer, part)
        ]
        assert sorted(names) == sorted(thirds) == sorted(n for n, _ in layer.named_parameters())
        assert all(("bias" in piece.name) == piece.is_bias for piece in part_pieces(layer))
        assert {piece.role for piece in part_pieces(layer)} <= set(PARTS["all"])
        output = next(p for p in part_pieces(layer, "attention_output") if not p.is_bias)
        assert region(layer, output).numel() == WIDTH * WIDTH


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silenced", ["value", "attention_output"])
def test_silencing_value_or_output_makes_query_and_key_irrelevant(family, silenced):
    """What the found parts do: attention weights matter only while there are values to weigh."""

    def output(zero, shift):
        model = tiny_model(family)
        layer = encoder_layers(model)[1]
        with torch.no_grad():
            for piece in part_pieces(layer, zero) if zero else []:
                region(layer, piece).zero_()
            for piece in part_pieces(layer, shift) if shift else []:
                # A constant added to every key would cancel in the softmax: scale instead.
                region(layer, piece).mul_(3.0)
            return model(**tiny_batch())[0]

    for part in ("query", "key"):
        assert (output(None, None) - output(None, part)).abs().max() > 1e-3
        assert torch.allclose(output(silenced, None), output(silenced, part), atol=1e-6)
    assert (output(silenced, None) - output(None, None)).abs().max() > 1e-3


def test_fused_projection_is_sliced_where_its_layout_is_known():
    layer = encoder_layers(tiny_model("modernbert"))[0]
    rows = [part_pieces(layer, part)[0].rows for part in ("query", "key", "value")]
    assert rows == [slice(0, 16), slice(16, 32), slice(32, 48)]
    # The same matrix under a name whose layout nobody has told us.
    layer.attn.query_key_value = layer.attn.Wqkv
    del layer.attn.Wqkv
    with pytest.raises(HealingError, match="layout that is not known.*part 'attention'"):
        part_pieces(layer, "key")
    assert "attn.query_key_value.weight" in [p.name for p in part_pieces(layer, "attention")]
    with pytest.raises(HealingError, match="Did you mean 'feed_forward'"):
        part_pieces(layer, "feedforward")
    with pytest.raises(HealingError, match="not an encoder layer"):
        part_pieces(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("n_layers", "level", "count"),
    [
        (12, 1 / 6, 2), (6, 1 / 6, 1), (6, 0.25, 2), (12, 0.25, 3), (6, 1 / 3, 2), (6, 0.5, 3),
        (3, 1 / 6, 1), (5, 0.1, 1), (10, 0.15, 2), (24, 1 / 6, 4), (7, 0.5, 4), (6, "1/6", 1),
        (6, "0.5", 3), (6, 1, 6), (6, "1", 6), (6, 0.92, 6), (2, 0.74, 1), (2, 0.75, 2),
    ],
)  # fmt: skip
def test_levels_round_half_up_to_whole_layers(n_layers, level, count):
    assert resolve_layers(n_layers, "bottom", level) == tuple(range(count))
    assert resolve_layers(n_layers, "top", level) == tuple(range(n_layers - count, n_layers))


@pytest.mark.parametrize(
    ("side", "level", "message"),
    [
        ("bottom", 0.05, "rounds to no layer at all; the smallest level here is"),
        ("top", 1e-9, "rounds to no layer"),
        ("botom", 0.5, "Did you mean 'bottom'"),
    ],
)
def test_a_plan_without_layers_is_an_error(side, level, message):
    with pytest.raises(HealingError, match=message):
        resolve_layers(6, side, level)


def test_random_layers_are_as_many_and_drawn_by_the_seed():
    drawn = {seed: resolve_layers(12, "random", "1/2", seed=seed) for seed in range(40)}
    assert all(len(set(layers)) == 6 for layers in drawn.values())
    assert len(set(drawn.values())) > 30
    counts = [sum(layer in layers for layers in drawn.values()) for layer in range(12)]
    assert 8 < min(counts) and max(counts) < 32  # 20 expected, four standard errors are 12.6
    assert resolve_layers(12, "random", "1/2", seed=3) == drawn[3]
    with pytest.raises(HealingError, match="of 2 layers any 1 is the bottom or the top one"):
        resolve_layers(2, "random", "1/2")


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


@pytest.mark.parametrize(
    "level", [0, -0.5, 1.01, "2/1", "1/0", "half", "", None, True, float("nan"), float("inf"), [1]]
)
def test_bad_levels_are_refused(level):
    with pytest.raises(HealingError, match="level"):
        parse_level(level)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["bottom", "top"]))
def test_a_fraction_means_the_same_as_text_and_as_number(n, m, side):
    numerator, denominator = sorted((n, m))
    text = f"{numerator}/{denominator}"
    assert parse_level(text) == numerator / denominator
    try:
        expected = resolve_layers(12, side, text)
    except HealingError:
        assert numerator * 24 < denominator
    else:
        assert resolve_layers(12, side, numerator / denominator) == expected
        assert abs(len(expected) - 12 * numerator / denominator) <= 0.5


@pytest.mark.parametrize(
    ("given_layers", "expected"),
    [
        ([0, 2], (0, 2)), ((4, 1), (1, 4)), ("[0,2]", (0, 2)), ("0, 2", (0, 2)), ("(3,)", (3,)),
        ("5", (5,)), (3, (3,)), (range(2), (0, 1)), (torch.tensor([1, 2]).numpy(), (1, 2)),
        (None, None), ("", None), ("none", None), ("null", None),
    ],
)  # fmt: skip
def test_named_layers_override_side_and_level(given_layers, expected):
    assert parse_layers(given_layers) == expected
    assert resolve_layers(6, "top", 0.5, given_layers) == (expected or (3, 4, 5))


@pytest.mark.parametrize(
    ("given_layers", "message"),
    [
        ([6], "layer 6 does not exist: the encoder has layers 0 to 5"),
        ([-1], "layer -1 does not exist"),
        ([1, 1], "names a layer twice"),
        *((empty, "empty") for empty in ([], "[]")),
        *((bad, "whole numbers") for bad in ([1.0], [True], "[0, x]", "[[0]]", ["0"], 0.5)),
    ],
)
def test_bad_layers_are_refused(given_layers, message):
    with pytest.raises(HealingError, match=message):
        resolve_layers(6, layers=given_layers)


def test_plans_are_resolved_without_torch():
    code = (
        "import sys, json; from healing_utils.healing.encoders import resolve_layers;"
        "print(json.dumps([resolve_layers(6, 'top', '1/3'), 'torch' in sys.modules]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[4, 5], False]
