"""The grammar: sentences with their gold labels and word tags.

A sentence is one clause or two. A clause has a *polarity* (+1, -1, or 0 for none) that all its
polar words agree on: those inside the scope of a negator have the opposite polarity, because the
negator turns it. The sentence's polarity is its only clause's, the last clause's after "but" and
"yet", the main clause's beside "although"; two clauses joined by "and" agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from .vocabulary import add_s, article, held_out, lexicon, lists, past

TOPICS = ("arts", "sport", "food", "science")
SIGN = {1: "positive", -1: "negative"}
SHORTEST, LONGEST = 8, 16  # words, punctuation counted
NEGATED = 0.2  # of clauses
# What a clause with a polarity is built around, in how many places a polar word can stand beside
# it, and how often.
FRAMES = {
    "copula": (3, 3), "linking": (2, 1), "noun": (2, 1), "liking": (3, 3), "affecting": (3, 2.5),
    "faring": (3, 2), "topical": (3, 2),
}  # fmt: skip


class Word(NamedTuple):
    text: str
    pos: str  # a universal-dependency name
    sem: str
    other: str = ""  # the form of the opposite number, where the form shows it
    topic: str = ""  # that it tells


# A chunk: its label ("O" for words outside any chunk) and its words.
Phrase = tuple[str, list[Word]]
AND = Word("and", "CCONJ", "conjunction")
NOT = Word("not", "PART", "negation")
COMMA, STOP = (("O", [Word(mark, "PUNCT", "punctuation")]) for mark in ",.")


class Sentence(NamedTuple):
    tokens: list[Word]
    chunks: list[str]  # IOB2
    polarity: int
    topic: str
    acceptable: bool = True

    @property
    def words(self) -> list[str]:
        first, *others = (word.text for word in self.tokens)
        return [first[0].upper() + first[1:], *others]

    @property
    def text(self) -> str:
        return " ".join(self.words).replace(" ,", ",").replace(" .", ".")

    @property
    def tags(self) -> dict[str, list[str]]:
        _, pos, sem, *_ = map(list, zip(*self.tokens, strict=True))
        return {"pos": pos, "chunk": self.chunks, "sem": sem}


class Style(NamedTuple):
    """What a text is like; the defaults are the labelled tasks'."""

    kinds: tuple[float, ...] = (5, 3, 1.5, 1)  # weights of one clause, but, although, and
    cues: tuple[int, ...] = (2, 3)  # polar words of a single clause, equally likely
    clause_cues: tuple[int, ...] = (1, 2)  # of each of two clauses
    leading: float = 0.9  # chance that an "although" clause comes first
    pairs: float = 0.1  # chance that a polar word comes as a pair, "good and lovely"
    flatness: float = 8.0  # the word of rank r = 0, 1, ... has the weight 1 / (r + flatness)
    comment: float = 0.0  # chance that a polar sentence opens with "Luckily," or the like


TASK = Style()
# Raw text says what it feels more plainly than the tasks do: that is what makes the polarity of
# words learnable from it in minutes.
RAW = Style((4, 2, 1, 2), (2, 3, 4), (2,), leading=0.5, pairs=0.6, flatness=1.0, comment=0.35)


