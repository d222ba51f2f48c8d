"""Tiny random-weight models of every encoder family: three layers, width 16, two heads."""

import functools
import json

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

LAYERS, WIDTH, INNER, VOCABULARY = 3, 16, 24, 60

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "intermediate_size": INNER, "max_position_embeddings": 40,
}  # fmt: skip

# What can be corrupted. Settings beyond size switch on what a family keeps beside its layers.
FAMILIES = {
    "bert": lambda: hf.BertConfig(**_SIZES),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, n_layers=LAYERS, n_heads=2, hidden_dim=INNER,
        max_position_embeddings=40,
    ),
    "roberta": lambda: hf.RobertaConfig(**_SIZES),
    "xlnet": lambda: hf.XLNetConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, n_layer=LAYERS, n_head=2, d_inner=INNER
    ),
    "electra": lambda: hf.ElectraConfig(embedding_size=8, **_SIZES),
    "deberta-v2": lambda: hf.DebertaV2Config(
        relative_attention=True, position_buckets=4, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], position_biased_input=False, conv_kernel_size=3,
        type_vocab_size=0, **_SIZES,
    ),
    "mpnet": lambda: hf.MPNetConfig(**_SIZES),
    "modernbert": lambda: hf.ModernBertConfig(
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, **_SIZES
    ),
}  # fmt: skip

# What answers in tuples, convolves, fuses otherwise or projects its embeddings; and what shares its
# layers' weights.
_OTHERS = {
    "deberta": lambda: hf.DebertaConfig(
        relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8, **_SIZES
    ),
    "roformer": lambda: hf.RoFormerConfig(**_SIZES),
    "rembert": lambda: hf.RemBertConfig(
        input_embedding_size=8, bos_token_id=1, eos_token_id=2, **_SIZES
    ),
    "yoso": lambda: hf.YosoConfig(**_SIZES),
    "mra": lambda: hf.MraConfig(block_per_row=1, **_SIZES | {"max_position_embeddings": 64}),
    "squeezebert": lambda: hf.SqueezeBertConfig(embedding_size=WIDTH, **_SIZES),
    "albert": lambda: hf.AlbertConfig(embedding_size=8, **_SIZES),
}  # fmt: skip
OTHERS = tuple(family for family in _OTHERS if family != "albert")

HEADS = ("none", "classification", "language model")


def tiny_config(family: str) -> hf.PretrainedConfig:
    return (FAMILIES | _OTHERS)[family]()


def tiny_model(family: str, head: str = "none", seed: int = 0) -> hf.PreTrainedModel:
    """A model in evaluation mode whose every parameter is random: no bias is 0, no LayerNorm is 1.

    An untouched bias of 0 would hide that a corruption set it to 0.
    """
    model_class = {
        "none": hf.AutoModel,
        "classification": hf.AutoModelForSequenceClassification,
        "language model": hf.AutoModelForCausalLM if family == "xlnet" else hf.AutoModelForMaskedLM,
    }[head]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = model_class.from_config(tiny_config(family))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tiny_batch(sentences: int = 2, words: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids without padding, (sentences, words)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (sentences, words), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- tokenizers ------------------------------------------------------------------------------------
# Of the three kinds that encoders use, small enough for the models above; long words split.

SENTENCES = [
    ["the", "cats", "sat", "on", "unbelievable", "mats"],
    ["cat"],
    ["unbelievable", "things", "sat"],
    ["mats", "sat", "on", "the", "cat", "on", "the", "mats", "on", "cats", "on", "things"],
    ["things", "things"],
]


@functools.cache
def wordpiece() -> hf.PreTrainedTokenizerFast:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", "on", "un"]
    pieces += ["##bel", "##iev", "##able", "mat", "thing", "a", "##a", "b", "##b", "c"]
    return hf.BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


@functools.cache
def byte_level() -> hf.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # and so few pieces that long words split
    trainer = trainers.BpeTrainer(vocab_size=36, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(s) for s in SENTENCES] * 3 + ["a b c"], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return hf.RobertaTokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])


@functools.cache
def unigram() -> hf.PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eop>", "<eod>"]
    pieces = [(token, 0.0) for token in special] + [("▁", -6.0)]
    pieces += [(c, -7.0) for c in "thecasonubligvm"]
    whole = ("▁the", "▁cat", "▁sat", "▁on", "▁un", "believ", "able", "▁mat", "▁thing")
    pieces += [(piece, -4.0) for piece in whole]
    return hf.XLNetTokenizer(vocab=pieces)


# Tokenizer, what stands before a word inside a text, and the special tokens around a sentence.
KINDS = {
    "wordpiece": (wordpiece, "", [2], [3]),
    "byte-level": (byte_level, " ", [0], [2]),
    "unigram": (unigram, "", [], [4, 3]),
}
OWN_KIND = {
    "roberta": "byte-level", "mpnet": "byte-level", "modernbert": "byte-level", "xlnet": "unigram",
}  # fmt: skip


def kind_of(family: str) -> str:
    return OWN_KIND.get(family, "wordpiece")


def tokenizer_of(family: str) -> hf.PreTrainedTokenizerFast:
    return KINDS[kind_of(family)][0]()
