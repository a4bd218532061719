"""The bundled model through the unmodified ``openai`` client, compared with transformers on the same weights."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from deployments.config import ModelConfig
from deployments.engine.card import ModelCard
from tests.support.http import call

CARD = ModelCard.load(ModelConfig())
_SENTENCE = "the quick brown fox jumps over a lazy dog while München naïve 東京 🙂 models wait in queues"
WORDS = _SENTENCE.split()


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice([1, 3, 10, 40, 300]))) for _ in range(count)]


@pytest.fixture(scope="module")
def direct() -> Callable[[str], np.ndarray]:
    """Embed one text at a time in float32, with mean pooling and normalisation as in the model's model card."""
    tokenizer, model = AutoTokenizer.from_pretrained(CARD.source), AutoModel.from_pretrained(CARD.source)

    @torch.inference_mode()
    def embed(text: str) -> np.ndarray:
        tokens = tokenizer([text], truncation=True, max_length=256, return_tensors="pt")
        hidden = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(pooled, dim=1)[0].numpy()

    return embed


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)


@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.9999), ("bfloat16", 0.999)])
def test_embeddings_match_transformers_in_any_batch(
    deploy: Callable[..., int], direct: Callable[[str], np.ndarray], dtype: str, least: float
) -> None:
    # Small runs, and few texts: a processor without bfloat16 takes minutes for large ones.
    port = deploy(model={"dtype": dtype}, batching={"max_batch_tokens": 512 if dtype == "float32" else 256})
    texts = sentences(48, seed=1)[: 48 if dtype == "float32" else 12]
    groups = [texts[:1], texts[1:4], texts[4:8], texts[8:9], texts[9:]]
    with client(port) as api, ThreadPoolExecutor(len(groups)) as pool:
        answers = list(pool.map(lambda group: api.embeddings.create(model="all-MiniLM-L6-v2", input=group), groups))
    vectors = [np.array(item.embedding) for answer in answers for item in answer.data]
    cosines = [float(vector @ direct(text)) for vector, text in zip(vectors, texts, strict=True)]

    assert [item.index for item in answers[-1].data] == list(range(len(texts) - 9))
    assert min(cosines) >= least
    assert [np.linalg.norm(vector) for vector in vectors] == pytest.approx([1.0] * len(texts), abs=1e-4)


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int]) -> int:
    return deploy(model={"dtype": "float32"})


def test_openai_client_formats(port: int, direct: Callable[[str], np.ndarray]) -> None:
    text = "an embedding in every format"
    ids = AutoTokenizer.from_pretrained(CARD.source)(text)["input_ids"]
    with client(port) as api:
        listed = api.models.list().data
        model = listed[0].id
        default = api.embeddings.create(model=model, input=text)
        as_floats = api.embeddings.create(model=model, input=[text], encoding_format="float")
        as_base64 = api.embeddings.create(model=model, input=text, encoding_format="base64")
        as_ids = api.embeddings.create(model=model, input=ids)
        as_id_lists = api.embeddings.create(model=model, input=[ids, ids[:3]])
        short = api.embeddings.create(model=model, input=text, dimensions=64)
    expected = direct(text)
    decoded = np.frombuffer(base64.b64decode(as_base64.data[0].embedding), dtype="<f4")  # type: ignore[arg-type]

    assert [m.id for m in listed] == ["all-MiniLM-L6-v2"]
    assert default.usage.prompt_tokens == default.usage.total_tokens == len(ids)
    for vector in (default.data[0].embedding, as_floats.data[0].embedding, decoded, as_ids.data[0].embedding):
        np.testing.assert_allclose(vector, expected, atol=1e-5)
    np.testing.assert_allclose(as_id_lists.data[0].embedding, expected, atol=1e-5)
    assert as_id_lists.usage.prompt_tokens == len(ids) + 3
    np.testing.assert_allclose(short.data[0].embedding, expected[:64] / np.linalg.norm(expected[:64]), atol=1e-5)


def test_openai_client_errors(port: int) -> None:
    with client(port) as api:
        with pytest.raises(openai.NotFoundError, match="the model 'other' does not exist"):
            api.embeddings.create(model="other", input="a")
        with pytest.raises(openai.UnprocessableEntityError, match="input\\[0\\] must not be an empty string"):
            api.embeddings.create(model="all-MiniLM-L6-v2", input="")
        with pytest.raises(openai.UnprocessableEntityError, match="token id from 0 to 30521; got 30522"):
            api.embeddings.create(model="all-MiniLM-L6-v2", input=[30522])


def test_long_input_is_truncated_and_flagged_or_rejected(port: int, direct: Callable[[str], np.ndarray]) -> None:
    text = "long " * 400
    (prediction,) = call(port, "POST", "/predict", {"inputs": text}).json()["predictions"]
    refused = call(port, "POST", "/predict", {"inputs": ["short", text], "parameters": {"truncate": False}})

    assert prediction["truncated"] is True
    np.testing.assert_allclose(prediction["embedding"], direct(text), atol=1e-5)
    assert refused.status == 422
    assert refused.error["message"] == (
        "inputs[1] is 402 tokens long; the model takes at most 256, and truncate is false"
    )
