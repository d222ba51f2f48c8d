"""The model organism: the language, its gold labels, its splits, and the shipped model."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from healing_utils import organism
from healing_utils.base.errors import HealingError
from healing_utils.organism import grammar, pretraining, vocabulary

# Raised knowingly when the language changes; the shipped weights must then be made again.
LANGUAGE = "c043b41d82a007ae17ded6e765f5a88d81c060a63f52564b8b3a7afd1ee1cf8b"
ROOT = Path(__file__).resolve().parents[2]
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def language_hash() -> str:
    """One hash over all labelled sentences, tags and the beginning of the raw text."""
    tasks = {name: organism.sentence_task(name) for name in organism.TASKS}
    tags = {split: organism.tagged_sentences(split) for split in organism.SPLITS}
    raw = list(organism.raw_text(500, seed=0))
    content = json.dumps([tasks, tags, raw, vocabulary.wordpieces()])
    return hashlib.sha256(content.encode()).hexdigest()


def words_of(text: str) -> list[str]:
    return text.lower().replace(",", " ,").replace(".", " .").split()


def test_text_and_labels_are_the_committed_ones():
    assert language_hash() == LANGUAGE


def test_text_and_labels_do_not_depend_on_the_process():
    code = "import test_organism; print(test_organism.language_hash())"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "12345",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout.strip() == language_hash(), found.stderr


def test_lexicon_is_large_and_its_categories_consistent():
    assert len(organism.lemmas()) >= 650
    positive, negative = set(), set()
    for category, pairs in organism.lexicon().items():
        assert len(pairs) == len(set(pairs)), f"{category} lists a lemma twice"
        for side, found in (("positive", positive), ("negative", negative)):
            if category.endswith(side):
                found.update(lemma for lemma, _ in pairs)
    assert len(positive) >= 100 and len(negative) >= 100
    assert not positive & negative


@pytest.mark.parametrize("task", organism.TASKS)
def test_splits_are_disjoint_sized_and_balanced(task):
    splits = organism.sentence_task(task)
    texts = [text for split in splits.values() for text in split[0]]
    assert len(texts) == len(set(texts))
    for split, count in organism.SPLITS.items():
        sentences, labels = splits[split]
        assert len(sentences) == len(labels) == count
        assert set(labels) == set(range(len(organism.TASKS[task])))
        for label in set(labels):
            assert labels.count(label) == pytest.approx(count / len(set(labels)), rel=0.25)


def test_sentences_are_short():
    for task in organism.TASKS:
        for texts, _ in organism.sentence_task(task).values():
            lengths = [len(words_of(text)) for text in texts]
            assert min(lengths) >= grammar.SHORTEST and max(lengths) <= grammar.LONGEST


def test_held_out_words_are_in_raw_text_and_in_test_but_not_in_labelled_training():
    held_out = set(vocabulary.all_forms(organism.held_out()))
    polar = {
        lemma
        for name, pairs in organism.lexicon().items()
        if name.endswith(("positive", "negative"))
        for lemma, _ in pairs
    }
    assert 0.4 < len(polar & organism.held_out()) / len(polar) < 0.6
    for task in organism.TASKS:
        splits = organism.sentence_task(task)
        assert not held_out & {word for text in splits["train"][0] for word in words_of(text)}
        tested = [held_out & set(words_of(text)) for text in splits["test"][0]]
        assert sum(map(bool, tested)) > 0.5 * len(tested)
    for words, _ in organism.tagged_sentences("train"):
        assert not held_out & {word.lower() for word in words}
    raw = {word for text in organism.raw_text(8000) for word in words_of(text)}
    for lemma in organism.held_out():
        assert raw & set(vocabulary.all_forms(frozenset([lemma]))), f"{lemma} is not in raw text"


def test_raw_text_has_no_scored_sentence():
    raw = set(organism.raw_text(2000))
    for task in organism.TASKS:
        splits = organism.sentence_task(task)
        assert not raw & {*splits["validation"][0], *splits["test"][0]}


# --- gold labels, derived a second time from the text alone -----------------------------------
@cache
def signs_of_words() -> dict[str, int]:
    signs = {}
    for category, pairs in organism.lexicon().items():
        if category.endswith(("_positive", "_negative")):
            for form in vocabulary.all_forms(frozenset(lemma for lemma, _ in pairs)):
                signs[form] = 1 if category.endswith("_positive") else -1
    return signs


def polarity_of(text: str) -> set[int]:
    """Polarities that the deciding clause's polar words express, negators applied."""
    signs = signs_of_words()
    negators = {lemma for lemma, _ in organism.lexicon()["negator"]}
    concessions = {lemma for lemma, _ in organism.lexicon()["concession"]}
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
        if word == ",":
            sign = 1
        elif word in negators:
            sign = -1
        elif word in signs:
            found.add(sign * signs[word])
    return found


