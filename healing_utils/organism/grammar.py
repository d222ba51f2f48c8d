"""The grammar: sentences with their gold labels and word tags.

A sentence is one clause or two. A clause has a *polarity* (+1, -1, or 0 for none) that all its
polar words agree on: those inside the scope of a negator have the opposite polarity, because the
negator turns it. The sentence's polarity is its only clause's, the last clause's after "but" and
"yet", the main clause's beside "although"; two clauses joined by "and" agree.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from .vocabulary import add_s, article, held_out, lexicon, lists, past

TOPICS = ("arts", "sport", "food", "science")
SIGN = {1: "positive", -1: "negative"}
SHORTEST, LONGEST = 8, 16  # words, punctuation counted
# What a clause with a polarity is built around, in how many places a polar word can stand beside
# it, and how often.
FRAMES = (
    ("copula", 3), ("linking", 2), ("noun", 2), ("liking", 3), ("affecting", 3), ("faring", 3),
    ("topical", 3),
)  # fmt: skip
FRAME_WEIGHTS = (3, 1, 1, 3, 2.5, 2, 2)


class Word(NamedTuple):
    """One word with its tags.

    `other` is the form of the opposite number where the form shows it, `topic` the topic it tells.
    """

    text: str
    pos: str
    sem: str
    other: str = ""
    topic: str = ""


class Phrase(NamedTuple):
    """A chunk: its label ("O" for words outside any chunk) and its words."""

    label: str
    words: list[Word]


AND = Word("and", "CCONJ", "conjunction")
NOT = Word("not", "PART", "negation")
COMMA, STOP = (Phrase("O", [Word(mark, "PUNCT", "punctuation")]) for mark in ",.")


@dataclass(frozen=True)
class Sentence:
    """A sentence of the language with everything the grammar knows about it."""

    phrases: list[Phrase] = field(repr=False)
    polarity: int
    topic: str
    acceptable: bool = True

    @property
    def tokens(self) -> list[Word]:
        return [word for phrase in self.phrases for word in phrase.words]

    @property
    def words(self) -> list[str]:
        first, *others = (word.text for word in self.tokens)
        return [first[0].upper() + first[1:], *others]

    @property
    def text(self) -> str:
        return " ".join(self.words).replace(" ,", ",").replace(" .", ".")

    @property
    def tags(self) -> dict[str, list[str]]:
        """`pos` (universal-dependency names), `chunk` (IOB2) and `sem`, one tag a word."""
        chunk = [
            "O" if phrase.label == "O" else ("I-" if place else "B-") + phrase.label
            for phrase in self.phrases
            for place in range(len(phrase.words))
        ]
        tokens = self.tokens
        return {"pos": [w.pos for w in tokens], "chunk": chunk, "sem": [w.sem for w in tokens]}


class Style(NamedTuple):
    """What a text is like; the defaults are the labelled tasks'."""

    negation: float = 0.2  # chance that a clause is negated
    kinds: tuple[float, ...] = (5, 3, 1.5, 1)  # weights of one clause, but, although, and
    cues: tuple[int, ...] = (2, 3)  # polar words of a single clause, equally likely
    clause_cues: tuple[int, ...] = (1, 2)  # of each of two clauses
    leading: float = 0.9  # chance that an "although" clause comes first
    pairs: float = 0.1  # chance that a polar word comes as a pair, "good and lovely"
    flatness: float = 8.0  # the word of rank r = 0, 1, ... has the weight 1 / (r + flatness)
    comment: float = 0.0  # chance that a polar sentence opens with "Luckily," or the like


# Raw text says what it feels more plainly than the tasks do: that is what makes the polarity of
# words learnable from it in minutes.
RAW = Style(0.2, (4, 2, 1, 2), (2, 3, 4), (2,), leading=0.5, pairs=0.6, flatness=1.0, comment=0.35)


@cache
def _weighted(
    category: str, known_only: bool, flatness: float
) -> tuple[list[tuple[str, str]], list[float]]:
    """A category's entries and their cumulative weights, without held-out words if asked."""
    weighted = [
        (entry, 1 / (rank + flatness))
        for rank, entry in enumerate(lexicon()[category])
        if not (known_only and entry[0] in held_out())
    ]
    return [entry for entry, _ in weighted], list(accumulate(weight for _, weight in weighted))


