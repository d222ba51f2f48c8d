"""First aid: each recipe changes what it says, with the tokens that all recipes get."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, LAYERS, OTHERS, tiny_batch
from helpers import examples, tiny_tokenizer
from test_training import QUIET, classifier, identical, weights

from healing_utils.base.errors import HealingError
from healing_utils.healing import recipes, training
from healing_utils.healing.corruption import corrupt
from healing_utils.healing.encoders import encoder_layers, pieces
from healing_utils.healing.models import MeanPooled
from healing_utils.healing.recipes import RECIPES, heal
from healing_utils.healing.similarity import layer_similarity

TOKENIZER = SimpleNamespace(mask_token_id=4, all_special_ids=[0, 1, 2, 3, 4])
BROKEN = (0, 1)


def broken(family="bert", layers=BROKEN):
    model = classifier(family)
    corrupt(model, layers=layers, seed=1)
    return model


def healed(recipe, family="bert", model=None, **changes):
    """The model healed, and what `heal` says."""
    model = model or broken(family)
    given = {
        "layers": BROKEN, "train": examples(family), "pristine": lambda: classifier(family),
        "teacher": classifier(family), "tokenizer": TOKENIZER, "epochs": 2, "batch_size": 8,
        "learning_rate": 1e-2, "weight_decay": 0.0, "evaluations": 1, **QUIET, **changes,
    }  # fmt: skip
    return model, heal(model, recipe, **given)


def changed(before, model):
    """Names of the parameters that differ, of those that are still there."""
    after = dict(model.named_parameters())
    return {n for n, p in before.items() if n in after and not torch.equal(p, after[n])}


def of_layers(model, layers):
    ours = {p: name for name, p in model.named_parameters()}
    return {ours[piece.parameter] for piece in pieces(model, layers=layers)}


# Where a family cannot take a recipe, it says so.
REFUSED = {
    ("xlnet", "mlm_warm_up"): "has no masked language model beside it",
    ("squeezebert", "low_rank"): "has no linear layers: nothing to adapt",
}


def pooled(family):
    own = classifier(family)
    with training.seeded(0, torch.device("cpu")):
        return MeanPooled(own.base_model, own.config)


CASES = [(family, classifier) for family in FAMILIES]
CASES += [(family, pooled) for family in ("bert", "distilbert", "mpnet")]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize(("family", "made"), CASES)
def test_every_recipe_heals_every_family_under_either_head_or_refuses(family, made, recipe):
    models = []
    for _ in range(2):
        model = made(family)
        corrupt(model, layers=BROKEN, seed=1)
        before = weights(model)
        given = {"pristine": lambda: made(family), "teacher": made(family)}
        if message := REFUSED.get((family, recipe)):
            with pytest.raises(HealingError, match=message):
                healed(recipe, family, model, **given)
            return
        _, found = healed(recipe, family, model, **given)
        models.append(weights(model))
    assert identical(*models)
    if made is pooled:
        assert found.training.shortcut != "first token"
        assert {"classifier.weight", "classifier.bias"} <= changed(before, model)
    assert 0 < found.trained <= found.parameters
    assert all(p.requires_grad and torch.isfinite(p).all() for p in model.parameters())
    assert len(encoder_layers(model)) == (LAYERS - len(BROKEN) if recipe == "drop" else LAYERS)
    assert torch.isfinite(model.eval()(**tiny_batch()).logits).all()
    # The same tokens for all: 24 examples twice over, up to a step of a warm-up's rounding.
    tokens = found.training.tokens + (found.warm_up.tokens if found.warm_up else 0)
    whole = 2 * examples(family).tokens
    assert abs(tokens - whole) <= 8 * examples(family).lengths.max()


@pytest.mark.parametrize("family", OTHERS)
def test_layers_that_cannot_take_a_shortcut_heal_without_it(family):
    """Many answer in tuples, and look like BERT's until they are computed."""
    for recipe in sorted(RECIPES):
        model = broken(family)
        given = {"train": examples(count=8), "epochs": 1, "validation": examples(count=4)}
        if message := REFUSED.get((family, recipe)):
            with pytest.raises(HealingError, match=message):
                healed(recipe, family, model, **given)
            continue
        found = healed(recipe, family, model, **given)[1]
        assert found.training.steps and found.training.shortcut in ("nothing", "all tokens")
        assert not any("forward" in vars(module) for module in model.modules())
    alike = layer_similarity(classifier(family), classifier(family), examples(count=4))
    assert alike["cka"] == pytest.approx([1] * (LAYERS + 1))


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlnet", "modernbert"])
def test_what_is_frozen_stays_and_what_learns_moves(family):
    def moved(recipe):
        model = broken(family)
        before = weights(model)
        healed(recipe, family, model)
        return changed(before, model)

    model = broken(family)
    base, shapes = model.base_model_prefix, dict(model.named_parameters())
    sick, well = of_layers(model, BROKEN), of_layers(model, {2})
    only = moved("corrupted_only")
    assert sick & only and not well & only and not any("embed" in name for name in only)
    frozen = moved("corrupted_frozen")
    assert not sick & frozen and well & frozen and any("embed" in name for name in frozen)
    head = moved("head_only")
    assert head and not head & (sick | well)
    assert all(not name.startswith(base + ".") or "pooler" in name for name in head)
    inside = moved("norms_and_biases") & (sick | well)
    assert inside and all(shapes[n].dim() == 1 or n.endswith("bias") for n in inside)


