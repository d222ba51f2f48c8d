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
    encoder_parts,
    layer_parameters,
    parse_layers,
    parse_level,
    part_pieces,
    resolve_layers,
)

# The weights of each family's parts, written down by hand from the published architectures.
WEIGHTS = {
    "bert": {
        "query": ["attention.self.query.weight"],
        "key": ["attention.self.key.weight"],
        "value": ["attention.self.value.weight"],
        "attention_output": ["attention.output.dense.weight"],
        "feed_forward": ["intermediate.dense.weight", "output.dense.weight"],
        "layernorm": ["attention.output.LayerNorm.weight", "output.LayerNorm.weight"],
    },
    "distilbert": {
        "query": ["attention.q_lin.weight"],
        "key": ["attention.k_lin.weight"],
        "value": ["attention.v_lin.weight"],
        "attention_output": ["attention.out_lin.weight"],
        "feed_forward": ["ffn.lin1.weight", "ffn.lin2.weight"],
        "layernorm": ["sa_layer_norm.weight", "output_layer_norm.weight"],
    },
    "xlnet": {
        "query": ["rel_attn.q"],
        "key": ["rel_attn.k"],
        "value": ["rel_attn.v"],
        "attention_output": ["rel_attn.o"],
        "feed_forward": ["ff.layer_1.weight", "ff.layer_2.weight"],
        "layernorm": ["rel_attn.layer_norm.weight", "ff.layer_norm.weight"],
    },
    "deberta-v2": {
        "query": ["attention.self.query_proj.weight"],
        "key": ["attention.self.key_proj.weight"],
        "value": ["attention.self.value_proj.weight"],
        "attention_output": ["attention.output.dense.weight"],
        "feed_forward": ["intermediate.dense.weight", "output.dense.weight"],
        "layernorm": ["attention.output.LayerNorm.weight", "output.LayerNorm.weight"],
    },
    "mpnet": {
        "query": ["attention.attn.q.weight"],
        "key": ["attention.attn.k.weight"],
        "value": ["attention.attn.v.weight"],
        "attention_output": ["attention.attn.o.weight"],
        "feed_forward": ["intermediate.dense.weight", "output.dense.weight"],
        "layernorm": ["attention.LayerNorm.weight", "output.LayerNorm.weight"],
    },
    "modernbert": {
        "query": ["attn.Wqkv.weight"],
        "key": ["attn.Wqkv.weight"],
        "value": ["attn.Wqkv.weight"],
        "attention_output": ["attn.Wo.weight"],
        "feed_forward": ["mlp.Wi.weight", "mlp.Wo.weight"],
        "layernorm": ["attn_norm.weight", "mlp_norm.weight"],
    },
}
WEIGHTS["roberta"] = WEIGHTS["electra"] = WEIGHTS["bert"]


def region(layer, piece):
    return layer.get_parameter(piece.name)[slice(None) if piece.rows is None else piece.rows]


# --- Finding the layers ---------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_in_the_order_in_which_they_run(family, head):
    model = tiny_model(family, head)
    layers = encoder_layers(model)
    assert len(layers) == LAYERS
    ran = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    model(**tiny_batch())
    assert ran == list(range(LAYERS))


