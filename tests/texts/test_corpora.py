"""Corpora: the words and labels of the file, all of them, or one line that says what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from healing_utils import organism
from healing_utils.base.errors import HealingError
from healing_utils.texts.corpora import Corpus, TaggedSentences, load_corpus


def tagged(*sentences: str) -> TaggedSentences:
    """``the/D cat/N`` and so on."""
    pairs = [[token.rsplit("/", 1) for token in s.split()] for s in sentences]
    return TaggedSentences([[w for w, _ in s] for s in pairs], [[t for _, t in s] for s in pairs])


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return str(path)


def refused(match: str, *arguments, **settings) -> None:
    with pytest.raises(HealingError, match=match) as caught:
        load_corpus(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_sentences_know_their_size_and_their_content():
    data = tagged("the/D cat/N sat/V", "cats/N sat/V")
    assert (len(data), data.size) == (2, 5)
    assert data.take([1, 0]) == tagged("cats/N sat/V", "the/D cat/N sat/V")
    others = (data.take([1, 0]), tagged("the/D cat/N sat/V cats/N sat/V"),
              tagged("the/D cat/N sat/V", "cats/N sat/N"), data.take([0]))  # fmt: skip
    assert len({data.sha(), data.take([0, 1]).sha(), *(other.sha() for other in others)}) == 5


def test_a_draw_varies_training_by_seed_and_never_the_test():
    train, test = (tagged(*[f"w{i}/A x/B" for i in range(count)]) for count in (50, 30))
    corpus = Corpus("c", "pos", train, test, {"traces": 1})
    draws = [corpus.draw(seed, 20, 10) for seed in range(4)]
    assert all((len(d.train), len(d.test)) == (20, 10) for d in draws)
    assert len({d.train.sha() for d in draws}) == 4 and len({d.test.sha() for d in draws}) == 1
    assert draws[2] == corpus.draw(2, 20, 10)
    firsts = {words[0] for words in draws[0].train.words}
    assert len(firsts) == 20 and max(int(w[1:]) for w in firsts) > 25  # not just the first ones
    assert corpus.draw(0, None, None) == corpus == corpus.draw(0, 50)
    for sizes in ((51, None), (0, None), (10, 31), (10, -1)):
        with pytest.raises(HealingError, match="sentences asked for: need 1 to"):
            corpus.draw(0, *sizes)


# -- by name -------------------------------------------------------------------------------------


def test_the_organism_is_tagged_by_its_grammar():
    for column in organism.TAGS:
        corpus = load_corpus("organism", column)
        assert (corpus.column, corpus.dropped) == (column, {})
        for part, split in ((corpus.train, "train"), (corpus.test, "test")):
            pairs = [(words, tags[column]) for words, tags in organism.tagged_sentences(split)]
            assert list(zip(part.words, part.labels, strict=True)) == pairs
    assert load_corpus("organism").column == "pos"
    refused("unknown column of organism 'chunks'.*Did you mean 'chunk'", "organism", "chunks")
    refused("has its own test part", "organism", test="x.conllu")
    refused("unknown corpus .* 'conll2001'.*Did you mean 'conll2000'", "conll2001")


@pytest.fixture
def nltk_data(tmp_path, monkeypatch):
    """An empty NLTK data folder, and corpora that look for their data again."""
    corpora = pytest.importorskip("nltk.corpus")
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    readers = (corpora.conll2000, corpora.treebank)
    for reader in readers:
        reader._unload()
    yield tmp_path / "corpora"
    for reader in readers:
        reader._unload()


def test_conll2000_has_chunks_and_parts_of_speech(nltk_data):
    refused(r"nltk\.download\('conll2000'\)", "conll2000")  # no data yet
    train = "The DT B-NP\ncat NN I-NP\nsat VBD B-VP\n. . O\n\nCats NNS B-NP\nsat VBD B-VP\n\n"
    write(nltk_data / "conll2000" / "train.txt", train)
    write(nltk_data / "conll2000" / "test.txt", "Well RB B-ADVP\n, , O\ncats NNS B-NP\n\n")
    corpus = load_corpus("conll2000")
    assert (corpus.name, corpus.column, corpus.dropped) == ("conll2000", "chunk", {})
    assert corpus.train == tagged("The/B-NP cat/I-NP sat/B-VP ./O", "Cats/B-NP sat/B-VP")
    assert corpus.test == tagged("Well/B-ADVP ,/O cats/B-NP") and corpus.unseen == {"B-ADVP": 1}
    assert load_corpus("conll2000", "pos").test == tagged("Well/RB ,/, cats/NNS")


def test_treebank_scores_its_last_files_and_drops_traces(nltk_data):
    for i in range(10):
        trees = f"( (S (NP-SBJ (NN word{i}) ) (VP (VBD sat) (NP (-NONE- *-1) )) (. .) ))\n"
        trees += "( (S (NP (-NONE- *)) ))\n" if i == 3 else ""
        write(nltk_data / "treebank" / "combined" / f"wsj_{i + 1:04}.mrg", trees)
    corpus = load_corpus("treebank")
    assert corpus.train == tagged(*[f"word{i}/NN sat/VBD ./." for i in range(8)])
    assert corpus.test == tagged("word8/NN sat/VBD ./.", "word9/NN sat/VBD ./.")
    assert corpus.dropped == {"traces": 11, "empty sentences": 1}


# -- CoNLL-U -------------------------------------------------------------------------------------

# The project's own sentences. One has a multiword token, one an empty node, one only a comment.
CONLLU = """\
# sent_id = 1
# text = Cats can't sleep
1\tCats\tcat\tNOUN\tNNS\tNumber=Plur\t4\tnsubj\t4:nsubj\t_
2-3\tcan't\t_\t_\t_\t_\t_\t_\t_\t_
2\tca\tcan\tAUX\tMD\tVerbForm=Fin\t4\taux\t4:aux\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t4:advmod\t_
4\tsleep\tsleep\tVERB\tVB\tVerbForm=Inf\t0\troot\t0:root\tSpaceAfter=No

