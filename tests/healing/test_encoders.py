"""Layers, parts and plans are found from the model: what is named is what is there."""

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
    parse_layers,
    parse_level,
    pieces,
    resolve_layers,
)

PART_NAMES = ("query", "key", "value", "attention_output", "feed_forward", "layernorm")
# The weights of each family's parts, written down by hand from the published architectures.
_OUTER = "intermediate.dense output.dense | attention.output.LayerNorm output.LayerNorm"
WEIGHTS = {
    "bert": "attention.self.query | attention.self.key | attention.self.value | "
    f"attention.output.dense | {_OUTER}",
    "deberta-v2": "attention.self.query_proj | attention.self.key_proj | "
    f"attention.self.value_proj | attention.output.dense | {_OUTER}",
    "distilbert": "attention.q_lin | attention.k_lin | attention.v_lin | attention.out_lin | "
    "ffn.lin1 ffn.lin2 | sa_layer_norm output_layer_norm",
    "xlnet": "rel_attn.q | rel_attn.k | rel_attn.v | rel_attn.o | ff.layer_1 ff.layer_2 | "
    "rel_attn.layer_norm ff.layer_norm",
    "mpnet": "attention.attn.q | attention.attn.k | attention.attn.v | attention.attn.o | "
    "intermediate.dense output.dense | attention.LayerNorm output.LayerNorm",
    "modernbert": "attn.Wqkv | attn.Wqkv | attn.Wqkv | attn.Wo | mlp.Wi mlp.Wo | "
    "attn_norm mlp_norm",
}
WEIGHTS["roberta"] = WEIGHTS["electra"] = WEIGHTS["bert"]


def layer_parameters(model):
    """Every parameter of the layers by a name that does not depend on the head."""
    return {piece.name: piece.parameter for piece in pieces(model)}


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
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    assert inside == {id(parameter) for parameter in ours.values()}


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
    model = tiny_model(family)
    for index in (1, 2):
        for part, names in zip(PART_NAMES, WEIGHTS[family].split(" | "), strict=True):
            found = [p.path for p in pieces(model, part, [index]) if not p.is_bias]
            assert [path.removesuffix(".weight") for path in found] == names.split(), part
        whole = pieces(model, "all", [index])
        parts = ("attention", "feed_forward", "layernorm")
        thirds = [piece.path for part in parts for piece in pieces(model, part, [index])]
        own = sorted(name for name, _ in encoder_layers(model)[index].named_parameters())
        assert sorted(piece.path for piece in whole) == sorted(thirds) == own
        assert all(("bias" in piece.path) == piece.is_bias for piece in whole)
        assert {piece.role for piece in whole} <= set(PARTS["all"])
        output = next(p for p in pieces(model, "attention_output", [index]) if not p.is_bias)
        assert output.values.numel() == WIDTH * WIDTH


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("silenced", ["value", "attention_output"])
def test_silencing_value_or_output_makes_query_and_key_irrelevant(family, silenced):
    """What the found parts do: attention weights matter only while there are values to weigh."""

    def output(zero, shift):
        model = tiny_model(family)
        with torch.no_grad():
            for part, factor in ((zero, 0.0), (shift, 3.0)):
                # A constant added to every key would cancel in the softmax: scale instead.
                for piece in pieces(model, part, [1]) if part else []:
                    piece.parameter[piece.rows].mul_(factor)
            return model(**tiny_batch())[0]

    for part in ("query", "key"):
        assert (output(None, None) - output(None, part)).abs().max() > 1e-3
        assert torch.allclose(output(silenced, None), output(silenced, part), atol=1e-6)
    assert (output(silenced, None) - output(None, None)).abs().max() > 1e-3


def test_fused_projection_is_sliced_where_its_layout_is_known():
    model = tiny_model("modernbert")
    rows = [pieces(model, part, [0])[0].rows for part in ("query", "key", "value")]
    assert rows == [slice(0, 16), slice(16, 32), slice(32, 48)]
    # The same matrix under a name whose layout nobody has told us.
    attention = encoder_layers(model)[0].attn
    attention.query_key_value = attention.Wqkv
    del attention.Wqkv
    with pytest.raises(HealingError, match="cannot be divided.*part 'attention'"):
        pieces(model, "key")
    assert "attn.query_key_value.weight" in [p.path for p in pieces(model, "attention")]
    with pytest.raises(HealingError, match="Did you mean 'feed_forward'"):
        pieces(model, "feedforward")


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
    ("plan", "message"),
    [
        ({"level": 0.05}, "rounds to no layer; the smallest level here is"),
        ({"level": 1e-9, "side": "top"}, "rounds to no layer"),
        ({"side": "botom"}, "Did you mean 'bottom'"),
        ({"layers": [6]}, "layer 6 does not exist: they are 0 to 5"),
        ({"layers": [-1]}, "layer -1 does not exist"),
        ({"layers": [1, 1]}, "names a layer twice"),
        *(({"layers": empty}, "empty") for empty in ([], "[]")),
        *(
            ({"layers": bad}, "whole numbers")
            for bad in ([1.0], [True], "[0, x]", "[[0]]", ["0"], 0.5)
        ),
    ],
)
def test_a_plan_that_names_no_layers_of_the_model_is_refused(plan, message):
    with pytest.raises(HealingError, match=message):
        resolve_layers(6, **plan)
