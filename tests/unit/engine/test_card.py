"""Model metadata read from a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from deployments.errors import ConfigError

BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "max_position_embeddings": 512,
    "vocab_size": 100,
    "hidden_size": 8,
}


def card(folder: Path, model: dict[str, Any], files: dict[str, Any] | None = None, **config: Any) -> ModelCard:
    for name, content in {"config.json": model, **(files or {})}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return ModelCard.load(ModelConfig(source=str(folder), **config))


def modules(*kinds: str) -> list[dict[str, str]]:
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense"}
    return [{"type": f"sentence_transformers.models.{kind}", "path": paths[kind]} for kind in kinds]


def test_the_bundled_model() -> None:
    bundled = ModelCard.load(ModelConfig())

    assert (bundled.name, bundled.task, bundled.max_length) == ("all-MiniLM-L6-v2", "embeddings", 256)
    assert (bundled.vocab_size, bundled.hidden_size, bundled.pooling) == (30522, 384, "mean")


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "embeddings"),
        ("BertForSequenceClassification", "text-classification"),
        ("RobertaForTokenClassification", "token-classification"),
        ("BertForMaskedLM", "fill-mask"),
    ],
)
def test_the_architecture_determines_the_task(tmp_path: Path, architecture: str, task: str) -> None:
    assert card(tmp_path, BERT | {"architectures": [architecture]}).task == task


def test_a_sentence_transformers_folder_serves_embeddings_for_any_architecture(tmp_path: Path) -> None:
    files = {
        "modules.json": modules("Transformer", "Pooling"),
        "1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        "sentence_bert_config.json": {"max_seq_length": 128, "do_lower_case": True},
        "config_sentence_transformers.json": {"prompts": {"query": "query: "}, "default_prompt_name": "query"},
    }
    found = card(tmp_path, BERT | {"architectures": ["BertForMaskedLM"]}, files)

    assert (found.task, found.pooling, found.max_length, found.lower_case) == ("embeddings", "cls", 128, True)
    assert found.prompt == "query: "


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_max_tokens": True}, "max"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
    ],
)
def test_pooling_in_both_config_formats(tmp_path: Path, pooling: dict[str, Any], expected: str) -> None:
    files = {"modules.json": modules("Transformer", "Pooling"), "1_Pooling/config.json": pooling}

    assert card(tmp_path, BERT, files).pooling == expected
    assert card(tmp_path, BERT, files, pooling="cls").pooling == "cls"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"modules.json": modules("Transformer", "Dense")}, "asks for a Dense module"),
        (
            {
                "modules.json": modules("Transformer", "Pooling"),
                "1_Pooling/config.json": {"pooling_mode": ["cls", "mean"]},
            },
            "args.model.pooling: the model asks for ['cls', 'mean']",
        ),
    ],
)
def test_unsupported_sentence_transformers_features_are_rejected(
    tmp_path: Path, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        card(tmp_path, BERT, files)

    assert message in str(refused.value)


def test_roberta_positions_start_after_the_padding_index(tmp_path: Path) -> None:
    model = BERT | {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}

    assert card(tmp_path, model).max_length == 512


def test_the_smallest_stated_limit_applies_and_no_limit_is_an_error(tmp_path: Path) -> None:
    tokenizer = {"tokenizer_config.json": {"model_max_length": 300}}
    assert card(tmp_path, BERT, tokenizer).max_length == 300
    assert card(tmp_path, BERT, tokenizer, max_length=400).max_length == 400
    with pytest.raises(ConfigError, match=r"max_length: 600 is more than the model's 512 positions"):
        card(tmp_path, BERT, tokenizer, max_length=600)
    unlimited = {"tokenizer_config.json": {"model_max_length": 10**30}}
    with pytest.raises(ConfigError, match="the model states no limit"):
        card(tmp_path, {k: v for k, v in BERT.items() if k != "max_position_embeddings"}, unlimited)


@pytest.mark.parametrize(
    ("extra", "labels", "function"),
    [
        ({"id2label": {"0": "a", "10": "c", "2": "b"}}, ("a", "b", "c"), "softmax"),
        ({"id2label": {"0": "a"}}, ("a",), "sigmoid"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification"}, ("a", "b"), "sigmoid"),
        ({"id2label": {"0": "a"}, "problem_type": "regression"}, ("a",), "none"),
        ({}, ("LABEL_0", "LABEL_1"), "softmax"),
    ],
)
def test_labels_and_their_score_function(tmp_path: Path, extra: dict[str, Any], labels: Any, function: str) -> None:
    found = card(tmp_path, BERT | {"architectures": ["BertForSequenceClassification"]} | extra)

    assert (found.labels, found.score_function) == (labels, function)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "is not a folder"),
        ("pkg:no_such_package/model", "no Python package 'no_such_package' is installed"),
        ("pkg:deployments/nothing", "is not a folder"),
    ],
)
def test_a_missing_source_is_rejected(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ModelCard.load(ModelConfig(source=source))

    assert message in str(refused.value)
    assert "args.model.source" in str(refused.value)


def test_a_folder_without_a_model_and_an_unknown_architecture_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelCard.load(ModelConfig(source=str(tmp_path)))
    with pytest.raises(ConfigError, match="states no vocab_size"):
        card(tmp_path, {k: v for k, v in BERT.items() if k != "vocab_size"})
    with pytest.raises(ConfigError, match=r"args\.model\.task: the architecture \['GPT2LMHead'\]"):
        card(tmp_path, BERT | {"architectures": ["GPT2LMHead"]})
