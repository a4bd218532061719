"""Converts a GGUF file to a transformers folder, once, and keeps it.

transformers reads GGUF itself, but unpacks it each time, which takes ten times as long as loading what it unpacked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import shutil
from pathlib import Path

from deployments.errors import ConfigError

_logger = logging.getLogger("slowlens.model")


def converted(path: Path) -> Path:
    """Return the folder of the converted model, under the XDG cache directory. Raises ConfigError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "slowlens" / "models"
    cache.mkdir(parents=True, exist_ok=True)
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:12]
    folder = cache / f"{path.stem}-{key}"
    # All replicas of a machine start at once; one converts, the others wait for it.
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            made = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(made, ignore_errors=True)
            _convert(path, made)
            made.rename(folder)
    return folder


def _convert(path: Path, folder: Path) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    transformers.utils.logging.disable_progress_bar()
    _logger.warning("%s is converted once, which takes half a minute", path.name)
    try:
        # Its own progress bar has no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype="float32"
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except ImportError as error:
        raise ConfigError(
            f"args.model.source: reading {path.name} needs further packages; install them with: "
            f"pip install 'slowlens[gguf]' ({error})"
        ) from None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