@pytest.mark.parametrize("family", FAMILIES)
def test_names_do_not_depend_on_the_head(family):
    shapes = [
        {name: p.shape for name, p in layer_parameters(tiny_model(family, head)).items()}
        for head in HEADS
    ]
    assert shapes[0] == shapes[1] == shapes[2]
    assert all(name.startswith("layer.") for name in shapes[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_pooler_and_head_are_no_part_of_the_layers(family):
    model = tiny_model(family, "classification")
    ours = {id(parameter) for parameter in layer_parameters(model).values()}
    outside = [name for name, p in model.named_parameters() if id(p) not in ours]
    assert any("embed" in name for name in outside)
    assert any(name.startswith(("classifier", "logits_proj")) for name in outside)
    assert not any(".layer.1." in name or ".layers.1." in name for name in outside)


def test_shared_layers_are_refused_with_the_reason():
    for head in HEADS:
        with pytest.raises(HealingError, match="share weights, as in ALBERT"):
            encoder_layers(tiny_model("albert", head))
    wrapped = torch.nn.Sequential(tiny_model("albert"))
    with pytest.raises(HealingError, match="share weights"):
        encoder_layers(wrapped)


def test_one_tied_matrix_between_layers_is_refused():
    model = tiny_model("bert")
    layers = encoder_layers(model)
    layers[2].intermediate.dense.weight = layers[0].intermediate.dense.weight
    with pytest.raises(HealingError, match=r"layer\.0\.intermediate.*layer\.2\.intermediate"):
        encoder_layers(model)


def test_models_without_one_encoder_are_refused():
    with pytest.raises(HealingError, match="no stack of encoder layers"):
        encoder_layers(torch.nn.Linear(3, 3))
    with pytest.raises(HealingError, match="expected a torch model, got str"):
        encoder_layers("bert-base-uncased")
    both = hf.BartConfig(
        vocab_size=60, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(HealingError, match=r"several stacks.*encoder\.layers.*decoder\.layers"):
        encoder_layers(hf.BartModel(both))
    fused = hf.GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)
    with pytest.raises(HealingError, match="GPT2Model"):
        encoder_layers(hf.GPT2Model(fused))


def test_decoder_layers_and_unknown_parts_are_refused():
    config = hf.BertConfig(**tiny_model("bert").config.to_diff_dict())
    config.is_decoder = config.add_cross_attention = True
    with pytest.raises(HealingError, match="cross-attention"):
        encoder_layers(hf.BertModel(config))
    model = tiny_model("bert")
    model.encoder.layer[1].attention.self.gadget = torch.nn.Linear(16, 16)
    with pytest.raises(HealingError, match=r"cannot tell.*attention\.self\.gadget\.weight"):
        encoder_layers(model)


# --- Finding the parts ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_hold_the_weights_that_the_architecture_says(family):
    layer = encoder_layers(tiny_model(family))[1]
    for part, names in WEIGHTS[family].items():
        found = [piece.name for piece in part_pieces(layer, part) if not piece.is_bias]
        assert found == names, part


@pytest.mark.parametrize("family", FAMILIES)
def test_three_parts_make_up_a_layer_without_overlap(family):
    for layer in encoder_layers(tiny_model(family)):
        names = [piece.name for piece in part_pieces(layer, "all")]
        thirds = [
            piece.name
            for part in ("attention", "feed_forward", "layernorm")
            for piece in part_pieces(layer, part)
        ]
        assert sorted(names) == sorted(thirds)
        assert sorted(names) == sorted(name for name, _ in layer.named_parameters())
        assert {piece.role for piece in encoder_parts(layer)} <= set(PARTS["all"])


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_are_told_from_weights(family):
    layer = encoder_layers(tiny_model(family))[1]
    weights = [piece for piece in part_pieces(layer, "attention_output") if not piece.is_bias]
    assert region(layer, weights[0]).numel() == WIDTH * WIDTH
    assert all(("bias" in piece.name) == piece.is_bias for piece in encoder_parts(layer))


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


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "mpnet"])
def test_query_and_key_are_not_mixed_up(family):
    """A constant added to every key cancels in the softmax; added to every query it does not."""

    def output(part):
        model = tiny_model(family)
        layer = encoder_layers(model)[1]
        with torch.no_grad():
            for piece in part_pieces(layer, part) if part else []:
                if piece.is_bias:
                    region(layer, piece).add_(1.0)
            return model(**tiny_batch())[0]

    assert torch.allclose(output(None), output("key"), atol=1e-5)
    assert (output(None) - output("query")).abs().max() > 1e-3


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


def test_unknown_part_names_the_nearest():
    layer = encoder_layers(tiny_model("bert"))[0]
    with pytest.raises(HealingError, match="Did you mean 'feed_forward'"):
        part_pieces(layer, "feedforward")
    with pytest.raises(HealingError, match="not an encoder layer"):
        encoder_parts(torch.nn.Linear(2, 2))


# --- Levels and layers ----------------------------------------------------------------------------


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


def test_level_that_gives_no_layer_is_an_error():
    with pytest.raises(HealingError, match="rounds to no layer at all; the smallest level here is"):
        resolve_layers(6, "bottom", 0.05)
    with pytest.raises(HealingError, match="rounds to no layer"):
        resolve_layers(6, "top", 1e-9)


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
    ],
)  # fmt: skip
def test_named_layers_override_side_and_level(given_layers, expected):
    assert resolve_layers(6, "top", 0.5, given_layers) == expected


@pytest.mark.parametrize("nothing", [None, "", "none", "null"])
def test_no_layers_named_leaves_side_and_level(nothing):
    assert parse_layers(nothing) is None
    assert resolve_layers(6, "top", 0.5, nothing) == (3, 4, 5)


@pytest.mark.parametrize(
    ("given_layers", "message"),
    [
        ([6], "layer 6 does not exist: the encoder has layers 0 to 5"),
        ([-1], "layer -1 does not exist"),
        ([1, 1], "names a layer twice"),
        ([], "empty"),
        ("[]", "empty"),
        ([1.0], "whole numbers"),
        ([True], "whole numbers"),
        ("[0, x]", "whole numbers"),
        ("[[0]]", "whole numbers"),
        (["0"], "whole numbers"),
        (0.5, "whole numbers"),
    ],
)
def test_bad_layers_are_refused(given_layers, message):
    with pytest.raises(HealingError, match=message):
        resolve_layers(6, layers=given_layers)


def test_unknown_side_names_the_nearest():
    with pytest.raises(HealingError, match="Did you mean 'bottom'"):
        resolve_layers(6, "botom", 0.5)


def test_plans_are_resolved_without_torch():
    code = (
        "import sys, json; from healing_utils.healing.encoders import resolve_layers;"
        "print(json.dumps([resolve_layers(6, 'top', '1/3'), 'torch' in sys.modules]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[4, 5], False]
