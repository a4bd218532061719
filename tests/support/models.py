"""Small models of real architectures, with weights from a fixed seed, built and saved by the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_SENTENCE = "the a cat dog sat on mat in london paris alice bob likes runs to from big small red blue"
WORDS = [*_SENTENCE.split(), "##s", "##ed"]
_HEADS = {
    "text-classification": BertForSequenceClassification,
    "text-ranking": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "fill-mask": BertForMaskedLM,
}
_LABELS = {
    "text-classification": ["negative", "neutral", "positive"],
    "token-classification": ["O", "B-PER", "B-LOC"],
    "text-ranking": ["LABEL_0"],
    "fill-mask": [],
}


def save_model(task: str, folder: Path) -> Path:
    """A two-layer BERT for ``task``, with its tokenizer, in ``folder``."""
    torch.manual_seed(7)
    labels = _LABELS[task]
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.5,
        **({"id2label": dict(enumerate(labels)), "label2id": {v: k for k, v in enumerate(labels)}} if labels else {}),
    )
    _HEADS[task](config).eval().save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer()
    backend.pre_tokenizer = BertPreTokenizer()
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=32,
    )


_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LANGUAGE_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _SHAPE),
    # Learned positions.
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    # A window of attention.
    "mistral": (MistralConfig, MistralForCausalLM, {**_SHAPE, "sliding_window": 32}),
    # Both kinds, and a soft limit of the scores, which only eager attention has.
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**_SHAPE, "head_dim": 16, "sliding_window": 32}),
}


def save_language_model(folder: Path, kind: str = "llama", *, has_chat_template: bool = True) -> Path:
    """A two-layer model whose tokens are bytes, with its tokenizer and a chat template, in ``folder``."""
    torch.manual_seed(7)
    backend = Tokenizer(BPE({token: index for index, token in enumerate(_byte_tokens())}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<begin>")
    if has_chat_template:
        tokenizer.chat_template = (
            "{% for message in messages %}<begin>{{ message.role }}: {{ message.content }}{% endfor %}"
            "{% if add_generation_prompt %}<begin>assistant: {% endif %}"
        )
    make_config, make_model, shape = LANGUAGE_MODELS[kind]
    config = make_config(
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **shape,
    )
    make_model(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokens() -> list[str]:
    return [*sorted(ByteLevel.alphabet()), "<end>", "<begin>"]