@cache
def _entries(category: str, known_only: bool, flatness: float) -> tuple[list[Any], list[float]]:
    """A category's entries and their cumulative weights, without held-out words if asked."""
    if category == "determiners":
        listed = lists()[category]
        return listed, list(accumulate(weight for *_, weight in listed))
    left_out = held_out() if known_only else ()
    ranked = [(rank, e) for rank, e in enumerate(lexicon()[category]) if e[0] not in left_out]
    return [e for _, e in ranked], list(accumulate(1 / (rank + flatness) for rank, _ in ranked))


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

    def __init__(self, seed: str, known_only: bool = False, style: Style = TASK):
        self.random = random.Random(seed)  # the one source
        self.known_only = known_only
        self.style = style

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choose(self, options: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        return self.random.choices(options, weights)[0]

    def maybe(self, topic: str, probability: float) -> str:
        return topic if self.chance(probability) else ""

    def entry(self, category: str) -> Any:
        """Lemma and irregular form of a word of that category."""
        entries, total = _entries(category, self.known_only, self.style.flatness)
        return self.random.choices(entries, cum_weights=total)[0]

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

    def degree(self) -> list[Word]:
        return [self.word("degree")] if self.chance(0.25) else []

    def adjectives(self, polarity: int, pair: float | None = None) -> list[Word]:
        """An adjective of this polarity, or a pair; a neutral one comes alone."""
        if not polarity:
            return [self.word("adjective")]
        return joined(self.pair(lambda: self.word("adjective", polarity), pair))

    def adverb(self, polarity: int) -> Phrase:
        if polarity:
            return "ADVP", joined(self.pair(lambda: self.word("adverb", polarity)))
        return "ADVP", [self.word("manner" if self.chance(0.5) else "time")]

    def noun(self, kind: str, topic: str, many: bool) -> Word:
        """A noun of a kind (person, thing, place, or a polar noun's category) and topic."""
        lemma, irregular = self.entry(f"{topic}_{kind}" if topic else kind)
        text = irregular or add_s(lemma) if many else lemma
        return Word(text, "NOUN", kind.replace("noun", "entity").replace("_", "-"), topic=topic)

    def determiner(self, many: bool, following: str) -> Word:
        if many and self.chance(0.15):
            return self.word(self.choose(("number_word", "quantifier")))
        one, more, *sem, _ = self.entry("determiners")
        one = article(following) if one == "a" else one
        return agreeing((one, more), many, "DET", sem[many])

    def noun_phrase(self, kind: str, topic="", polarity=0, names=False) -> tuple[Phrase, bool]:
        """A noun phrase, with an adjective of the polarity if it has one; whether it is plural."""
        if names and kind == "person" and not polarity and self.chance(0.4):
            return ("NP", [self.word("name")]), False
        many = self.chance(0.4)
        inner = [self.noun(kind, topic, many)]
        if polarity:
            inner = [*self.degree(), *self.adjectives(polarity), *inner]
        elif self.chance(0.2):
            inner = [*self.adjectives(0), *inner]
        return ("NP", [self.determiner(many, inner[0].text), *inner]), many

    def prepositional(self, topic: str = "", polarity: int = 0) -> list[Phrase]:
        preposition, kind = self.word("preposition_place"), "place"
        if polarity or self.chance(0.3):
            preposition, kind = self.word("preposition_time"), "thing"
        return [("PP", [preposition]), self.noun_phrase(kind, topic, polarity)[0]]

    def attachment(self) -> list[Phrase]:
        """What may stand between a subject and its verb: a prepositional phrase or a relative."""
        if self.chance(0.7):
            preposition = self.word("preposition_attached")
            kind = self.choose(("person", "thing", "place"))
            return [("PP", [preposition]), self.noun_phrase(kind)[0]]
        agent, _ = self.noun_phrase("person", names=True)
        seen = Word(past(*self.entry("verb")), "VERB", "event")
        return [("NP", [Word("that", "PRON", "reference")]), agent, ("VP", [seen])]

    def subject(self, kind: str, topic: str, polarity: int, attach: float):
        """Its phrases, and whether it is plural."""
        if self.chance(0.1) and not polarity:
            pronoun, many = self.choose((("he", False), ("she", False), ("they", True)))
            if kind == "person" or many:
                return [("NP", [Word(pronoun, "PRON", "reference")])], many
        phrase, many = self.noun_phrase(kind, topic, polarity, names=True)
        return [phrase, *(self.attachment() if self.chance(attach) else [])], many

    def be(self, many: bool, negated: bool) -> Phrase:
        verb = agreeing(self.choose((("is", "are"), ("was", "were"))), many, "AUX", "state")
        return "VP", [verb, self.word("negator")] if negated else [verb]

    def verb(self, category: str, many: bool, negated: bool, sem: str = "event") -> Phrase:
        polar = category.endswith(("_positive", "_negative"))
        entries = self.pair(lambda: self.entry(category)) if polar else [self.entry(category)]
        topic = category.removesuffix("_verb") if category.endswith("_verb") else ""
        present = self.chance(0.5)
        if negated and self.chance(0.6):
            does = ("does", "do") if present else ("did", "did")
            main = [Word(lemma, "VERB", sem, topic=topic) for lemma, _ in entries]
            return "VP", [agreeing(does, many, "AUX", "tense"), NOT, *joined(main)]
        forms = [(add_s(e[0]), e[0]) if present else (past(*e), past(*e)) for e in entries]
        words = joined([agreeing(form, many, "VERB", sem, topic) for form in forms])
        if negated:
            while (negator := self.word("negator")) == NOT:
                pass
            words.insert(0, negator)
        return "VP", words

    def clause(
        self, polarity: int, topic: str, cues: int, negated: bool, attach: float
    ) -> list[Phrase]:
        """One clause whose polar words (about `cues` of them) agree on `polarity`."""
        if not polarity:
            return self.plain_clause(topic, negated, attach)
        inner = -polarity if negated else polarity
        sign = SIGN[inner]
        frame = self.choose(list(FRAMES), [often for _, often in FRAMES.values()])
        # Which places carry a cue: the subject's adjective, then two in the predicate.
        places = list(range(FRAMES[frame][0]))
        while len(places) > cues - (frame != "topical"):
            places.remove(self.choose(places))
        first = polarity if 0 in places else 0
        second, third = (inner if place in places else 0 for place in (1, 2))
        kind = "person" if frame == "liking" else self.choose(("person", "thing"))
        kind = "person" if frame == "topical" else kind
        phrases, many = self.subject(kind, self.maybe(topic, 0.7), first, attach)
        if frame in ("copula", "noun"):
            phrases.append(self.be(many, negated))
        else:
            plain = {"linking": ("linking", "state"), "topical": (f"{topic}_verb", "event")}
            category, sem = plain.get(frame, (f"{frame}_{sign}", f"event-{sign}"))
            phrases.append(self.verb(category, many, negated, sem))
        if frame in ("copula", "linking"):
            pair = 1.0 if second else None
            phrases.append(("ADJP", [*self.degree(), *self.adjectives(inner, pair)]))
        elif frame == "noun":
            noun = self.noun(f"noun_{sign}", "", many)
            words = [*self.adjectives(inner), noun] if second else [noun]
            if not many:
                words.insert(0, Word(article(words[0].text), "DET", "indefinite", "several"))
            phrases.append(("NP", words))
        elif frame == "faring":
            phrases += [self.adverb(inner)] if second else []
        else:
            person = frame == "affecting" or (frame == "liking" and self.chance(0.4))
            about = topic if frame == "topical" else self.maybe(topic, 0.6)
            target = "person" if person else "thing"
            phrases.append(self.noun_phrase(target, about, second, names=True)[0])
        if frame == "faring" or (third and frame in ("copula", "affecting")):
            return phrases + self.prepositional(self.maybe(topic, 0.5), third)
        return [*phrases, self.adverb(third)] if third else phrases

    def plain_clause(self, topic: str, negated: bool, attach: float) -> list[Phrase]:
        """A clause without polar words."""
        frame = self.choose(("topical", "seen", "copula"), (3, 1.5, 1))
        kind = self.choose(("person", "thing")) if frame == "copula" else "person"
        phrases, many = self.subject(kind, self.maybe(topic, 0.8), 0, attach)
        if frame == "copula":
            phrases.append(self.be(many, negated))
            phrases.append(("ADJP", [*self.degree(), *self.adjectives(0)]))
            return phrases + self.prepositional(self.maybe(topic, 0.5))
        phrases.append(self.verb(f"{topic}_verb" if frame == "topical" else "verb", many, negated))
        phrases.append(self.noun_phrase("thing", topic, names=True)[0])
        if self.chance(0.5):
            return phrases + self.prepositional(self.maybe(topic, 0.4))
        return [*phrases, self.adverb(0)]

    def sentence(self, polar: float = 0.75) -> Sentence:
        """One sentence of SHORTEST to LONGEST words; `polar` is the chance that it has a side."""
        polarity = self.choose((1, -1)) if self.chance(polar) else 0
        topic = self.choose(TOPICS)
        length = 0
        while not SHORTEST <= length <= LONGEST:
            phrases = self.attempt(polarity, topic)
            length = sum(len(words) for _, words in phrases)
        chunks = [
            label if label == "O" else ("I-" if place else "B-") + label
            for label, words in phrases
            for place in range(len(words))
        ]
        return Sentence([w for _, words in phrases for w in words], chunks, polarity, topic)

    def attempt(self, polarity: int, topic: str) -> list[Phrase]:
        style = self.style

        def clause(side: int, cues: int, attach: float) -> list[Phrase]:
            return self.clause(side, topic, cues, self.chance(NEGATED), attach)

        opening = []
        if polarity and self.chance(style.comment):
            opening = [("ADVP", [self.word("comment", polarity)]), COMMA]
        kind = self.choose(("one", "but", "although", "and"), style.kinds)
        if kind == "one":
            phrases = opening + clause(polarity, self.choose(style.cues), 0.4)
            return [*phrases, *([self.adverb(0)] if self.chance(0.2) else []), STOP]
        cues = [self.choose(style.clause_cues), self.choose(style.clause_cues)]
        first = clause(polarity if kind == "and" else -polarity, cues[0], 0.1)
        second = clause(polarity, cues[1], 0.1)
        if kind == "although":
            although = ("SBAR", [self.word("concession")])
            if self.chance(style.leading):
                return [*opening, although, *first, COMMA, *second, STOP]
            return [*opening, *second, although, *first, STOP]
        word = AND if kind == "and" else self.word("contrast")
        return [*opening, *first, COMMA, ("O", [word]), *second, STOP]

    def agreement_pair(self) -> tuple[Sentence, Sentence]:
        """An acceptable sentence, and the same with one determiner or verb in the wrong number."""
        verbs: list[int] = []
        while not verbs:
            good = self.sentence()
            places = [place for place, word in enumerate(good.tokens) if word.other]
            verbs = [place for place in places if good.chunks[place].endswith("VP")]
        place = self.choose(verbs if self.chance(0.7) else places)
        tokens = list(good.tokens)
        changed = tokens[place]
        tokens[place] = changed._replace(text=changed.other, other=changed.text)
        return good, good._replace(tokens=tokens, acceptable=False)