@cache
def _determiners() -> tuple[list[list[Any]], list[float]]:
    listed = lists()["determiners"]
    return listed, list(accumulate(weight for *_, weight in listed))


def joined(words: list[Word]) -> list[Word]:
    """With "and" between them."""
    return words[:1] + [w for word in words[1:] for w in (AND, word)]


def agreeing(numbers: tuple[str, str], many: bool, pos: str, sem: str, topic: str = "") -> Word:
    """A word in its singular or plural form."""
    text, other = numbers[many], numbers[not many]
    return Word(text, pos, sem, other if other != text else "", topic)


class Writer:
    """Writes random sentences, all choices from one `random.Random(seed)`.

    `known_only` leaves out the held-out words, as labelled training data must. Every `polarity`
    below is that of the polar words to choose, 0 for none.
    """

    def __init__(self, seed: str, known_only: bool = False, style: Style | None = None):
        self.random = random.Random(seed).random  # the one source; its stream is fixed by Python
        self.known_only = known_only
        self.style = style or Style()

    # -- choices ----------------------------------------------------------------------------
    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        if weights is None:
            return options[int(self.random() * len(options))]
        return self.pick(options, list(accumulate(weights)))

    def pick(self, options: Sequence[Any], total: list[float]) -> Any:
        """One of the options, by their cumulative weights."""
        return options[bisect(total, self.random() * total[-1])]

    def entry(self, category: str) -> tuple[str, str]:
        """Lemma and irregular form of a word of that category."""
        return self.pick(*_weighted(category, self.known_only, self.style.flatness))

    def word(self, category: str, polarity: int = 0) -> Word:
        pos, sem = lists()["tags"][category]
        if polarity:
            category, sem = f"{category}_{SIGN[polarity]}", f"{sem}-{SIGN[polarity]}"
        lemma, _ = self.entry(category)
        return NOT if lemma == "not" else Word(lemma, pos, sem)

    def pair(self, make: Callable[[], Any], chance: float | None = None) -> list[Any]:
        """One of what `make` makes, or two different ones."""
        made = [make()]
        if self.chance(self.style.pairs if chance is None else chance):
            made += [second] if (second := make()) != made[0] else []
        return made

    # -- phrases ----------------------------------------------------------------------------
    def degree(self) -> list[Word]:
        return [self.word("degree")] if self.chance(0.25) else []

    def adjectives(self, polarity: int, pair: float | None = None) -> list[Word]:
        """An adjective of this polarity, or a pair; a neutral one comes alone."""
        if not polarity:
            return [self.word("adjective")]
        return joined(self.pair(lambda: self.word("adjective", polarity), pair))

    def noun(self, kind: str, topic: str, many: bool) -> Word:
        """A noun of a kind (person, thing, place, or a polar noun's category) and topic."""
        lemma, irregular = self.entry(f"{topic}_{kind}" if topic else kind)
        text = irregular or add_s(lemma) if many else lemma
        return Word(text, "NOUN", kind.replace("noun", "entity").replace("_", "-"), topic=topic)

    def noun_phrase(
        self, kind: str, topic: str = "", polarity: int = 0, names: bool = False
    ) -> tuple[Phrase, bool]:
        """A noun phrase, with an adjective of the polarity if it has one; whether it is plural."""
        if names and kind == "person" and not polarity and self.chance(0.4):
            return Phrase("NP", [self.word("name")]), False
        many = self.chance(0.4)
        inner = [self.noun(kind, topic, many)]
        if polarity:
            inner = [*self.degree(), *self.adjectives(polarity), *inner]
        elif self.chance(0.2):
            inner = [*self.adjectives(0), *inner]
        return Phrase("NP", [self.determiner(many, inner[0].text), *inner]), many

    def determiner(self, many: bool, following: str) -> Word:
        if many and self.chance(0.15):
            return self.word(self.choose(("number_word", "quantifier")))
        one, more, *sem, _ = self.pick(*_determiners())
        one = article(following) if one == "a" else one
        return agreeing((one, more), many, "DET", sem[many])

    def prepositional(self, topic: str = "", polarity: int = 0) -> list[Phrase]:
        preposition, kind = self.word("preposition_place"), "place"
        if polarity or self.chance(0.3):
            preposition, kind = self.word("preposition_time"), "thing"
        return [Phrase("PP", [preposition]), self.noun_phrase(kind, topic, polarity)[0]]

    def attachment(self) -> list[Phrase]:
        """What may stand between a subject and its verb: a prepositional phrase or a relative."""
        if self.chance(0.7):
            preposition = self.word("preposition_attached")
            kind = self.choose(("person", "thing", "place"))
            return [Phrase("PP", [preposition]), self.noun_phrase(kind)[0]]
        agent, _ = self.noun_phrase("person", names=True)
        seen = Word(past(*self.entry("verb")), "VERB", "event")
        return [Phrase("NP", [Word("that", "PRON", "reference")]), agent, Phrase("VP", [seen])]

    def adverb(self, polarity: int) -> Phrase:
        if polarity:
            return Phrase("ADVP", joined(self.pair(lambda: self.word("adverb", polarity))))
        return Phrase("ADVP", [self.word("manner" if self.chance(0.5) else "time")])

    # -- verbs ------------------------------------------------------------------------------
    def be(self, many: bool, negated: bool) -> Phrase:
        verb = agreeing(self.choose((("is", "are"), ("was", "were"))), many, "AUX", "state")
        return Phrase("VP", [verb, self.word("negator")] if negated else [verb])

    def verb(self, category: str, many: bool, negated: bool, sem: str = "event") -> Phrase:
        polar = category.endswith(("_positive", "_negative"))
        entries = self.pair(lambda: self.entry(category)) if polar else [self.entry(category)]
        topic = category.removesuffix("_verb") if category.endswith("_verb") else ""
        present = self.chance(0.5)
        if negated and self.chance(0.6):
            does = ("does", "do") if present else ("did", "did")
            main = [Word(lemma, "VERB", sem, topic=topic) for lemma, _ in entries]
            return Phrase("VP", [agreeing(does, many, "AUX", "tense"), NOT, *joined(main)])
        main = [
            agreeing((add_s(entry[0]), entry[0]) if present else (past(*entry),) * 2, many, "VERB",
                     sem, topic)
            for entry in entries
        ]  # fmt: skip
        words = joined(main)
        if negated:
            while (negator := self.word("negator")) == NOT:
                pass
            words.insert(0, negator)
        return Phrase("VP", words)

    # -- clauses ----------------------------------------------------------------------------
    def subject(
        self, kind: str, topic: str, polarity: int, attach: float
    ) -> tuple[list[Phrase], bool]:
        if self.chance(0.1) and not polarity:
            pronoun, many = self.choose((("he", False), ("she", False), ("they", True)))
            if kind == "person" or many:
                return [Phrase("NP", [Word(pronoun, "PRON", "reference")])], many
        phrase, many = self.noun_phrase(kind, topic, polarity, names=True)
        return [phrase, *(self.attachment() if self.chance(attach) else [])], many

    def clause(
        self, polarity: int, topic: str, cues: int, negated: bool, attach: float
    ) -> list[Phrase]:
        """Phrases of one clause whose polar words (about `cues` of them) agree on `polarity`."""
        if not polarity:
            return self.plain_clause(topic, negated, attach)

        def mine(chance: float) -> str:
            return topic if self.chance(chance) else ""

        inner = -polarity if negated else polarity
        frame, optional = self.choose(FRAMES, FRAME_WEIGHTS)
        # Which places carry a cue: the subject's adjective, then two in the predicate.
        places = list(range(optional))
        wanted = min(cues - (frame != "topical"), optional)
        while len(places) > wanted:
            places.pop(int(self.random() * len(places)))
        first = polarity if 0 in places else 0
        second, third = inner if 1 in places else 0, inner if 2 in places else 0
        kind = "person" if frame == "liking" else self.choose(("person", "thing"))
        kind = "person" if frame == "topical" else kind
        phrases, many = self.subject(kind, mine(0.7), first, attach)
        if frame in ("copula", "linking"):
            is_so = self.be(many, negated) if frame == "copula" else None
            phrases.append(is_so or self.verb("linking", many, negated, "state"))
            words = [*self.degree(), *self.adjectives(inner, 1.0 if second else None)]
            phrases.append(Phrase("ADJP", words))
            return phrases + self.prepositional(mine(0.5), third) if third else phrases
        if frame == "noun":
            phrases.append(self.be(many, negated))
            noun = self.noun(f"noun_{SIGN[inner]}", "", many)
            words = [*self.adjectives(inner), noun] if second else [noun]
            if not many:
                words.insert(0, Word(article(words[0].text), "DET", "indefinite", "several"))
            return [*phrases, Phrase("NP", words)]
        if frame == "topical":
            phrases.append(self.verb(f"{topic}_verb", many, negated))
        else:
            category = f"{frame}_{SIGN[inner]}"
            phrases.append(self.verb(category, many, negated, f"event-{SIGN[inner]}"))
        if frame == "faring":
            phrases += [self.adverb(inner)] if second else []
            return phrases + self.prepositional(mine(0.5), third)
        target = "person" if frame == "affecting" else "thing"
        if frame == "liking" and self.chance(0.4):
            target = "person"
        about = topic if frame == "topical" else mine(0.6)
        phrases.append(self.noun_phrase(target, about, second, names=True)[0])
        if third and frame == "affecting":
            return phrases + self.prepositional(mine(0.5), third)
        return [*phrases, self.adverb(third)] if third else phrases

    def plain_clause(self, topic: str, negated: bool, attach: float) -> list[Phrase]:
        """A clause without polar words."""
        frame = self.choose(("topical", "seen", "copula"), (3, 1.5, 1))
        kind = self.choose(("person", "thing")) if frame == "copula" else "person"
        about = topic if self.chance(0.8) else ""
        phrases, many = self.subject(kind, about, 0, attach)
        if frame == "copula":
            phrases.append(self.be(many, negated))
            phrases.append(Phrase("ADJP", [*self.degree(), *self.adjectives(0)]))
            return phrases + self.prepositional(topic if self.chance(0.5) else "")
        phrases.append(self.verb(f"{topic}_verb" if frame == "topical" else "verb", many, negated))
        phrases.append(self.noun_phrase("thing", topic, names=True)[0])
        if self.chance(0.5):
            return phrases + self.prepositional(topic if self.chance(0.4) else "")
        return [*phrases, self.adverb(0)]

    # -- sentences --------------------------------------------------------------------------
    def sentence(self, polar: float = 0.75) -> Sentence:
        """One sentence of SHORTEST to LONGEST words; `polar` is the chance that it has a side."""
        polarity = self.choose((1, -1)) if self.chance(polar) else 0
        topic = self.choose(TOPICS)
        while True:
            phrases = self.attempt(polarity, topic)
            if SHORTEST <= sum(len(phrase.words) for phrase in phrases) <= LONGEST:
                return Sentence(phrases, polarity, topic)

    def attempt(self, polarity: int, topic: str) -> list[Phrase]:
        style = self.style

        def clause(side: int, cues: int, attach: float) -> list[Phrase]:
            return self.clause(side, topic, cues, self.chance(style.negation), attach)

        opening = []
        if polarity and self.chance(style.comment):
            opening = [Phrase("ADVP", [self.word("comment", polarity)]), COMMA]
        kind = self.choose(("one", "but", "although", "and"), style.kinds)
        if kind == "one":
            phrases = opening + clause(polarity, self.choose(style.cues), 0.4)
            return [*phrases, *([self.adverb(0)] if self.chance(0.2) else []), STOP]
        cues = [self.choose(style.clause_cues), self.choose(style.clause_cues)]
        first = clause(polarity if kind == "and" else -polarity, cues[0], 0.1)
        second = clause(polarity, cues[1], 0.1)
        if kind == "although":
            word = Phrase("SBAR", [self.word("concession")])
            if self.chance(style.leading):
                return [*opening, word, *first, COMMA, *second, STOP]
            return [*opening, *second, word, *first, STOP]
        word = Phrase("O", [AND if kind == "and" else self.word("contrast")])
        return [*opening, *first, COMMA, word, *second, STOP]

    def agreement_pair(self) -> tuple[Sentence, Sentence]:
        """An acceptable sentence, and the same with one determiner or verb in the wrong number."""
        while True:
            good = self.sentence()
            places = [
                (p, w)
                for p, phrase in enumerate(good.phrases)
                for w, word in enumerate(phrase.words)
                if word.other
            ]
            verbs = [place for place in places if good.phrases[place[0]].label == "VP"]
            if not verbs:
                continue
            p, w = self.choose(verbs if self.chance(0.7) else places)
            phrases, words = list(good.phrases), list(good.phrases[p].words)
            words[w] = words[w]._replace(text=words[w].other, other=words[w].text)
            phrases[p] = Phrase(phrases[p].label, words)
            return good, replace(good, phrases=phrases, acceptable=False)
