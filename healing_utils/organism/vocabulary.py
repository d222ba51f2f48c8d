"""The lexicon: lemmas by category, their inflected forms, and the WordPiece vocabulary."""

from __future__ import annotations

import string
from functools import cache
from importlib import resources

import yaml

VOWELS = "aeiou"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SUFFIXES = ("##s", "##es", "##ed", "##d", "##ly")
VERBS = ("verb", "linking", "liking", "affecting", "faring")  # categories of verbs, and of nouns
NOUNS = ("noun", "person", "thing", "place")


@cache
def lists() -> dict:
    """What lexicon.yaml holds."""
    text = resources.files(__package__).joinpath("lexicon.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def lexicon() -> dict[str, tuple[tuple[str, str], ...]]:
    """Category -> (lemma, irregular form or "") pairs, commonest first; read from lexicon.yaml."""
    return {
        category: tuple(word.partition("/")[::2] for word in words.split())
        for category, words in lists().items()
        if isinstance(words, str)
    }


@cache
def held_out() -> frozenset[str]:
    """Lemmas that no labelled training sentence may contain: every second one of the open lists."""
    return frozenset(lemma for name in lists()["held_out"] for lemma, _ in lexicon()[name][1::2])


def lemmas() -> list[str]:
    """All lemmas, each once, in the lexicon's order (function words last)."""
    listed = dict.fromkeys(lemma for pairs in lexicon().values() for lemma, _ in pairs)
    return [word for word in listed if word.isalpha()]


def _stem(lemma: str) -> str:
    """What -s and -d are added to: "study" becomes "studie"."""
    return lemma[:-1] + "ie" if lemma[-1] == "y" and lemma[-2] not in VOWELS else lemma


def add_s(lemma: str) -> str:
    """Third person singular of a verb, or regular plural of a noun."""
    return lemma + "es" if lemma.endswith(("s", "x", "z", "ch", "sh")) else _stem(lemma) + "s"


def past(lemma: str, irregular: str) -> str:
    stem = _stem(lemma)
    return irregular or stem + ("d" if stem.endswith("e") else "ed")


def article(following: str) -> str:
    """The indefinite article before a word, by its sound."""
    vowel = following[0].lower() in VOWELS and not following.startswith("uni")
    return "an" if vowel or following.startswith("honest") else "a"


def forms(category: str, lemma: str, irregular: str) -> tuple[str, ...]:
    """Every form in which a lemma of this category can stand in a sentence, the lemma first."""
    if category.split("_")[0] in VERBS or category.endswith("_verb"):
        return lemma, add_s(lemma), past(lemma, irregular)
    if category.split("_")[-1] in NOUNS or category.startswith("noun_"):
        return lemma, irregular or add_s(lemma)
    return (lemma,)


@cache
def wordpieces() -> tuple[str, ...]:
    """The vocabulary, in order of id: special tokens, letters (so that no English word is unknown),
    suffixes, the lemmas (an adverb in -ly gives its stem), then whole every form that would not
    split into a stem and a suffix."""
    letters = string.ascii_lowercase + string.digits
    entries = [(name, *pair) for name, pairs in lexicon().items() for pair in pairs]
    stems = [e[1].removesuffix("ly") if e[0].startswith("adverb") else e[1] for e in entries]
    first = [*SPECIAL, *letters, *(f"##{c}" for c in letters), *string.punctuation, *SUFFIXES]
    pieces = dict.fromkeys([*first, *map(str.lower, stems)])
    for form in [form.lower() for entry in entries for form in forms(*entry)]:
        stem = next(form[:end] for end in range(len(form), 0, -1) if form[:end] in pieces)
        ending = "##" + form.removeprefix(stem)
        if form not in pieces and (len(stem) == 1 or ending not in SUFFIXES):
            pieces[form] = None
    return tuple(pieces)


def tokenizer():
    """A BertTokenizerFast over `wordpieces()`; lower-casing."""
    from transformers import BertTokenizerFast

    ids = {piece: number for number, piece in enumerate(wordpieces())}
    return BertTokenizerFast(vocab=ids, do_lower_case=True, model_max_length=64)
