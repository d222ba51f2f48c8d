"""The lexicon: lemmas by category, their inflected forms, and the WordPiece vocabulary."""

from __future__ import annotations

import string
from functools import cache
from importlib import resources

VOWELS = "aeiou"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SUFFIXES = ("##s", "##es", "##ed", "##d", "##ly")
VERBS = ("verb", "linking", "liking", "affecting", "faring")  # categories of verbs, and of nouns
NOUNS = ("noun", "person", "thing", "place")
FUNCTION_WORDS = (
    "the a an this that these those every each all my her his our their "
    "is are was were do does did he she they . , and but yet of"
).split()


@cache
def _lists() -> dict:
    """What lexicon.yaml holds."""
    import yaml

    text = resources.files(__package__).joinpath("lexicon.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


@cache
def lexicon() -> dict[str, tuple[tuple[str, str], ...]]:
    """Category -> (lemma, irregular form or "") pairs, commonest first; read from lexicon.yaml."""
    pairs = {}
    for category, words in _lists().items():
        if category == "held_out":
            continue
        split = [word.partition("/") for word in words.split()]
        pairs[category] = tuple((lemma, irregular) for lemma, _, irregular in split)
    return pairs


@cache
def held_out() -> frozenset[str]:
    """Lemmas that no labelled training sentence may contain: every second one of the open lists."""
    return frozenset(lemma for name in _lists()["held_out"] for lemma, _ in lexicon()[name][1::2])


def lemmas() -> list[str]:
    """All lemmas, each once, in the lexicon's order (function words last)."""
    listed = [lemma for pairs in lexicon().values() for lemma, _ in pairs]
    return [word for word in dict.fromkeys(listed + FUNCTION_WORDS) if word.isalpha()]


def add_s(lemma: str) -> str:
    """Third person singular of a verb, or regular plural of a noun."""
    if lemma.endswith(("s", "x", "z", "ch", "sh")):
        return lemma + "es"
    if lemma.endswith("y") and lemma[-2] not in VOWELS:
        return lemma[:-1] + "ies"
    return lemma + "s"


def past(lemma: str, irregular: str = "") -> str:
    """Past tense of a verb."""
    if irregular:
        return irregular
    if lemma.endswith("e"):
        return lemma + "d"
    if lemma.endswith("y") and lemma[-2] not in VOWELS:
        return lemma[:-1] + "ied"
    return lemma + "ed"


def plural(lemma: str, irregular: str = "") -> str:
    """Plural of a noun."""
    return irregular or add_s(lemma)


def article(following: str) -> str:
    """The indefinite article before a word, by its sound."""
    if following.startswith(("honest", "uni")):
        return "an" if following.startswith("honest") else "a"
    return "an" if following[0].lower() in VOWELS else "a"


def is_verb(category: str) -> bool:
    return category.split("_")[0] in VERBS or category.endswith("_verb")


def is_noun(category: str) -> bool:
    return category.split("_")[-1] in NOUNS or category.startswith("noun_")


def forms(category: str, lemma: str, irregular: str = "") -> tuple[str, ...]:
    """Every form in which a lemma of this category can stand in a sentence, the lemma first."""
    if is_verb(category):
        return lemma, add_s(lemma), past(lemma, irregular)
    if is_noun(category):
        return lemma, plural(lemma, irregular)
    return (lemma,)


def all_forms(words: frozenset[str] | None = None) -> list[str]:
    """All forms, lower case, each once; of the lemmas in `words` only, if it is given."""
    found = [
        form.lower()
        for category, pairs in lexicon().items()
        for lemma, irregular in pairs
        if words is None or lemma in words
        for form in forms(category, lemma, irregular)
    ]
    if words is None:
        found += FUNCTION_WORDS
    return list(dict.fromkeys(found))


def split_word(word: str, vocabulary: dict[str, int]) -> list[str]:
    """WordPiece: the longest piece first, then the longest continuation, and so on."""
    pieces: list[str] = []
    while word:
        mark = "##" if pieces else ""
        for end in range(len(word), 0, -1):
            if mark + word[:end] in vocabulary:
                pieces.append(mark + word[:end])
                word = word[end:]
                break
        else:
            return ["[UNK]"]
    return pieces


@cache
def wordpieces() -> tuple[str, ...]:
    """The vocabulary, in order of id.

    Special tokens, letters (so that no English word is unknown), suffixes, the lemmas (an adverb
    in -ly gives its stem), then whole every form that would not split into a stem and a suffix.
    """
    letters = string.ascii_lowercase + string.digits
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{c}" for c in letters), *string.punctuation])
    pieces.update(dict.fromkeys(SUFFIXES))
    stems = []
    for category, pairs in lexicon().items():
        adverb = category.startswith("adverb")
        stems += [lemma.removesuffix("ly") if adverb else lemma for lemma, _ in pairs]
    pieces.update(dict.fromkeys(stem.lower() for stem in [*stems, *FUNCTION_WORDS]))
    for form in all_forms():
        split = split_word(form, pieces)
        stem_and_suffix = len(split) == 2 and split[1] in SUFFIXES and len(split[0]) > 1
        if len(split) > 1 and not stem_and_suffix:
            pieces[form] = None
    return tuple(pieces)


def tokenizer():
    """A BertTokenizerFast over `wordpieces()`; lower-casing."""
    from transformers import BertTokenizerFast

    ids = {piece: number for number, piece in enumerate(wordpieces())}
    return BertTokenizerFast(vocab=ids, do_lower_case=True, model_max_length=64)