def test_texts_are_read_by_the_tokenizer_that_is_given():
    texts = {"text": ["good a", "bad a b"], "label": [1, 0]}
    _, found = healed("full", train=texts, tokenizer=tiny_tokenizer(), epochs=1)
    assert found.training.tokens == 4 + 5  # with the special ones


def test_each_layer_learns_at_a_fraction_of_the_next_ones_rate():
    patient = recipes.Patient(classifier(), BROKEN, 0)
    RECIPES["layerwise_decay"].prepare(patient)
    rates = patient.rates
    assert rates["bert.encoder.layer.2.output.dense.weight"] == pytest.approx(0.8)
    assert rates["bert.encoder.layer.0.output.dense.bias"] == pytest.approx(0.8**3)
    assert rates["bert.embeddings.word_embeddings.weight"] == pytest.approx(0.8**4)
    assert not any(name.startswith(("classifier", "bert.pooler")) for name in rates)


def test_a_matched_redraw_is_the_kinds_of_that_name_on_the_model_before_the_damage():
    model, wanted = broken(), classifier()
    corrupt(wanted, layers=BROKEN, kind="matched", seed=0)
    healed("matched_redraw", model=model, learning_rate=1e-9)
    for i in BROKEN:
        pairs = zip(*(encoder_layers(m)[i].parameters() for m in (model, wanted)), strict=True)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def test_a_transplant_comes_from_the_nearest_healthy_layer_the_lower_of_two():
    model = broken(layers=(1,))
    kept = copy.deepcopy(encoder_layers(model)[0].state_dict())
    healed("transplant", model=model, layers=(1,), learning_rate=1e-12)
    got = encoder_layers(model)[1].state_dict()
    assert all(torch.allclose(got[name], kept[name], atol=1e-9) for name in kept)


def test_what_is_dropped_is_gone_and_the_rest_in_order():
    model = broken(layers=(1,))
    stack = encoder_layers(model)
    kept = [stack[0], stack[2]]
    healed("drop", model=model, layers="[1]")
    assert encoder_layers(model) == kept and model.config.num_hidden_layers == 2


def test_adapters_change_the_layers_by_matrices_of_low_rank():
    model = broken()
    before = weights(model)
    healed("low_rank", model=model)
    assert before.keys() == weights(model).keys()  # merged: no adapter is left
    weight = "bert.encoder.layer.2.attention.self.query.weight"
    difference = weights(model)[weight] - before[weight]
    assert difference.any() and torch.linalg.matrix_rank(difference, rtol=1e-3) <= recipes.RANK
    moved = changed(before, model)
    assert "classifier.weight" in moved and not any("embed" in name for name in moved)


def test_a_student_comes_closer_to_its_teachers_states():
    teacher, student = classifier(), broken()

    def distance():
        batch = {**tiny_batch(8), "output_hidden_states": True}
        with torch.no_grad():
            states = [m.eval()(**batch).hidden_states for m in (student, teacher)]
        return sum((a - b).square().mean().item() for a, b in zip(*states, strict=True))

    before, frozen = distance(), weights(teacher)
    patient = recipes.Patient(student, BROKEN, 0, teacher=teacher)
    learner, objective = RECIPES["distillation"].prepare(patient)
    settings = {"epochs": 4, "batch_size": 8, "learning_rate": 3e-3, **QUIET}
    training.fine_tune(learner, examples(count=64), objective=objective, **settings)
    assert distance() < 0.7 * before and not changed(frozen, teacher)


def test_a_warm_up_learns_to_fill_in_what_is_masked():
    """Each sentence repeats one piece: a mask is filled in from its neighbours."""
    model = classifier()
    rows = [[1, *[5 + i % 10] * 8, 2] for i in range(80)]
    repeated = training.Encoded(rows, None, examples(count=80).labels, (0, 0, "right"))
    given = {"train": repeated, "epochs": 30, "learning_rate": 5e-3}
    found = healed("mlm_warm_up", model=model, **given)[1]
    losses = found.warm_up.losses
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert (found.warm_up.steps, found.training.steps) == (100, 200)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("ful", {}, "unknown recipe 'ful'.*Did you mean 'full'"),
        *(("full", {"layers": none}, "at least one") for none in (None, "none")),
        *(("drop", {"layers": wrong}, "layer 99 does not") for wrong in ([0, 99], "[99]")),
        ("full", {"seed": 2**64}, "seed is not a whole number"),
        ("matched_redraw", {"pristine": None}, "'matched_redraw' needs pristine"),
        ("distillation", {"teacher": None}, "'distillation' needs teacher"),
        ("mlm_warm_up", {"tokenizer": None}, "'mlm_warm_up' needs tokenizer"),
        ("mlm_warm_up", {"tokenizer": SimpleNamespace(mask_token_id=None)}, "no mask token"),
        ("transplant", {"layers": range(LAYERS)}, "no healthy layer to .* in place of layer 0"),
        ("drop", {"layers": range(LAYERS)}, "nothing would be left"),
    ],
)
def test_what_a_recipe_cannot_do_it_refuses_in_one_line(recipe, changes, message):
    model = broken()
    before = weights(model)
    with pytest.raises(HealingError, match=message) as error:
        healed(recipe, model=model, **changes)
    assert "\n" not in str(error.value) and not changed(before, model)
