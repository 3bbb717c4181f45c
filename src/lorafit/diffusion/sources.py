"""Where the adapters of a pipeline lie, each as a folder of the core's layout: its own, or one made of a file."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorafit import store
from lorafit.conversion import Pair, plain_config
from lorafit.diffusion.family import Family
from lorafit.diffusion.names import ALPHA, DOWN, KOHYA, MAGNITUDE, UP, flattened, named
from lorafit.errors import CheckpointError, LorafitWarning, nearest, some
from lorafit.exporting.diffusers import COMPONENTS, METADATA, WEIGHTS
from lorafit.peft_layout import PREFIX, for_file, join
from lorafit.plan import Modules
from lorafit.training.owned import COMPLETE

RUN = "adapter"
"""Of a run's folder, the one with its adapter."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
ENCODER = "text_model."
"""What the paths in CLIP's encoders began with in older releases of transformers."""
Layers = dict[str, dict[str, Tensor]]
"""Path of a layer → what a tensor is → tensor."""


class Source(ABC):
    """The adapter of one part.

    Attributes:
        part: the part's name.
    """

    part: str

    @abstractmethod
    def opened(self) -> AbstractContextManager[Path]:
        """Within it there is a folder of the core's layout; errors name what the user has."""


@final
@dataclass
class Folder(Source):
    """A folder that is one already."""

    part: str
    path: Path

    @contextmanager
    def opened(self) -> Iterator[Path]:
        yield self.path


