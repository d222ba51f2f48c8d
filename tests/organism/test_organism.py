"""The model organism: the language, its gold labels, its splits, and the shipped model."""

import hashlib
import inspect
import json
import re
from functools import cache

import pytest
import torch

from healing_utils import organism
from healing_utils.base.errors import HealingError
from healing_utils.organism import grammar, pretraining, vocabulary

# Raised knowingly when the language changes; the shipped weights must then be made again.
LANGUAGE = "c043b41d82a007ae17ded6e765f5a88d81c060a63f52564b8b3a7afd1ee1cf8b"


def test_text_and_labels_are_the_committed_ones():
    """One hash over all labelled sentences, tags and the beginning of the raw text."""
    tasks = {name: organism.sentence_task(name) for name in organism.TASKS}
    tags = {split: organism.tagged_sentences(split) for split in organism.SPLITS}
    raw = list(organism.raw_text(500, seed=0))
    content = json.dumps([tasks, tags, raw, vocabulary.wordpieces()])
    assert hashlib.sha256(content.encode()).hexdigest() == LANGUAGE


def words_of(text: str) -> list[str]:
    return text.lower().replace(",", " ,").replace(".", " .").split()


@cache
def forms_of(ending: str = "", beginning: str = "") -> dict[str, tuple[str, str]]:
    """Category and lemma by form, of the categories of such names."""
    return {
        form.lower(): (category, pair[0])
        for category, pairs in organism.lexicon().items()
        if category.endswith(ending) and category.startswith(beginning)
        for pair in pairs
        for form in vocabulary.forms(category, *pair)
    }


def test_half_of_the_polar_words_is_held_out_and_none_is_of_both_kinds():
    positive, negative = (
        {lemma for _, lemma in forms_of(sign).values()} for sign in grammar.SIGN.values()
    )
    assert min(len(positive), len(negative)) >= 100 and not positive & negative
    polar = positive | negative
    assert 0.4 < len(polar & organism.held_out()) / len(polar) < 0.6


@pytest.mark.parametrize("task", organism.TASKS)
def test_splits_are_disjoint_sized_balanced_and_of_short_sentences(task):
    splits = organism.sentence_task(task)
    texts = [text for split in splits.values() for text in split[0]]
    assert len(texts) == len(set(texts))
    allowed = range(grammar.SHORTEST, grammar.LONGEST + 1)
    assert all(len(words_of(text)) in allowed for text in texts)
    for split, count in organism.SPLITS.items():
        sentences, labels = splits[split]
        assert len(sentences) == len(labels) == count
        assert set(labels) == set(range(len(organism.TASKS[task])))
        for label in set(labels):
            assert labels.count(label) == pytest.approx(count / len(set(labels)), rel=0.25)


def test_held_out_words_are_in_raw_text_and_in_test_but_not_in_labelled_training():
    lemma_of = {form: lemma for form, (_, lemma) in forms_of().items()}

    def held_out(text: str) -> set[str]:
        return {lemma_of.get(word) for word in words_of(text)} & organism.held_out()

    raw = list(organism.raw_text(1500))
    assert set().union(*map(held_out, raw)) == organism.held_out()
    for task in organism.TASKS:
        splits = organism.sentence_task(task)
        assert not any(map(held_out, splits["train"][0]))
        assert sum(map(bool, map(held_out, splits["test"][0]))) > 0.5 * organism.SPLITS["test"]
        assert not set(raw) & {*splits["validation"][0], *splits["test"][0]}
    assert not any(held_out(" ".join(words)) for words, _ in organism.tagged_sentences("train"))


# --- gold labels, derived a second time from the text alone -----------------------------------
def labelled(task: str):
    for texts, labels in organism.sentence_task(task).values():
        yield from zip(texts, labels, strict=True)


def polarity_of(text: str) -> set[int]:
    """Polarities that the deciding clause's polar words express, negators applied."""
    negators, concessions = (
        {lemma for lemma, _ in organism.lexicon()[name]} for name in ("negator", "concession")
    )
    words = words_of(text)
    if words[0] in concessions:
        words = words[words.index(",") :]
    for place, word in enumerate(words):
        if word in ("but", "yet"):
            words = words[place:]
            break
        if place and word in concessions:
            words = words[:place]
            break
    found, sign = set(), 1
    for word in words:
        sign = 1 if word == "," else -1 if word in negators else sign
        found |= {sign} if word in forms_of("_positive") else set()
        found |= {-sign} if word in forms_of("_negative") else set()
    return found


def test_sentiment_follows_from_the_words():
    for text, label in labelled("sentiment"):
        assert polarity_of(text) == {1 if label else -1}, text


def test_topic_follows_from_the_words():
    for text, label in labelled("topic"):
        topics = [
            {topic for topic in grammar.TOPICS if word in forms_of(beginning=topic)}
            for word in words_of(text)
        ]
        found = list(filter(None, topics))
        assert found and set.intersection(*found) == {grammar.TOPICS[label]}, text


