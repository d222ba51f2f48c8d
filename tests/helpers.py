"""A tiny BERT with a tokenizer on disk, and texts whose labels are planted by one word."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import numpy as np
import torch
from families import VOCABULARY, tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from healing_utils.healing.training import Encoded

CUES = ("good", "bad", "so-so")
FILLERS = [f"w{i}" for i in range(40)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CUES, *FILLERS]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, [CLS] and [SEP] around them, token type 1 for the second of a pair."""
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def save_tiny_bert(folder: Path, layers: int = 3, seed: int = 0) -> Path:
    """A random-weight BERT of width 32 and its tokenizer, as `from_pretrained` expects them."""
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1000 + seed)  # not a seed that a test trains with
        AutoModel.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def planted_texts(count: int, classes: int = 2, seed: int = 0) -> tuple[list[str], list[int]]:
    """Texts of 2 to 9 filler words and one cue, which is the label."""
    rng = random.Random(seed)
    labels = [rng.randrange(classes) for _ in range(count)]
    texts = []
    for label in labels:
        words = rng.choices(FILLERS, k=rng.randint(2, 9))
        words.insert(rng.randint(0, len(words)), CUES[label])
        texts.append(" ".join(words))
    return texts, labels


def write_planted_task(folder: Path, train: int = 48, test: int = 24, seed: int = 0) -> Path:
    """A folder with train.csv and test.csv of planted texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count, shift in (("train", train, 0), ("test", test, 1000)):
        texts, labels = planted_texts(count, seed=seed + shift)
        rows = [f"{text},{CUES[label]}" for text, label in zip(texts, labels, strict=True)]
        (folder / f"{split}.csv").write_text("\r\n".join(["text,label", *rows, ""]), newline="")
    return folder


def random_examples(
    count: int = 24, classes: int = 2, seed: int = 0, pad: tuple[int, int, str] = (0, 0, "right"),
    ids: tuple[int, int] = (5, VOCABULARY), lengths: tuple[int, int] = (3, 12),
) -> Encoded:  # fmt: skip
    """Token ids and labels drawn at random, for the models of `families`."""
    rng = np.random.default_rng(seed)
    rows = [rng.integers(*ids, size=rng.integers(*lengths)).tolist() for _ in range(count)]
    return Encoded(rows, None, rng.integers(classes, size=count), pad)


def examples(family: str = "bert", count: int = 24, seed: int = 0) -> Encoded:
    """Padded as a family's tokenizer does: XLNet's head reads the last token."""
    pad = (tiny_config(family).pad_token_id or 0, 0, "left" if family == "xlnet" else "right")
    return random_examples(count, seed=seed, pad=pad)


def tiny_study(run: Path, model: Path, task: Path, **changes: object) -> dict[str, object]:
    """Parameters of a study that takes a second or two, computed in the process that asks."""
    return {
        "run": str(run), "model": str(model), "task": str(task), "seeds": [0, 1],
        "levels": ["1/3", "1"], "init_levels": ["1/3"], "train_size": 32, "validation_size": 8,
        "epochs": 1.0, "batch_size": 8, "learning_rate": 1e-3, "evaluations": 2, "max_length": 16,
        "threads": 1, "workers": 1, "device": "cpu", **changes,
    }  # fmt: skip


def contents(run: Path) -> dict[str, dict]:
    """All records of a run by path, without times and the checksum that covers them."""
    found = {}
    for path in sorted((run / "records").rglob("*.json")):
        record = json.loads(path.read_text())
        del record["times"], record["checksum"]
        found[str(path.relative_to(run))] = record
    return found


def study_process(
    parameters: dict[str, object], moment: tuple[str, int] | None = None, log: str | None = None
) -> None:
    """Run the three stages in a process of their own; with a `moment`, die there.

    ``("half", n)``: while the n-th record is being written, when half of it is in its temporary
    file; ``("renaming", n)``: before that file gets its name; ``("recorded", n)``: right after;
    ``("step", n)``: after the n-th step of training. `log` gets a line for every cell that is
    computed.
    """
    os.environ["HEALING_PROGRESS"] = "quiet"
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that the killed leave behind
    torch.set_num_threads(1)
    from healing_utils.base import records
    from healing_utils.study.cells import STAGES
    from healing_utils.study.study import Study

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        die()

    kind, count = moment or ("", 0)
    write, record = records.write_atomically, Study.record
    written, stepped = itertools.count(1), itertools.count(1)

    def counting_write(path: Path, content: str | bytes) -> None:
        now = kind if next(written) == count else ""
        os.fsync = half if now == "half" else os.fsync
        os.replace = die if now == "renaming" else os.replace
        write(path, content)
        if now == "recorded":
            die()

    def counting_record(self: Study, cell: object, on_step: object) -> None:
        if log:
            with open(log, "a") as file:
                file.write(f"{cell.key}\n")
        record(self, cell, lambda *_: kind == "step" and next(stepped) == count and die())

    # Store.write finds this name in its own module: plans and weights are not counted.
    records.write_atomically = counting_write
    Study.record = counting_record
    planned = Study(parameters)
    for stage in STAGES:
        planned.run(stage)


def processes():
    """A multiprocessing context whose processes start with everything imported, and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([
        "healing_utils.study.study", "scipy.stats",
        "sklearn.metrics", "transformers.models.auto.modeling_auto",
        "transformers.models.bert.modeling_bert",
    ])  # fmt: skip
    return context


def write_corpus(path: Path, count: int, seed: int = 0) -> Path:
    """Words and tags: CUE for a cue word, FILLER for any other; the second column is chance."""
    rng = random.Random(seed)
    blocks = []
    for _ in range(count):
        words = rng.choices([*FILLERS, *CUES * 8], k=rng.randint(3, 8))
        lines = (f"{w}\t{'CUE' if w in CUES else 'FILLER'}\t{rng.choice('ab')}" for w in words)
        blocks.append("\n".join(lines))
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")
    return path