@final
@dataclass(eq=False)
class Within(Source):
    """One part's adapter in a file for several."""

    part: str
    file: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @contextmanager
    def opened(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            folder = Path(scratch)
            store.write_parts(folder, self.config, for_file(self.tensors), "")
            try:
                yield folder
            except CheckpointError as error:
                raise self._renamed(error, folder) from None
        for each in said:
            message = self._text(str(each.message), folder)
            warnings.warn(message, LorafitWarning if issubclass(each.category, LorafitWarning) else each.category, 3)

    def _renamed(self, error: CheckpointError, folder: Path) -> CheckpointError:
        def text(value: object) -> str | None:
            return None if value is None else self._text(str(value), folder)

        return CheckpointError(
            self._text(error.message, folder),
            found=text(error.found),
            expected=text(error.expected),
            where=text(error.where),
            near=[self._text(each, folder) for each in error.near],
            fix=text(error.fix),
        )

    def _text(self, text: str, folder: Path) -> str:
        """What is said of the folder, said of the file."""
        for name in (store.WEIGHTS, store.CONFIG):
            text = text.replace(str(folder / name), str(self.file))
        return text.replace(str(folder), str(self.file)).replace(PREFIX, f"{self.part}.")


def find(path: Path, family: Family) -> list[Source]:
    """The adapters of a file or folder, in the order of the pipeline's parts.

    A part that has a folder of its own beside the file is read from that one, which lacks nothing.

    Raises:
        CheckpointError: there is none, it is pickled, damaged, or for a part that the pipeline does not have.
    """
    if path.is_file():
        found: dict[str, Source] = {each.part: each for each in _in_file(path, family)}
    elif (path / store.CONFIG).is_file():
        found = {family.denoiser: Folder(family.denoiser, path)}
    elif path.is_dir():
        found = _in_folder(path, family)
    else:
        raise CheckpointError(
            "there is no such file or folder",
            where=path,
            expected=f"{WEIGHTS}, a folder with it, or a run's folder",
            near=nearest(path.name, (child.name for child in path.parent.iterdir())) if path.parent.is_dir() else (),
            fix="for a hub name download it first (huggingface_hub)",
        )
    return [found[part] for part in family.components if part in found]


def adapters_in(folder: Path) -> list[Path]:
    """The folders of adapters in the core's layout: this one, and those of named adapters in it."""
    places = [folder, *sorted(child.parent for child in folder.glob(f"*/{store.CONFIG}"))]
    return [place for place in places if (place / store.CONFIG).is_file()]


def _in_folder(folder: Path, family: Family) -> dict[str, Source]:
    own: dict[str, Source] = {}
    for part in family.components:
        whole = adapters_in(folder / part)
        if len(whole) > 1:
            raise CheckpointError(
                "this folder holds several adapters of one part",
                where=folder / part,
                found=some((place.name for place in whole), 4),
                expected="one",
                fix=f"give the folder of one of them: {whole[-1]}",
            )
        if whole:
            own[part] = Folder(part, whole[0])
    strange = [
        part for part in COMPONENTS if part not in family.components and (folder / part / store.CONFIG).is_file()
    ]
    if strange:
        raise _absent(folder, strange[0], family)
    file = _file_of(folder)
    if file is not None:
        return {**{each.part: each for each in _in_file(file, family)}, **own}
    if own:
        return own
    if (folder / RUN).is_dir():
        return _in_folder(folder / RUN, family)
    if (folder / COMPLETE).is_file():
        raise CheckpointError(
            "this is the checkpoint of a run that has not ended",
            where=folder,
            found=some(sorted(child.name for child in folder.iterdir()), 3),
            expected="the folder adapter of a run that has",
            fix="go on with the run (the same command does), then give its folder",
        )
    pickled = sorted(child.name for child in folder.iterdir() if child.suffix in PICKLED)
    raise CheckpointError(
        "the weights are pickled, and pickle is never read: it can run any code"
        if pickled
        else "this folder holds no adapter of a pipeline",
        where=folder,
        found=some(pickled or sorted(child.name for child in folder.iterdir()), 3) or "an empty folder",
        expected=WEIGHTS,
        fix="save it again with safe_serialization=True, where you trust it"
        if pickled
        else "give the folder that pipe.save_lora_weights or lorafit dreambooth wrote",
    )


def _file_of(folder: Path) -> Path | None:
    """Diffusers' file, or the only one of safetensors; None for none."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    files = sorted(child for child in folder.glob("*.safetensors") if not child.name.startswith("."))
    if len(files) > 1:
        raise CheckpointError(
            "this folder holds several files, and none has the usual name",
            where=folder,
            found=some((file.name for file in files), 4),
            expected=WEIGHTS,
            fix=f"give one of them: {files[0]}",
        )
    return files[0] if files else None


def _in_file(file: Path, family: Family) -> list[Within]:
    tensors, settings = _opened(file)
    modules = {part: Modules.of(family.component(part)) for part in family.components}
    flat = {part: flattened(each.known()) for part, each in modules.items()} if _scripted(tensors) else {}
    parts: dict[str, Layers] = {}
    renamed: set[str] = set()
    bare: set[str] = set()
    unknown: list[str] = []
    for key, tensor in tensors.items():
        found = named(key, family.components, flat)
        absent = key.partition(".")[0]
        if found is None or (found.part is None and absent in COMPONENTS):
            unknown.append(key)
            continue
        part = family.denoiser if found.part is None else found.part
        if found.part is None:
            bare.add(part)
        layer = _present(found.layer, modules[part])
        if layer != found.layer:
            renamed.add(part)
        values = parts.setdefault(part, {}).setdefault(layer, {})
        if found.what in values:
            raise CheckpointError(
                "two keys hold the same tensor of the same layer",
                where=f"{file}: {key}",
                found=f"{found.what} of {layer}, beside another spelling of it",
                expected="each once",
                fix="remove the one that is not meant",
            )
        values[found.what] = tensor
    if unknown or not parts:
        raise _unknown(file, unknown, family)
    made = []
    for part, layers in parts.items():
        begin = "" if part in bare else f"{part}."
        own = {key.removeprefix(begin): value for key, value in settings.items() if key.startswith(begin)}
        config = _config(file, part, layers, _flat(own) if part in renamed else own)
        made.append(Within(part, file, config, _tensors(layers)))
    return made


def _scripted(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(tuple(KOHYA)) for key in tensors)


def _opened(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and the settings in its metadata."""
    if file.suffix in PICKLED:
        raise CheckpointError(
            "the weights are pickled, and pickle is never read: it can run any code",
            where=file,
            expected="a safetensors file",
            fix="save it again with safe_serialization=True, where you trust it",
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no iterator of its own)
        settings = json.loads(metadata.get(METADATA, "{}"))
        if not isinstance(settings, dict):
            raise ValueError(f"{METADATA} is no object")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            "the file is damaged or cut short",
            where=file,
            found=str(error).partition("\n")[0],
            expected="a whole safetensors file",
            fix="copy or download it again",
        ) from None
    return tensors, settings


