"""The paper's own profile, rehearsed on stand-ins under the hub's names.

``python tests/rehearsal.py FOLDER`` (`make rehearse`) builds a hub cache and NLTK's folder there:
each model a few small random layers of its real architecture, with a tokenizer of its real kind
trained on the project's own text; each data set its real columns, splits and class names, with
made-up rows. Then it runs the profile `paper` on them, all models, tasks, scans and notebooks, with
fewer examples and two seeds. What it scores means nothing; what it finds is what a first user would
find.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
import transformers as hf
import yaml
from datasets.arrow_writer import ArrowWriter
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from healing_utils import organism
from healing_utils.base.paths import project_root

REVISION = "0" * 40
SIZE = {
    "hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 300,
}  # fmt: skip
BERT = ("wordpiece", hf.BertConfig, SIZE)
MODELS = {
    "google-bert/bert-base-uncased": BERT,
    "google-bert/bert-base-cased": BERT,
    "google-bert/bert-large-uncased": ("wordpiece", hf.BertConfig, SIZE | {"hidden_size": 24}),
    "distilbert/distilbert-base-uncased": (
        "wordpiece", hf.DistilBertConfig,
        {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24},
    ),
    "FacebookAI/roberta-base": ("bytes", hf.RobertaConfig, SIZE | {"type_vocab_size": 1}),
    "xlnet/xlnet-base-cased": (
        "unigram", hf.XLNetConfig, {"d_model": 16, "n_layer": 6, "n_head": 2, "d_inner": 24},
    ),
}  # fmt: skip
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")


def _classes(*names: str) -> datasets.ClassLabel:
    return datasets.ClassLabel(names=list(names))


NEWS = _classes("World", "Sports", "Business", "Sci/Tech")
FEELINGS = _classes("sadness", "joy", "love", "anger", "fear", "surprise")
THINGS = _classes(
    "Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder",
    "MeanOfTransportation", "Building", "NaturalPlace", "Village", "Animal", "Plant", "Album",
    "Film", "WrittenWork",
)  # fmt: skip
ENTAILS = _classes("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
GLUE_SPLITS = ("train", "validation", "test")
MATCHED = ("train", "validation_matched", "validation_mismatched", "test_matched")
# Repository, configuration: text columns, label, splits; GLUE hides the labels of its tests.
DATA: dict[tuple[str, str], tuple[tuple[str, ...], Any, tuple[str, ...]]] = {
    ("stanfordnlp/sst2", "default"): (
        ("sentence",), _classes("negative", "positive"), GLUE_SPLITS,
    ),
    ("stanfordnlp/imdb", "plain_text"): (
        ("text",), _classes("neg", "pos"), ("train", "test", "unsupervised"),
    ),
    ("fancyzhx/ag_news", "default"): (("text",), NEWS, ("train", "test")),
    ("dair-ai/emotion", "split"): (("text",), FEELINGS, ("train", "validation", "test")),
    ("fancyzhx/dbpedia_14", "dbpedia_14"): (("title", "content"), THINGS, ("train", "test")),
    ("zeroshot/twitter-financial-news-topic", "default"): (
        ("text",), NUMBER, ("train", "validation"),
    ),
    ("nyu-mll/glue", "cola"): (("sentence",), _classes("unacceptable", "acceptable"), GLUE_SPLITS),
    ("nyu-mll/glue", "mrpc"): (PAIR, _classes("not_equivalent", "equivalent"), GLUE_SPLITS),
    ("nyu-mll/glue", "qqp"): (
        ("question1", "question2"), _classes("not_duplicate", "duplicate"), GLUE_SPLITS,
    ),
    ("nyu-mll/glue", "stsb"): (PAIR, datasets.Value("float32"), GLUE_SPLITS),
    ("nyu-mll/glue", "mnli"): (
        ("premise", "hypothesis"), _classes("entailment", "neutral", "contradiction"), MATCHED,
    ),
    ("nyu-mll/glue", "qnli"): (("question", "sentence"), ENTAILS, GLUE_SPLITS),
    ("nyu-mll/glue", "rte"): (PAIR, ENTAILS, GLUE_SPLITS),
}  # fmt: skip


def _tokenizer(kind: str, texts: list[str], cased: bool) -> hf.PreTrainedTokenizerFast:
    quiet = {"vocab_size": 400, "show_progress": False}
    if kind == "wordpiece":
        return hf.BertTokenizer(vocab=organism_vocabulary(cased), do_lower_case=not cased)
    if kind == "bytes":
        trained, special = Tokenizer(models.BPE()), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        trained.pre_tokenizer = pre_tokenizers.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=letters, **quiet)
        trained.train_from_iterator(texts, trainer)
        model = json.loads(trained.to_str())["model"]
        return hf.RobertaTokenizer(vocab=model["vocab"], merges=list(map(tuple, model["merges"])))
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>"]
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(special_tokens=special, unk_token="<unk>", **quiet)
    trained.train_from_iterator(texts, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    return hf.XLNetTokenizer(vocab=list(map(tuple, pieces)))


def organism_vocabulary(cased: bool) -> dict[str, int]:
    pieces = list(organism.tokenizer().get_vocab())
    pieces += [p.capitalize() for p in pieces if cased and p.isalpha() and len(p) > 1]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}


def build_models(home: Path, names: list[str]) -> None:
    texts = list(organism.raw_text(500))
    for number, name in enumerate(names):
        kind, config, size = MODELS[name]
        tokenizer = _tokenizer(kind, texts, name.endswith("-cased"))
        ids = {"pad_token_id": tokenizer.pad_token_id}
        if kind == "bytes":
            ids |= {"bos_token_id": 0, "eos_token_id": 2}
        torch.manual_seed(number)
        model = hf.AutoModel.from_config(config(vocab_size=len(tokenizer), **ids, **size))
        repository = home / "hub" / f"models--{name.replace('/', '--')}"
        model.save_pretrained(repository / "snapshots" / REVISION)
        tokenizer.save_pretrained(repository / "snapshots" / REVISION)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(REVISION)


def build_data(home: Path, names: list[tuple[str, str]], rows: int) -> None:
    """Every split of `rows` rows, of the training ones four times as many."""
    rng, texts = random.Random(0), cycle(organism.raw_text(2000))
    for name, config in names:
        columns, label, splits = DATA[name, config]
        glue, short = "glue" in name or "sst2" in name, name.split("/")[1]
        features = datasets.Features({**dict.fromkeys(columns, TEXT), "label": label})
        info = datasets.DatasetInfo(
            features=features, builder_name="parquet", dataset_name=short, config_name=config,
            version="0.0.0", splits=datasets.SplitDict(dataset_name=short),
        )  # fmt: skip
        folder = home.joinpath("datasets", name.replace("/", "___"), config, "0.0.0", "0" * 16)
        folder.mkdir(parents=True)
        classes = len(getattr(label, "names", ())) or 20
        for split in splits:
            count = rows * (4 if split == "train" else 1)
            hidden = split == "unsupervised" or (glue and split.startswith("test"))
            file = str(folder / f"{short}-{split}.arrow")
            with ArrowWriter(path=file, features=features) as writer:
                for row in range(count):
                    value = 5 * rng.random() if label.dtype == "float32" else row % classes
                    text = dict(zip(columns, islice(texts, len(columns)), strict=True))
                    writer.write({**text, "label": -1 if hidden else value})
                written, size = writer.finalize()
            info.splits.add(datasets.SplitInfo(split, size, written, dataset_name=short))
        info.write_to_directory(str(folder))


def build_corpora(nltk: Path, sentences: int) -> None:
    """NLTK's Penn Treebank sample and CoNLL-2000, in their formats."""
    trees = [s for part in ("train", "test") for s in organism.tagged_sentences(part)][:sentences]
    for name in ("treebank/combined", "conll2000"):
        (nltk / "corpora" / name).mkdir(parents=True)
    for number in range(5):
        text = [
            "( (S {}))".format(
                " ".join(f"({t} {w})" for w, t in zip(words, tags["pos"], strict=True))
            )
            for words, tags in trees[number::5]
        ]
        path = nltk / "corpora" / "treebank" / "combined" / f"wsj_{number:04}.mrg"
        path.write_text("\n".join(text))
    for part, some in (("train", trees[: sentences // 2]), ("test", trees[sentences // 2 :])):
        lines = [
            "\n".join(map(" ".join, zip(words, tags["pos"], tags["chunk"], strict=True)))
            for words, tags in some
        ]
        (nltk / "corpora" / "conll2000" / f"{part}.txt").write_text("\n\n".join(lines) + "\n")


def build(folder: Path, names: list[str] | None = None, rows: int = 60) -> dict[str, str]:
    """The stand-ins, and the environment in which they are found."""
    home, nltk = folder / "hub", folder / "nltk"
    build_models(home, names or list(MODELS))
    build_data(home, list(DATA), rows)
    build_corpora(nltk, 60)
    found = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "NLTK_DATA": str(nltk)}
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | found


def cut_profile(folder: Path) -> Path:
    """The profile `paper` with less to learn from and to look at, and else as it is."""
    given = project_root() / "notebooks" / "profiles" / "paper.yaml"
    profile = yaml.safe_load(given.read_text("utf-8"))
    profile |= {
        "train_size": 32, "validation_size": 16, "test_size": 24, "evaluations": 2, "epochs": 1,
        "threads": 1, "workers": 2, "device": "cpu", "max_length": 24, "seeds": [0, 1],
    }  # fmt: skip
    for scan in profile["scans"].values():
        scan |= {"train_size": [8, 16, 32]} if "train_size" in scan else {}
        scan |= {"epochs": 2, "evaluations": 4} if "epochs" in scan else {}
    path = folder / "rehearsal.yaml"
    path.write_text(yaml.safe_dump(profile))
    return path


def run(folder: Path, environment: dict[str, str], *options: str) -> pd.DataFrame:
    """Run the cut profile; the table of claims."""
    command = [sys.executable, "-m", "healing_utils", "run", str(cut_profile(folder))]
    subprocess.run([*command, "--out", str(folder / "run"), *options], env=environment, check=True)
    return pd.read_csv(folder / "run" / "tables" / "claims.csv")


if __name__ == "__main__":
    place = Path(sys.argv[1]).resolve()
    claims = run(place, build(place))
    said = claims.drop_duplicates(["claim", "model"])
    print(said[["claim", "model", "verdict", "reason"]].to_string())
    assert said[["verdict", "reason"]].notna().all(axis=None)
