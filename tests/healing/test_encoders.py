"""Layers, parts and plans are found from the model: what is named is what is there."""

import pytest
import torch
import transformers as hf
from families import FAMILIES, HEADS, LAYERS, OTHERS, tiny_batch, tiny_model
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
# A fused projection is nobody's part; it stands with what beside it is attention's alone.
WEIGHTS["deberta"] = f"! | ! | ! | attention.output.dense | {_OUTER}"
WEIGHTS["squeezebert"] = (
    "attention.query | attention.key | attention.value | post_attention.conv1d | "
    "intermediate.conv1d output.conv1d | post_attention.layernorm output.layernorm"
)
for _family in ("roberta", "electra", "roformer", "rembert", "yoso", "mra"):
    WEIGHTS[_family] = WEIGHTS["bert"]
# What attention has beside these, and what turns ids into the first layer's input.
FUSED = {"deberta": "in_proj pos_proj pos_q_proj", "xlnet": "r seg_embed", "modernbert": "Wqkv"}
_TABLES = "word_embeddings position_embeddings LayerNorm"
TABLES = {
    "distilbert": _TABLES, "mpnet": _TABLES, "deberta": _TABLES, "xlnet": "word_embedding",
    "deberta-v2": "word_embeddings LayerNorm", "modernbert": "tok_embeddings norm",
    "roformer": "word_embeddings token_type_embeddings LayerNorm",
    "electra": f"{_TABLES} token_type_embeddings embeddings_project",
    "rembert": f"{_TABLES} token_type_embeddings embedding_hidden_mapping_in",
}  # fmt: skip


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


def small(family, **given):
    """Not an encoder."""
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 24, "max_position_embeddings": 40, **given}  # fmt: skip
    return hf.AutoModel.from_config(getattr(hf, f"{family}Config")(**sizes))


T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
CROSS = {"is_decoder": True, "add_cross_attention": True}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        *((lambda h=h: tiny_model("albert", h), "share weights, as in ALBERT") for h in HEADS),
        (lambda: torch.nn.Sequential(tiny_model("albert")), "share weights"),
        (lambda: tied(tiny_model("bert")), "share weights"),
        (lambda: torch.nn.Linear(3, 3), "no stack of encoder layers"),
        (lambda: "bert-base-uncased", "expected a torch model, got str"),
        (lambda: small("T5", **T5), r"several stacks.*encoder\.block.*decoder\.block"),
        (lambda: small("GPT2", n_embd=16, n_layer=2, n_head=2), "GPT2Model has no stack"),
        (lambda: small("Bert", **CROSS), "cross-attention"),
        (lambda: with_gadget(tiny_model("bert")), r"cannot tell.*attention\.self\.gadget\.weight"),
        *(
            (lambda f=f, g=g: small(f, **g), f"{f}Model is a decoder, whose tokens see only earl")
            for f, g in {
                "Llama": {}, "Qwen2": {"num_key_value_heads": 2}, "OPT": {"ffn_dim": 24},
                "GPTNeoX": {}, "Bloom": {}, "Bert": {"is_decoder": True},
            }.items()
        ),
    ],
)  # fmt: skip
def test_models_without_one_encoder_are_refused_with_the_reason(made, message):
    with pytest.raises(HealingError, match=message):
        encoder_layers(made())


def weights(model, part, layers=None):
    found = [p.name for p in pieces(model, part, layers) if not p.is_bias]
    return [name.removesuffix(".weight") for name in found]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_parts_hold_what_the_architecture_says_and_make_up_a_layer(family):
    model = tiny_model(family)
    tables = TABLES.get(family, f"{_TABLES} token_type_embeddings").split()
    assert sorted(name.split(".")[-1] for name in weights(model, "embeddings")) == sorted(tables)
    for index in (1, 2):
        attention = {f"layer.{index}.{name}" for name in FUSED.get(family, "").split()}
        for part, names in zip(PART_NAMES, WEIGHTS[family].split(" | "), strict=True):
            if names == "!":
                with pytest.raises(HealingError, match="cannot be divided: use part 'attention'"):
                    pieces(model, part, [index])
                continue
            wanted = [f"layer.{index}.{name}" for name in names.split()]
            assert weights(model, part, [index]) == wanted, part
            attention |= set(wanted) if part in PART_NAMES[:4] else set()
        found = weights(model, "attention", [index])
        assert {n.split(".")[-1] for n in found} == {n.split(".")[-1] for n in attention}
        whole = pieces(model, "all", [index])
        parts = ("attention", "feed_forward", "layernorm")
        thirds = [piece.path for part in parts for piece in pieces(model, part, [index])]
        own = sorted(name for name, _ in encoder_layers(model)[index].named_parameters())
        assert sorted(piece.path for piece in whole) == sorted(thirds) == own
        assert all(("bias" in piece.path) == piece.is_bias for piece in whole)
        assert {piece.role for piece in whole} <= set(PARTS["all"])
    with pytest.raises(HealingError, match="Did you mean 'feed_forward'"):
        pieces(model, "feedforward")


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


def test_random_layers_are_drawn_by_the_seed():
    drawn = [resolve_layers(12, "random", "1/2", seed=seed) for seed in range(40)]
    assert len(set(drawn)) > 30 and resolve_layers(12, "random", "1/2", seed=3) == drawn[3]
    counts = [sum(layer in layers for layers in drawn) for layer in range(12)]
    assert 8 < min(counts) and max(counts) < 32  # 20 expected, four standard errors are 12.6
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
        *(({"layers": bad}, "names no layer, or one twice") for bad in ([1, 1], [], "[]")),
        *(
            ({"layers": bad}, "whole numbers")
            for bad in ([1.0], [True], "[0, x]", "[[0]]", ["0"], 0.5)
        ),
    ],
)
def test_a_plan_that_names_no_layers_of_the_model_is_refused(plan, message):
    with pytest.raises(HealingError, match=message):
        resolve_layers(6, **plan)
