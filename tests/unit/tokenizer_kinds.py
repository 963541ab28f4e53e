"""Tokenizers of different kinds, built here: byte-level BPE, unigram and WordPiece."""

from collections.abc import Callable
from functools import cache

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zo_core.models.catalog import DEMO_PATH
from zo_core.tasks.data import load_task


def _corpus() -> list[str]:
    return [
        f"{row['sentence']} It was terrible great."
        for row in load_task("reviews", dev_examples=0).train
    ]


def _bos_template(tokenizer: Tokenizer, single: str) -> None:
    names = ["<s>", "</s>"]
    ids = [(n, tokenizer.token_to_id(n)) for n in names if n in single]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _unigram(single: str) -> PreTrainedTokenizerBase:
    """SentencePiece's ways: a metaspace before every word, BOS in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    _bos_template(tokenizer, single)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _wordpiece(specials: bool) -> PreTrainedTokenizerBase:
    """BERT's ways: lower case, ``##`` inside words; with specials, [CLS] ... [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if specials:
        ids = [(n, tokenizer.token_to_id(n)) for n in ("[CLS]", "[SEP]")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ids
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level BPE": cache(lambda: AutoTokenizer.from_pretrained(DEMO_PATH)),
    "unigram, BOS": cache(lambda: _unigram("<s> $A")),
    "unigram, BOS and EOS": cache(lambda: _unigram("<s> $A </s>")),
    "wordpiece": cache(lambda: _wordpiece(False)),
    "wordpiece, CLS and SEP": cache(lambda: _wordpiece(True)),
}


def first_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts in front of everything, if it does."""
    empty = tokenizer("")["input_ids"]
    return empty[0] if empty else None