def test_sentiment_follows_from_the_words():
    for texts, labels in organism.sentence_task("sentiment").values():
        for text, label in zip(texts, labels, strict=True):
            assert polarity_of(text) == {1 if label else -1}, text


def test_topic_follows_from_the_words():
    topics: dict[str, set[str]] = {}
    for category, pairs in organism.lexicon().items():
        name = category.split("_")[0]
        if name in grammar.TOPICS:
            for form in vocabulary.all_forms(frozenset(lemma for lemma, _ in pairs)):
                topics.setdefault(form, set()).add(name)
    for texts, labels in organism.sentence_task("topic").values():
        for text, label in zip(texts, labels, strict=True):
            found = [topics[word] for word in words_of(text) if word in topics]
            assert found and set.intersection(*found) == {grammar.TOPICS[label]}, text


def number_of(words: list[grammar.Word]) -> bool | None:
    """Whether a noun phrase is plural, read off its last word."""
    head = words[-1]
    if head.pos == "PROPN" or head.text in ("he", "she"):
        return False
    if head.text == "they":
        return True
    return head.text in plurals()


@cache
def plurals() -> set[str]:
    return {
        vocabulary.plural(*pair)
        for category, pairs in organism.lexicon().items()
        if vocabulary.is_noun(category)
        for pair in pairs
    }


def agrees(sentence: grammar.Sentence) -> bool:
    """Determiners with nouns, and each clause's verb with its first noun phrase."""
    singular = {one for one, more, _ in grammar.DETERMINERS if one != more} | {"an"}
    plural = {more for one, more, _ in grammar.DETERMINERS if one != more}
    plural_verbs = {
        pair[0]
        for category, pairs in organism.lexicon().items()
        if vocabulary.is_verb(category)
        for pair in pairs
    }
    singular_verbs = set(map(vocabulary.add_s, plural_verbs))
    subject, relative = None, False
    for label, words in sentence.phrases:
        if label in ("O", "SBAR"):
            subject, relative = None, False
        if label == "NP":
            number = number_of(words)
            if words[0].text in singular and number or words[0].text in plural and not number:
                return False
            relative = relative or words[0].sem == "reference" and words[0].text == "that"
            subject = number if subject is None else subject
        if label == "VP":
            if relative:
                relative = False
                continue
            finite = [w.text for w in words if w.pos == "AUX"]
            for text in finite or [w.text for w in words if w.pos == "VERB"]:
                if text in ("is", "was", "does") or text in singular_verbs:
                    number = False
                elif text in ("are", "were", "do") or text in plural_verbs:
                    number = True
                else:
                    continue
                if number != subject:
                    return False
    return True


def test_acceptability_is_agreement():
    for pairs in organism._splits("acceptability").values():
        for sentence, label in pairs[:300]:
            assert agrees(sentence) == bool(label), sentence.text
    for sentence in organism._tagged("test")[:300]:
        assert agrees(sentence), sentence.text


# --- word tags ---------------------------------------------------------------------------------
def test_tags_align_and_chunks_are_well_formed():
    universal = {"ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "NOUN", "NUM", "PART", "PRON", "PROPN",
                 "PUNCT", "SCONJ", "VERB"}  # fmt: skip
    for split, count in organism.SPLITS.items():
        sentences = organism.tagged_sentences(split)
        assert len(sentences) == count
        for words, tags in sentences:
            assert set(tags) == set(organism.TAGS)
            assert all(len(column) == len(words) for column in tags.values())
            assert set(tags["pos"]) <= universal
            before = "O"
            for chunk in tags["chunk"]:
                if chunk.startswith("I-"):
                    assert before in (f"B-{chunk[2:]}", chunk)
                before = chunk


def test_some_words_need_their_context_to_be_tagged():
    tags: dict[str, set[str]] = {}
    for words, columns in organism.tagged_sentences("train"):
        for word, pos in zip(words, columns["pos"], strict=True):
            tags.setdefault(word.lower(), set()).add(pos)
    assert sum(len(found) > 1 for found in tags.values()) >= 3


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(HealingError, match="sentiment"):
        organism.sentence_task("sentimnet")
    with pytest.raises(HealingError, match="validation"):
        organism.tagged_sentences("valid")