# sent_id = 2
1\tA\ta\tDET\tDT\tDefinite=Ind|PronType=Art\t2\tdet\t2:det\t_
2\tmat\tmat\tNOUN\tNN\tNumber=Sing\t0\troot\t0:root\t_
2.1\tlies\tlie\tVERB\t_\t_\t_\t_\t2:x\t_

# a comment alone

1\tSleep\tsleep\tVERB\tVB\tMood=Imp\t0\troot\t0:root\t_
"""


@pytest.fixture
def treebank(tmp_path) -> Path:
    write(tmp_path / "ud" / "xx_own-ud-train.conllu", CONLLU)
    write(tmp_path / "ud" / "xx_own-ud-dev.conllu", CONLLU)
    test = "1\tMats\tmat\tX\tNNS\tNumber=Plur|Case=Nom\t0\troot\t_\t_\n"
    write(tmp_path / "ud" / "xx_own-ud-test.conllu", test)
    return tmp_path / "ud"


@pytest.mark.parametrize(
    ("column", "labels", "test"),
    [
        ("upos", "NOUN AUX PART VERB DET NOUN VERB", "X"),
        ("xpos", "NNS MD RB VB DT NN VB", "NNS"),
        ("lemma", "cat can not sleep a mat sleep", "mat"),
        ("deprel", "nsubj aux advmod root det root root", "root"),
        ("head", "4 4 4 0 2 0 0", "0"),
        ("Number", "Plur _ _ _ _ Sing _", "Plur"),
        ("feats", "Number=Plur VerbForm=Fin _ VerbForm=Inf Definite=Ind|PronType=Art Number=Sing "
         "Mood=Imp", "Case=Nom|Number=Plur"),
    ],
)  # fmt: skip
def test_every_column_of_a_treebank_can_be_probed(treebank, column, labels, test):
    corpus = load_corpus(str(treebank), column)
    assert corpus.train.words == [["Cats", "ca", "n't", "sleep"], ["A", "mat"], ["Sleep"]]
    assert [label for sentence in corpus.train.labels for label in sentence] == labels.split()
    assert corpus.test == TaggedSentences([["Mats"]], [[test]])
    assert corpus.dropped == {"multiword ranges": 1, "empty nodes": 1, "empty sentences": 1}


def test_the_treebanks_folder_its_training_file_and_a_variable_are_the_same(treebank, monkeypatch):
    monkeypatch.setenv("OWN_UD", str(treebank))
    train = "${OWN_UD}/xx_own-ud-train.conllu"
    by_folder = load_corpus("$OWN_UD")
    assert by_folder == load_corpus(train) and by_folder.column == "upos"
    assert by_folder == load_corpus(train, test="$OWN_UD/xx_own-ud-test.conllu")
    assert load_corpus(train, test="$OWN_UD/xx_own-ud-dev.conllu").test == by_folder.train
    refused("a.txt: line 1 has 1 columns; need 10", train, test=write(treebank / "a.txt", "a A\n"))
    monkeypatch.delenv("OWN_UD")
    refused(r"variable \$OWN_UD in '\$OWN_UD/x.conllu' is not set", "$OWN_UD/x.conllu")


def test_what_a_treebank_has_not_got_is_refused(treebank, tmp_path):
    folder = str(treebank)
    refused("unknown column .* 'uposs'; allowed: upos, .*Did you mean 'upos'", folder, "uposs")
    refused("allowed: .*, Definite, Mood, Number, .*Did you mean 'Number'", folder, "Numbre")
    refused("no such file or folder: .*gone.conllu", str(tmp_path / "gone.conllu"))
    refused("folder .* holds 0 files named .*-ud-train.conllu", str(tmp_path))
    write(treebank / "yy-ud-train.conllu", CONLLU)
    refused(r"holds 2 files .*\(xx_own-ud-train.conllu, yy-ud-train.conllu\): need one", folder)


# -- columns -------------------------------------------------------------------------------------

PLAIN = "The DT DEF\ncat NN CON\n\nIt PRP PRO\nsat VBD EPS\n\nCats NNS CON\n"
SENTENCES = [(["The", "cat"], ["DEF", "CON"]), (["It", "sat"], ["PRO", "EPS"]), (["Cats"], ["CON"])]


def in_any_order(corpus: Corpus) -> list:
    parts = (corpus.train, corpus.test)
    return sorted(pair for p in parts for pair in zip(p.words, p.labels, strict=True))


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        (PLAIN, {}),
        (PLAIN.replace(" ", "\t"), {}),
        (PLAIN.replace(" ", "   "), {}),
        (PLAIN.replace("\n", "\r\n"), {}),
        (PLAIN.replace("\n", "\r"), {}),
        (PLAIN.replace("NN CON\n\nIt", "NN CON\r\n \r\nIt").replace("DEF\n", "DEF\r"), {}),
        ("\ufeff\n\n" + PLAIN + "\n\n\n", {}),
        (PLAIN.replace("\n\nIt", "\n\n\n\nIt"), {"empty sentences": 2}),
        (PLAIN.rstrip("\n"), {}),
        ("-DOCSTART- -X- -X-\n\n" + PLAIN, {"document marks": 1}),  # CoNLL-2003
        ("-DOCSTART-\n\n" + PLAIN.replace("\n\n", "\n\n-DOCSTART-\n\n", 1), {"document marks": 2}),
        (PLAIN.replace("\n\n", "\n-DOCSTART-\n", 1), {"document marks": 1}),
        ("#begin document (a); part 000\n"  # CoNLL-2012
         + PLAIN.replace("\n\n", "\n\n#end document\n#begin document (b)\n", 1),
         {"document marks": 3}),
    ],
)  # fmt: skip
def test_a_file_of_columns_reads_the_same_however_it_is_written(tmp_path, text, dropped):
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    assert in_any_order(corpus) == sorted(SENTENCES) and corpus.column == "last"
    assert corpus.dropped == dropped


def test_the_column_is_a_number_or_the_last(tmp_path):
    file = write(tmp_path / "a.txt", PLAIN)
    for column in ("last", 2, "2", -1, "-1", None):
        assert in_any_order(load_corpus(file, column)) == sorted(SENTENCES)
    tags = [["DT", "NN"], ["PRP", "VBD"], ["NNS"]]
    words = [words for words, _ in SENTENCES]
    assert in_any_order(load_corpus(file, 1)) == sorted(zip(words, tags, strict=True))
    # The Parallel Meaning Bank's releases put the tag first.
    turned = write(tmp_path / "b.txt", "DEF\tThe\nCON\tcat\n\nPRO\tIt\nEPS\tsat\n\nCON\tCats\n")
    assert in_any_order(load_corpus(turned, 0, words=1)) == sorted(SENTENCES)
    refused("unknown column 'sem'; .*a number, counted from 0, or last", file, "sem")
    for wrong in (3, -4, 0):
        refused(
            f"a.txt: it has 3 columns, .* {wrong} has no labels; allowed .* 0 to 2", file, wrong
        )
    refused("it has 3 columns, with the words in column -1", file, words=-1)


def test_blanks_inside_words_survive_where_tabs_separate(tmp_path):
    file = write(tmp_path / "a.txt", "New York\tGPE\n10\u00a0000\tQUC\n\nit\tPRO\nis\tNOW\n")
    assert in_any_order(load_corpus(file)) == [
        (["New York", "10\u00a0000"], ["GPE", "QUC"]),
        (["it", "is"], ["PRO", "NOW"]),
    ]
    supertags = write(tmp_path / "b.txt", "# NP\nsat (S[dcl]\\NP)/PP\n\n10\u00a0000 N/N\nmats N\n")
    assert in_any_order(load_corpus(supertags)) == [
        (["#", "sat"], ["NP", "(S[dcl]\\NP)/PP"]),
        (["10\u00a0000", "mats"], ["N/N", "N"]),
    ]


MAT = "2\tmat\tmat\tNOUN\tNN\tNumber=Sing\t0\troot\t0:root\t_"  # line 11


@pytest.mark.parametrize(
    ("name", "text", "match"),
    [
        ("a.txt", "a A\nb\n\nc C\n", "a.txt: line 2 has 1 columns where the first line has 2"),
        ("a.txt", "a A\n\nNew York B\n", "line 3 has 3 columns where the first line has 2"),
        ("a.txt", "Token POS\na A\n\nb B\n", r"seems to begin with a header \('Token POS'\)"),
        ("a.txt", "a\0 A\0\n", "a.txt: line 1 is not text in UTF-8"),
        ("a.txt", "a\tA\nb\t\n\nc\tC\n", "a.txt: line 2 has an empty word or label"),
        ("a.txt", "one\ntwo\n", "a.txt: it has 1 columns, with the words in column 0"),
        ("a.txt", "\n\n\n", "0 distinct sentences"),
        ("a.txt", "a A\nb B\n", "1 distinct sentences: are there blank lines between"),
        ("a.txt", "a A\n\nb A\n", "column 'last' has only the label 'A'"),
        ("a.txt", "a A\nb B\n\n\udce9 A\n", "cannot read .*a.txt: 'utf-8' codec"),
        ("a.conllu", CONLLU.replace(MAT, "2\tmat"), "a.conllu: line 11 has 2 columns; need 10"),
        ("a.conllu", CONLLU.replace(MAT, "x" + MAT[1:]), "line 11 begins with 'x' where word 2"),
        ("a.conllu", CONLLU.replace(MAT, "3" + MAT[1:]), "line 11 begins with '3' where word 2"),
    ],
)
def test_a_malformed_file_names_file_and_line(tmp_path, name, text, match):
    refused(match, write(tmp_path / name, text))


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("b.txt", str(tmp_path / "pipe.txt"), "x" * 5000 + ".txt", "a\0.txt"):
        refused("no such file or folder: ", write(tmp_path / "a.txt", PLAIN), test=name)


# -- the part that is held out -------------------------------------------------------------------


def lone(path: Path, sentences: int, tags: str = "AB") -> str:
    return write(path, "\n".join(f"w{i} {tags[i % 2]}\nx {tags[0]}\n" for i in range(sentences)))


def test_a_lone_file_holds_out_a_fifth_always_the_same(tmp_path):
    corpus = load_corpus(lone(tmp_path / "a.txt", 50))
    assert (len(corpus.train), len(corpus.test)) == (40, 10)
    assert len({tuple(w) for p in (corpus.train, corpus.test) for w in p.words}) == 50
    assert corpus.test.words != [[f"w{i}", "x"] for i in range(40, 50)]  # drawn, not the tail
    again = load_corpus(lone(tmp_path / "b.txt", 50))
    assert (again.train, again.test) == (corpus.train, corpus.test)
    relabelled = load_corpus(lone(tmp_path / "c.txt", 50, tags="CD"))
    assert relabelled.test.words == corpus.test.words  # another column is scored on the same words
    two = load_corpus(lone(tmp_path / "e.txt", 2))
    assert (len(two.train), len(two.test)) == (1, 1)


def test_equal_sentences_stay_on_one_side(tmp_path):
    text = "\n".join(f"w{i % 10} {'AB'[i % 2]}\n" for i in range(100))
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    train, test = ({tuple(w) for w in p.words} for p in (corpus.train, corpus.test))
    assert (len(train), len(test), len(corpus.train), len(corpus.test)) == (8, 2, 80, 20)


def test_a_training_file_takes_its_sibling_as_the_test(tmp_path):
    train = lone(tmp_path / "sem-train.tsv", 10)
    assert len(load_corpus(train).train) == 8  # no sibling: a fifth is held out
    lone(tmp_path / "sem-test.tsv", 3)
    corpus = load_corpus(train)
    assert (corpus.name, len(corpus.train), len(corpus.test)) == ("sem", 10, 3)
    training = lone(tmp_path / "sem-training.tsv", 10)
    assert len(load_corpus(training).train) == 8


# -- the real things -----------------------------------------------------------------------------


def test_conll2000_has_the_published_sizes():
    try:
        corpus = load_corpus("conll2000")
    except HealingError as error:
        pytest.skip(f"CoNLL-2000 is not stored here: {error}")
    # Tjong Kim Sang and Buchholz 2000, section 2: 211,727 and 47,377 tokens.
    assert (len(corpus.train), corpus.train.size) == (8936, 211727)
    assert (len(corpus.test), corpus.test.size) == (2012, 47377)
    kinds = {label for s in corpus.train.labels for label in s}
    assert len({kind[2:] for kind in kinds} - {""}) == 11 and corpus.unseen == {"I-LST": 2}


def test_ewt_has_the_universal_tags():
    if "UD_EWT" not in os.environ:
        pytest.skip("the English Web Treebank is not stored here: UD_EWT is not set")
    corpus = load_corpus("$UD_EWT/en_ewt-ud-test.conllu")  # the small part, cut into two
    # The treebank's own statistics: 2,077 sentences, 25,094 words.
    assert len(corpus.train) + len(corpus.test) == 2077
    assert corpus.train.size + corpus.test.size == 25094
    assert len({label for s in corpus.train.labels for label in s}) == 17
    assert corpus.dropped["multiword ranges"] > 0