def test_acceptability_is_one_words_number():
    """The wrong twin of a sentence has one word, of a determiner or verb, in its other number."""
    others = [{"is", "are"}, {"was", "were"}, {"does", "do"}, {"an", "several"}]
    others += [set(pair[:2]) for pair in vocabulary.lists()["determiners"]]
    verbs = {form: lemma for form, (_, lemma) in forms_of().items()}
    writer = grammar.Writer("twins")
    for good, bad in (writer.agreement_pair() for _ in range(150)):
        assert (good.acceptable, bad.acceptable, good.tags) == (True, False, bad.tags)
        wrong = [pair for pair in zip(good.words, bad.words, strict=True) if len(set(pair)) > 1]
        first, second = (word.lower() for word in wrong[0])
        assert len(wrong) == 1 and ({first, second} in others or verbs[first] == verbs[second])


def test_tags_align_and_chunks_are_well_formed():
    universal = {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "NUM", "PART", "PRON", "PROPN",
                 "PUNCT", "SCONJ", "VERB"}  # fmt: skip
    by_word: dict[str, set[str]] = {}
    for split, count in organism.SPLITS.items():
        assert len(organism.tagged_sentences(split)) == count
        for words, tags in organism.tagged_sentences(split):
            assert tuple(tags) == organism.TAGS and set(tags["pos"]) <= universal
            assert all(len(column) == len(words) for column in tags.values())
            for before, chunk in zip(["O", *tags["chunk"]], tags["chunk"], strict=False):
                assert not chunk.startswith("I-") or before in (f"B-{chunk[2:]}", chunk)
            for word, pos in zip(words, tags["pos"], strict=True):
                by_word.setdefault(word.lower(), set()).add(pos)
    assert sum(len(found) > 1 for found in by_word.values()) >= 3  # these need their context


# --- tokenizer and shipped model ----------------------------------------------------------------
def test_shipped_tokenizer_is_the_language_s_and_splits_words_into_stem_and_suffix():
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(organism.folder())
    assert shipped.is_fast
    assert shipped.get_vocab() == {piece: i for i, piece in enumerate(vocabulary.wordpieces())}
    for form in forms_of():
        pieces = shipped.tokenize(form)
        assert "[UNK]" not in pieces and pieces[1:] in ([], *([s] for s in vocabulary.SUFFIXES))
    assert shipped.unk_token not in shipped.tokenize("Zebras juggle 17 quixotic xylophones!")
    one = shipped("The films", "the songs")
    assert one["token_type_ids"][0] == 0 and one["token_type_ids"][-1] == 1


def test_shipped_model_loads_plainly_and_has_learnt_the_language():
    from transformers import AutoModelForMaskedLM

    folder = organism.folder()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10e6
    for file in (*folder.glob("*.json"), *folder.glob("*.txt")):  # none names a machine
        assert not re.search(r"_name_or_path|/\w+/|[A-Za-z]:\\\\\w", file.read_text("utf-8")), file
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 6
    # the mean loss on raw text of another seed, against the one noted while training
    words = organism.tokenizer()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for text in organism.raw_text(80, seed=7):
        ids = torch.tensor([words(text)["input_ids"]])
        shown, targets = pretraining.mask(ids, len(words), words.mask_token_id, generator)
        with torch.inference_mode():
            losses.append(pretraining.masked_loss(model.eval(), shown, targets).item())
    made = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    usual = inspect.signature(pretraining.pretrain).parameters  # by which `publish` makes it anew
    named = ("steps", "batch_size", "seed", "threads", "sentences")
    assert all(made[name] == usual[name].default for name in named)
    assert sum(losses) / len(losses) == pytest.approx(made["loss"], abs=0.4)


# --- pre-training ---------------------------------------------------------------------------------
def test_mask_hides_the_same_number_in_every_sentence_and_never_the_ends():
    ids = torch.arange(10, 34).repeat(50, 1)
    shown, targets = pretraining.mask(ids, 100, 4, torch.Generator().manual_seed(0))
    chosen = targets != pretraining.IGNORED
    assert set(chosen.sum(1).tolist()) == {round(pretraining.MASKED * 22)}
    assert not chosen[:, [0, -1]].any() and torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert (shown[chosen] == 4).float().mean() == pytest.approx(0.8, abs=0.1)


def test_stopped_pretraining_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    monkeypatch.setattr(pretraining, "SHAPE", {**pretraining.SHAPE, **tiny})
    plan = dict(steps=20, batch_size=8, seed=3, sentences=100, checkpoint_every=5)
    whole = pretraining.pretrain(tmp_path / "whole", **plan)
    loss, steps = pretraining.masked_loss, []

    def stopping(*arguments):
        steps.append(1)
        if len(steps) == 13:
            raise KeyboardInterrupt
        return loss(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretraining, "masked_loss", stopping)
        pretraining.pretrain(tmp_path / "stopped", **plan)
    checkpoint = tmp_path / "stopped" / "checkpoint.pt"
    assert [file.name for file in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert torch.load(checkpoint, weights_only=True)["step"] == 10
    with pytest.raises(HealingError, match="another batch_size"):
        pretraining.pretrain(tmp_path / "stopped", **{**plan, "batch_size": 9})
    assert pretraining.pretrain(tmp_path / "stopped", **plan) == whole
    assert not checkpoint.exists()
    for name in ("model.safetensors", "training.json", "tokenizer.json", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (checkpoint.parent / name).read_bytes()