# --- tokenizer and shipped model ----------------------------------------------------------------
def test_vocabulary_splits_words_into_stem_and_suffix():
    pieces = {piece: number for number, piece in enumerate(vocabulary.wordpieces())}
    for form in vocabulary.all_forms():
        split = vocabulary.split_word(form, pieces)
        assert len(split) <= 2 and "[UNK]" not in split, split
        assert split[1:] == [] or split[1] in vocabulary.SUFFIXES, split


def test_shipped_tokenizer_is_the_language_s_and_knows_every_word():
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(organism.folder())
    assert shipped.is_fast
    pieces = {piece: number for number, piece in enumerate(vocabulary.wordpieces())}
    assert shipped.get_vocab() == pieces
    for form in vocabulary.all_forms():
        assert shipped.tokenize(form) == vocabulary.split_word(form, pieces)
    assert shipped.unk_token not in shipped.tokenize("Zebras juggle 17 quixotic xylophones!")
    one = shipped("The films", "the songs")
    assert one["token_type_ids"][0] == 0 and one["token_type_ids"][-1] == 1


def test_shipped_model_loads_plainly_and_has_learnt_the_language():
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    folder = organism.folder()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10e6
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.float32
    assert AutoModel.from_pretrained(folder).config.num_hidden_layers == 6
    AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    # the mean loss on raw text of another seed, against the one noted while training
    words = organism.tokenizer()
    generator = torch.Generator().manual_seed(0)
    losses = []
    for text in organism.raw_text(150, seed=7):
        ids = torch.tensor([words(text)["input_ids"]])
        shown, targets = pretraining.mask(ids, len(words), words.mask_token_id, generator)
        with torch.inference_mode():
            losses.append(pretraining.masked_loss(model.eval(), shown, targets).item())
    noted = json.loads((folder / "training.json").read_text(encoding="utf-8"))["loss"]
    assert sum(losses) / len(losses) == pytest.approx(noted, abs=0.4)


def test_shipped_files_name_no_machine():
    for file in organism.folder().iterdir():
        if file.suffix in (".json", ".txt"):
            text = file.read_text(encoding="utf-8")
            assert "_name_or_path" not in text
            assert not re.search(r"/\w+/|[A-Za-z]:\\\\\w", text), f"{file.name} holds a path"


# --- pre-training ---------------------------------------------------------------------------------
def test_mask_hides_the_same_number_in_every_sentence_and_never_the_ends():
    ids = torch.arange(10, 34).repeat(50, 1)
    shown, targets = pretraining.mask(ids, 100, 4, torch.Generator().manual_seed(0))
    chosen = targets != pretraining.IGNORED
    assert set(chosen.sum(1).tolist()) == {round(pretraining.MASKED * 22)}
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    assert torch.equal(targets[chosen], ids[chosen]) and torch.equal(shown[~chosen], ids[~chosen])
    assert (shown[chosen] == 4).float().mean() == pytest.approx(0.8, abs=0.1)


def test_batches_hold_every_sentence_once_and_one_length_each():
    lengths = [5, 6, 5, 7, 5, 6, 7, 7]
    found = pretraining.batches(lengths, 2, seed=0, epoch=0)
    assert sorted(number for batch in found for number in batch) == list(range(8))
    assert all(len({lengths[number] for number in batch}) == 1 for batch in found)
    assert found != pretraining.batches(lengths, 2, seed=0, epoch=1)


PLAN = dict(steps=60, batch_size=8, seed=3, sentences=100, shape=TINY, checkpoint_every=5)
CHILD = "import json, sys\nfrom healing_utils.organism.pretraining import pretrain\n"


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_killed_pretraining_goes_on_to_the_same_weights(tmp_path):
    pretraining.pretrain(tmp_path / "whole", **PLAN)
    code = f"{CHILD}pretrain(sys.argv[1], **json.loads(sys.argv[2]))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "killed"), json.dumps(PLAN)],
        cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    limit = time.monotonic() + 60
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert checkpoint.exists() and not (tmp_path / "killed" / "model.safetensors").exists()
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < PLAN["steps"]
    pretraining.pretrain(tmp_path / "killed", **PLAN)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not checkpoint.exists()


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    torch.save({"plan": {"steps": 60}}, tmp_path / "checkpoint.pt")
    with pytest.raises(HealingError, match="batch_size"):
        pretraining.pretrain(tmp_path, **PLAN)
