"""The grammar: sentences with their gold labels and word tags.

A sentence is one clause or two. A clause has a *polarity* (+1, -1, or 0 for none) that all its
polar words agree on: those inside the scope of a negator have the opposite polarity, because the
negator turns it. The sentence's polarity is its only clause's, the last clause's after "but" and
"yet", the main clause's beside "although"; two clauses joined by "and" agree.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from .vocabulary import add_s, article, held_out, lexicon, past, plural

TOPICS = ("arts", "sport", "food", "science")
SIGN = {1: "positive", -1: "negative"}
SHORTEST, LONGEST = 8, 16  # words, punctuation counted
# Determiners: singular, plural, and whether the word itself shows its number.
DETERMINERS = (
    ("the", "the", 10), ("this", "these", 3), ("that", "those", 3), ("every", "all", 1.5),
    ("each", "many", 1.0), ("a", "several", 5), ("my", "my", 1), ("our", "our", 1),
    ("her", "her", 1), ("their", "their", 1),
)  # fmt: skip
DEFINITE = ("the", "this", "these", "that", "those", "my", "our", "her", "their")


class Word(NamedTuple):
    """One word with its tags.

    `other` is the form of the opposite number where the form shows it, `topic` the topic it tells.
    """

    text: str
    pos: str
    sem: str
    other: str = ""
    topic: str = ""


AND = Word("and", "CCONJ", "conjunction")


class Phrase(NamedTuple):
    """A chunk: its label ("O" for words outside any chunk) and its words."""

    label: str
    words: list[Word]


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
        words = [word.text for word in self.tokens]
        return [words[0][0].upper() + words[0][1:], *words[1:]]

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
RAW = Style(
    negation=0.2,
    kinds=(4, 2, 1, 2),
    cues=(2, 3, 4),
    clause_cues=(2,),
    leading=0.5,
    pairs=0.6,
    flatness=1.0,
    comment=0.35,
)


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


class Writer:
    """Writes random sentences, all choices from one `random.Random(seed)`.

    `known_only` leaves out the held-out words, as labelled training data must. `style` says how
    often it negates, contrasts, and comments.
    """

    def __init__(self, seed: str, known_only: bool = False, style: Style | None = None):
        self.random = random.Random(seed).random  # the one source; its stream is fixed by Python
        self.known_only = known_only
        self.style = style or Style()

    # -- choices ----------------------------------------------------------------------------
    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def choose(self, options, weights: Iterable[float] | None = None):
        if weights is None:
            return options[int(self.random() * len(options))]
        total = list(accumulate(weights))
        return options[bisect(total, self.random() * total[-1])]

    def entry(self, category: str) -> tuple[str, str]:
        entries, total = _weighted(category, self.known_only, self.style.flatness)
        return entries[bisect(total, self.random() * total[-1])]

    def lemma(self, category: str) -> str:
        return self.entry(category)[0]

    # -- phrases ----------------------------------------------------------------------------
    def degree(self) -> list[Word]:
        return [Word(self.lemma("degree"), "ADV", "degree")] if self.chance(0.25) else []

    def paired(self, make, pair: float | None = None) -> list[Word]:
        """One word, or two joined by "and", the second of them another word."""
        words = [make()]
        if self.chance(self.style.pairs if pair is None else pair):
            second = make()
            words += [second] if second != words[0] else []
        return self.joined(words)

    @staticmethod
    def joined(words: list[Word]) -> list[Word]:
        return words[:1] + [w for word in words[1:] for w in (AND, word)]

    def adjectives(self, polarity: int, pair: float | None = None) -> list[Word]:
        """An adjective of this polarity, or a pair; a neutral one comes alone."""
        if not polarity:
            return [Word(self.lemma("adjective"), "ADJ", "quality")]
        sign = SIGN[polarity]
        return self.paired(
            lambda: Word(self.lemma(f"adjective_{sign}"), "ADJ", f"quality-{sign}"), pair
        )

    def noun(self, kind: str, topic: str, plural_number: bool) -> Word:
        """A noun of a kind (person, thing, place, or a polar noun's category) and topic."""
        category = f"{topic}_{kind}" if topic else kind
        lemma, irregular = self.entry(category)
        sem = kind.replace("noun", "entity").replace("_", "-")
        text = plural(lemma, irregular) if plural_number else lemma
        return Word(text, "NOUN", sem, topic=topic)

    def noun_phrase(
        self,
        kind: str,
        topic: str = "",
        polarity: int = 0,
        cue: bool = False,
        many=None,
        names: bool = False,
    ) -> tuple[Phrase, bool]:
        """A noun phrase and whether it is plural; with `cue`, one adjective of this polarity."""
        if names and kind == "person" and not cue and self.chance(0.4):
            return Phrase("NP", [Word(self.lemma("name"), "PROPN", "name")]), False
        many = self.chance(0.4) if many is None else many
        inner = [self.noun(kind, topic, many)]
        if cue:
            inner = [*self.degree(), *self.adjectives(polarity), *inner]
        elif not kind.startswith("noun") and self.chance(0.2):
            inner = [*self.adjectives(0), *inner]
        return Phrase("NP", [self.determiner(many, inner[0].text), *inner]), many

    def determiner(self, many: bool, following: str) -> Word:
        if many and self.chance(0.15):
            quantity = self.choose(("number_word", "quantifier"))
            pos = "NUM" if quantity == "number_word" else "DET"
            return Word(self.lemma(quantity), pos, "quantity")
        one, more, _ = self.choose(DETERMINERS, [weight for *_, weight in DETERMINERS])
        one = article(following) if one == "a" else one
        text, other = (more, one) if many else (one, more)
        sem = "definite" if text in DEFINITE else "indefinite"
        sem = "quantity" if text in ("every", "all", "each", "many", "several") else sem
        return Word(text, "DET", sem, other if other != text else "")

    def prepositional(self, topic: str = "", polarity: int = 0, cue: bool = False) -> list[Phrase]:
        preposition = Word(self.lemma("preposition_place"), "ADP", "relation")
        kind = "place"
        if cue or self.chance(0.3):
            preposition = Word(self.lemma("preposition_time"), "ADP", "relation")
            kind = "thing"
        phrase, _ = self.noun_phrase(kind, topic, polarity, cue)
        return [Phrase("PP", [preposition]), phrase]

    def attachment(self) -> list[Phrase]:
        """What may stand between a subject and its verb: a prepositional phrase or a relative."""
        if self.chance(0.7):
            preposition = Word(self.lemma("preposition_attached"), "ADP", "relation")
            kind = self.choose(("person", "thing", "place"))
            return [Phrase("PP", [preposition]), self.noun_phrase(kind)[0]]
        agent, _ = self.noun_phrase("person", names=True)
        lemma, irregular = self.entry("verb")
        seen = Word(past(lemma, irregular), "VERB", "event")
        return [Phrase("NP", [Word("that", "PRON", "reference")]), agent, Phrase("VP", [seen])]

    def adverb(self, polarity: int) -> Phrase:
        if polarity:
            sign = SIGN[polarity]
            words = self.paired(lambda: Word(self.lemma(f"adverb_{sign}"), "ADV", f"manner-{sign}"))
            return Phrase("ADVP", words)
        if self.chance(0.5):
            return Phrase("ADVP", [Word(self.lemma("manner"), "ADV", "manner")])
        return Phrase("ADVP", [Word(self.lemma("time"), "ADV", "time")])

    # -- verbs ------------------------------------------------------------------------------
    def be(self, many: bool, negated: bool) -> Phrase:
        one, more = self.choose((("is", "are"), ("was", "were")))
        text, other = (more, one) if many else (one, more)
        words = [Word(text, "AUX", "state", other)]
        if negated:
            words.append(self.negator())
        return Phrase("VP", words)

    def negator(self, only_not: bool = False) -> Word:
        lemma = "not" if only_not else self.lemma("negator")
        return Word(lemma, "PART" if lemma == "not" else "ADV", "negation")

    def verb(self, category: str, many: bool, negated: bool, sem: str = "event") -> Phrase:
        entries = [self.entry(category)]
        polar = category.endswith(("_positive", "_negative"))
        if polar and self.chance(self.style.pairs):
            second = self.entry(category)
            entries += [second] if second != entries[0] else []
        topic = category.removesuffix("_verb") if category.endswith("_verb") else ""
        present = self.chance(0.5)
        if negated and self.chance(0.6):
            one, more = ("does", "do") if present else ("did", "did")
            text, other = (more, one) if many else (one, more)
            auxiliary = Word(text, "AUX", "tense", other if other != text else "")
            main = [Word(lemma, "VERB", sem, topic=topic) for lemma, _ in entries]
            return Phrase("VP", [auxiliary, self.negator(True), *self.joined(main)])
        main = []
        for lemma, irregular in entries:
            if present:
                text, other = (lemma, add_s(lemma)) if many else (add_s(lemma), lemma)
            else:
                text, other = past(lemma, irregular), ""
            main.append(Word(text, "VERB", sem, other, topic))
        words = self.joined(main)
        if negated:
            negator = self.negator()
            while negator.text == "not":
                negator = self.negator()
            words.insert(0, negator)
        return Phrase("VP", words)

    # -- clauses ----------------------------------------------------------------------------
    def subject(
        self, kind: str, topic: str, polarity: int, cue: bool, attach: float
    ) -> tuple[list[Phrase], bool]:
        if self.chance(0.1) and not cue:
            pronoun, many = self.choose((("he", False), ("she", False), ("they", True)))
            if kind == "person" or many:
                return [Phrase("NP", [Word(pronoun, "PRON", "reference")])], many
        phrase, many = self.noun_phrase(kind, topic, polarity, cue, names=True)
        return [phrase, *(self.attachment() if self.chance(attach) else [])], many

    def clause(self, polarity: int, topic: str, cues: int, negated: bool, attach: float):
        """Phrases of one clause whose polar words (about `cues` of them) agree on `polarity`."""
        if not polarity:
            return self.plain_clause(topic, negated, attach)
        inner = -polarity if negated else polarity
        sign = SIGN[inner]
        frame = self.choose(
            ("copula", "linking", "noun", "liking", "affecting", "faring", "topical"),
            (3, 1, 1, 3, 2.5, 2, 2),
        )
        mine = lambda chance: topic if self.chance(chance) else ""  # noqa: E731
        optional = {"copula": 3, "linking": 2, "noun": 2, "liking": 3, "affecting": 3, "faring": 3,
                    "topical": 3}[frame]  # fmt: skip
        # which of the optional places carry a cue: the subject's adjective, then the predicate's
        wanted = min(cues - (frame != "topical"), optional)
        places = list(range(optional))
        while len(places) > wanted:
            places.pop(int(self.random() * len(places)))
        cue = [place in places for place in range(3)]
        kind = "person" if frame == "liking" else self.choose(("person", "thing"))
        if frame == "topical":
            kind = "person"
        phrases, many = self.subject(kind, mine(0.7), polarity, cue[0], attach)
        event = f"event-{sign}"
        if frame in ("copula", "linking"):
            if frame == "copula":
                phrases.append(self.be(many, negated))
            else:
                phrases.append(self.verb("linking", many, negated, "state"))
            pair = 1.0 if cue[1] else None
            phrases.append(Phrase("ADJP", [*self.degree(), *self.adjectives(inner, pair)]))
            if cue[2]:
                phrases += self.prepositional(mine(0.5), inner, True)
            return phrases
        if frame == "noun":
            phrases.append(self.be(many, negated))
            noun = self.noun(f"noun_{sign}", "", many)
            words = [*self.adjectives(inner), noun] if cue[1] else [noun]
            if not many:
                words.insert(0, Word(article(words[0].text), "DET", "indefinite", "several"))
            return [*phrases, Phrase("NP", words)]
        if frame == "topical":
            phrases.append(self.verb(f"{topic}_verb", many, negated))
        else:
            phrases.append(self.verb(f"{frame}_{sign}", many, negated, event))
        if frame == "faring":
            if cue[1]:
                phrases.append(self.adverb(inner))
            return phrases + self.prepositional(mine(0.5), inner, cue[2])
        target = "person" if frame == "affecting" else "thing"
        if frame == "liking" and self.chance(0.4):
            target = "person"
        target_topic = topic if frame == "topical" else mine(0.6)
        phrases.append(self.noun_phrase(target, target_topic, inner, cue[1], names=True)[0])
        if cue[2]:
            if frame == "affecting":
                phrases += self.prepositional(mine(0.5), inner, True)
            else:
                phrases.append(self.adverb(inner))
        return phrases

    def plain_clause(self, topic: str, negated: bool, attach: float):
        """A clause without polar words."""
        frame = self.choose(("topical", "seen", "copula"), (3, 1.5, 1))
        kind = self.choose(("person", "thing")) if frame == "copula" else "person"
        about = topic if self.chance(0.8) else ""
        phrases, many = self.subject(kind, about, 0, False, attach)
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
    def sentence(self, polarity: int | None = None, topic: str | None = None, polar: float = 0.75):
        """One sentence of SHORTEST to LONGEST words; what is not given is drawn."""
        if polarity is None:
            polarity = self.choose((1, -1)) if self.chance(polar) else 0
        topic = topic or self.choose(TOPICS)
        while True:
            phrases = self.attempt(polarity, topic)
            if SHORTEST <= sum(len(phrase.words) for phrase in phrases) <= LONGEST:
                return Sentence(phrases, polarity, topic)

    def attempt(self, polarity: int, topic: str) -> list[Phrase]:
        style = self.style
        negated = lambda: self.chance(style.negation)  # noqa: E731
        stop = Phrase("O", [Word(".", "PUNCT", "punctuation")])
        comma = Phrase("O", [Word(",", "PUNCT", "punctuation")])
        opening = []
        if polarity and self.chance(style.comment):
            comment = f"comment_{SIGN[polarity]}"
            word = Word(self.lemma(comment), "ADV", comment.replace("_", "-"))
            opening = [Phrase("ADVP", [word]), comma]
        kind = self.choose(("one", "but", "although", "and"), style.kinds)
        if kind == "one":
            cues = self.choose(style.cues)
            phrases = opening + self.clause(polarity, topic, cues, negated(), 0.4)
            if self.chance(0.2):
                phrases.append(self.adverb(0))
            return [*phrases, stop]
        cues = [self.choose(style.clause_cues), self.choose(style.clause_cues)]
        side = polarity if kind == "and" else -polarity
        first = self.clause(side, topic, cues[0], negated(), 0.1)
        second = self.clause(polarity, topic, cues[1], negated(), 0.1)
        if kind == "and":
            word = Phrase("O", [AND])
            return [*opening, *first, comma, word, *second, stop]
        if kind == "but":
            word = Phrase("O", [Word(self.lemma("contrast"), "CCONJ", "contrast")])
            return [*opening, *first, comma, word, *second, stop]
        word = Phrase("SBAR", [Word(self.lemma("concession"), "SCONJ", "contrast")])
        if self.chance(style.leading):
            return [*opening, word, *first, comma, *second, stop]
        return [*opening, *second, word, *first, stop]

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
            phrases = list(good.phrases)
            words = list(phrases[p].words)
            words[w] = words[w]._replace(text=words[w].other, other=words[w].text)
            phrases[p] = Phrase(phrases[p].label, words)
            return good, replace(good, phrases=phrases, acceptable=False)
