"""Adapters that come and go while the server runs, asked for in vLLM's words and answered in them.

The engine's thread does it between two tokens: the rows that are being answered notice nothing.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, final

from lorafit.errors import LorafitError
from lorafit.serve import problems
from lorafit.serve.gate import Note
from lorafit.serve.metrics import Metrics
from lorafit.serve.names import Folders
from lorafit.serve.problems import Problem
from lorafit.serve.schemas import LoadRequest, UnloadRequest
from lorafit.serve.templates import Voices

if TYPE_CHECKING:
    from lorafit.serve.bank import AdapterBank
    from lorafit.serve.engine import Engine

LOG = logging.getLogger("lorafit.serve")
INPUT = "InvalidUserInput"
PATIENCE = 2.0
"""Seconds that the metrics wait for the engine's thread; then the last numbers stand."""


@final
class Loading:
    """Loads and unloads adapters.

    Args:
        engine: on whose thread it happens.
        bank: where adapters are.
        voices: where their tokenizers are.
        folders: where they may come from.
        allowed: whether clients may.
    """

    def __init__(self, engine: Engine, bank: AdapterBank, voices: Voices, folders: Folders, *, allowed: bool) -> None:
        self._engine, self._bank, self._voices, self._folders = engine, bank, voices, folders
        self._allowed = allowed
        self._one = asyncio.Lock()

    async def load(self, body: LoadRequest, note: Note) -> str:
        """Reads an adapter and serves it.

        Raises:
            Problem: it is not allowed, the name is taken, or there is no such adapter, or none that can be served.
        """
        self._check()
        name = body.lora_name
        if not name or not body.lora_path:
            raise Problem(400, "Both 'lora_name' and 'lora_path' must be provided.", kind=INPUT)
        async with self._one:
            if self._bank.known(name):
                message = f"The lora adapter '{name}' has already been loaded. Unload it first to replace it."
                raise Problem(400, message, kind=INPUT, param="lora_name")
            try:
                self._folders.check_name(name)
                folder = await asyncio.to_thread(self._folders.resolve, body.lora_path)
                await self._serve(name, folder)
            except LorafitError as error:
                LOG.warning("%s: adapter %r was not loaded: %s", note.number, name[:200], error)
                raise problems.of_loading(error) from error
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, body: UnloadRequest) -> str:
        """Serves an adapter no more.

        Raises:
            Problem: it is not allowed, there is none by this name, or it is in use.
        """
        self._check()
        name = body.lora_name
        if not name:
            raise Problem(400, "'lora_name' needs to be provided to unload a LoRA adapter.", kind=INPUT)
        async with self._one:
            if not self._bank.known(name):
                message = f"The lora adapter '{name[:200]}' cannot be found."
                raise Problem(404, message, kind="NotFoundError", param="lora_name")
            try:
                await self._forget(name)
            except LorafitError as error:
                raise problems.of_loading(error) from error
        return f"Success: LoRA adapter '{name}' removed successfully."

    async def measure(self, metrics: Metrics) -> None:
        """Brings the numbers of adapters up to date, if the engine has a moment for it."""

        def look() -> tuple[int, int]:
            return len(self._bank.resident()), self._bank.used_bytes()

        try:
            future = asyncio.wrap_future(self._engine.call(look))
            resident, size = await asyncio.wait_for(future, PATIENCE)
        except (asyncio.TimeoutError, LorafitError):
            return
        metrics.bank(len(self._bank.names()), resident, size)

    def _check(self) -> None:
        if not self._allowed:
            raise Problem(
                403,
                "adapters are not loaded at run time here: the server was started without --allow-load",
                code="loading_not_allowed",
            )

    def _register(self, name: str, folder: Path) -> None:
        """On the engine's thread. The file is read once, so that what cannot be served is refused now and not later."""
        self._bank.register(name, folder)
        try:
            self._bank.take(name)
        except BaseException:
            self._bank.forget(name)
            raise
        self._bank.drop(name)

    async def _serve(self, name: str, folder: Path) -> None:
        self._folders.keep(name, folder)  # before it is known, so that whoever knows it finds it
        try:
            await asyncio.to_thread(self._voices.of, name)
            await asyncio.wrap_future(self._engine.call(lambda: self._register(name, folder)))
        except BaseException:
            self._folders.forget(name)
            self._voices.forget(name)
            raise

    async def _forget(self, name: str) -> None:
        await asyncio.wrap_future(self._engine.call(lambda: self._bank.forget(name)))
        self._folders.forget(name)
        self._voices.forget(name)