def _present(layer: str, modules: Modules) -> str:
    """The path of a layer as this release of transformers has it, where an older one had another."""
    for path in (layer, layer.removeprefix(ENCODER), f"{ENCODER}{layer}"):
        if path in modules.aliases:
            return path
    return layer


def _absent(place: Path, part: str, family: Family) -> CheckpointError:
    return CheckpointError(
        "there is an adapter for a part that this pipeline does not have",
        where=place,
        found=part,
        expected=some(family.components),
        fix="load the pipeline that it was trained on",
    )


def _unknown(file: Path, unknown: Sequence[str], family: Family) -> CheckpointError:
    key = unknown[0] if unknown else ""
    absent = key.partition(".")[0]
    if absent in COMPONENTS and absent not in family.components:
        return _absent(file, absent, family)
    if key.startswith(tuple(KOHYA)):
        return CheckpointError(
            "the file's layers have names that none of this pipeline has, as those of Stable Diffusion XL's own code",
            where=file,
            found=some(unknown, 3),
            expected="the names of diffusers' layers with _ for each point",
            fix="have diffusers translate it: pipe.load_lora_weights(file), then pipe.save_lora_weights",
        )
    return CheckpointError(
        "unexpected key" if unknown else "the file holds no adapter",
        where=file,
        found=some(unknown, 3) or "no tensors",
        expected=f"{family.denoiser}.….lora_A.weight and the like",
        fix="LoRA and DoRA are read; LoKr, LoHa, biases and kohya's DoRA are not: merge it where it was made",
    )


def _tensors(layers: Layers) -> dict[str, Tensor]:
    return {
        join(path, what): tensor for path, values in layers.items() for what, tensor in values.items() if what != ALPHA
    }


def _config(file: Path, part: str, layers: Layers, own: Mapping[str, Any]) -> dict[str, Any]:
    """The core's config: from the part's settings in the metadata, or from shapes and alphas."""
    alphas = [path for path, values in layers.items() if ALPHA in values]
    if own:
        if alphas:
            raise CheckpointError(
                "the file says twice how strongly its layers act",
                where=f"{file}: {part}.{alphas[0]}.{ALPHA}",
                found=f"alphas beside {METADATA}",
                expected="one of the two",
                fix="remove the one that is not meant",
            )
        return {**own, "peft_type": "LORA", "fan_in_fan_out": False}
    pairs = {path: _pair(file, part, path, values) for path, values in layers.items()}
    plain = plain_config({"peft_type": "LORA", "fan_in_fan_out": False, "target_modules": sorted(pairs)}, pairs)
    return {**plain, "use_dora": any(MAGNITUDE in values for values in layers.values())}


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose paths begin as the model's own do."""

    def shorter(text: str) -> str:
        return text.replace(ENCODER, "").replace(ENCODER.replace(".", "\\."), "")

    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found[key] = {shorter(name): each for name, each in value.items()}
        elif isinstance(value, list):
            found[key] = [shorter(each) if isinstance(each, str) else each for each in value]
        else:
            found[key] = shorter(value) if key == "target_modules" and isinstance(value, str) else value
    return found


def _pair(file: Path, part: str, path: str, values: Mapping[str, Tensor]) -> Pair:
    missing = [what for what in (DOWN, UP) if what not in values]
    if missing:
        raise CheckpointError(
            "missing key",
            where=file,
            found=f"{some(sorted(values))} of {part}.{path}",
            expected=missing[0],
            fix="the file is incomplete: save or copy it again",
        )
    down, up = values[DOWN], values[UP]
    rank = down.shape[0]
    said = values.get(ALPHA)
    alpha = float(rank) if said is None else float(said) if said.numel() == 1 else math.nan
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise CheckpointError(
            "a layer's rank or alpha cannot be this",
            where=f"{file}: {part}.{path}",
            found=f"rank {rank}, alpha {alpha:g}",
            expected="numbers greater than 0",
            fix="the file is damaged: copy it again",
        )
    return Pair(down, up, alpha / rank)
