"""The setting `quantise`: a run's base in fewer bits, in memory alone. Files of models and adapters know nothing of it.

What is trained in full keeps its plain weights, and so does what another layer shares. int8 rows are read from the
checkpoint tensor by tensor, so that the plain model is never there; NF4 is made of the loaded model, layer by layer.
"""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from lorafit.errors import CheckpointError, ConfigError, MissingExtraError, TargetError, some
from lorafit.layers import Site, site_of
from lorafit.plan import Modules, all_linear, saved_paths
from lorafit.quant.convert import Quantised, Tally, put, quantise
from lorafit.quant.loading import load_quantised
from lorafit.quant.rows import Rows
from lorafit.quant.selecting import select
from lorafit.training.models import Located, load_causal, loaded

Quantise = Literal["none", "int8", "nf4"]
BLOCK = 64
"""Numbers of NF4 that share a scale."""
FILES = ["*.json", "model.safetensors", "model-*.safetensors"]
"""What of a model on the hub is read here."""


class Storage(ABC):
    """A way to keep the linear layers of a base."""

    name: ClassVar[str]
    whole: ClassVar[bool]
    """Whether the plain model of a language model is in memory while it is made."""

    @abstractmethod
    def check(self) -> None:
        """Raises `MissingExtraError` if it needs what is not installed."""

    @abstractmethod
    def takes(self, site: Site) -> bool:
        """Whether a linear layer can be kept so."""

    @abstractmethod
    def bytes(self, out: int, inn: int) -> int:
        """Of one weight."""

    @abstractmethod
    def pack(self, model: nn.Module, paths: Sequence[str]) -> Quantised:
        """Stores these layers, in place and one at a time."""

    @abstractmethod
    def causal(self, located: Located, dtype: torch.dtype, saved: Sequence[str]) -> tuple[Any, Quantised, list[str]]:
        """A language model, what was stored, and the layers that stay plain."""


@final
class Int8(Storage):
    """int8 rows, of the library's own."""

    name = "int8"
    whole = False

    def check(self) -> None:
        pass

    def takes(self, site: Site) -> bool:
        return True

    def bytes(self, out: int, inn: int) -> int:
        return out * inn + 4 * out

    def pack(self, model: nn.Module, paths: Sequence[str]) -> Quantised:
        return quantise(model, these(paths))

    def causal(self, located: Located, dtype: torch.dtype, saved: Sequence[str]) -> tuple[Any, Quantised, list[str]]:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = loaded(located, lambda: AutoConfig.from_pretrained(located.path))
        with torch.device("meta"):
            shape = loaded(located, lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))
        paths, left = layers(shape, saved, self)
        try:
            folder = _folder(located)
            model: Any
            model, done = load_quantised(
                lambda: AutoModelForCausalLM.from_config(config, dtype=dtype), folder, these(paths), dtype=dtype
            )
        except CheckpointError:  # its tensors go by other names than the model's, which transformers knows
            model = load_causal(located, dtype)
            return model, self.pack(model, paths), left
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model.eval(), done, left


@final
class Nf4(Storage):
    """Four bits of bitsandbytes: quantiles of the normal distribution, a float32 scale for each `BLOCK` numbers."""

    name = "nf4"
    whole = True

    def check(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingExtraError(
                "NF4 is kept and read by bitsandbytes",
                where="quantise",
                found="no such package",
                expected="the extra `quant`; int8 needs none",
                fix="pip install 'lorafit[quant]'",
            )

    def takes(self, site: Site) -> bool:
        return type(site.module) is nn.Linear

    def bytes(self, out: int, inn: int) -> int:
        return -(-out * inn // 2) + 4 * -(-out * inn // BLOCK)

    def pack(self, model: nn.Module, paths: Sequence[str]) -> Quantised:
        tally = Tally()
        for path in paths:
            module = model.get_submodule(path)
            parent, _, name = path.rpartition(".")
            before = site_of(module).weight().detach()
            packed = _four_bits(module)
            setattr(model.get_submodule(parent), name, packed)
            after = site_of(packed).weight().to(before.device)
            lost = float((after - before.float()).double().square().sum())
            squares = float(before.double().square().sum())
            # A tally counts int8 rows; of NF4 the errors alone are taken from it.
            tally.add(path, Rows(before, before[:, :1], squares, lost), before.element_size())
        counted = tally.result()
        after_bytes = sum(self.bytes(*shape) for shape in shapes(model, paths))
        return Quantised(counted.layers, counted.error, counted.before, after_bytes)

    def causal(self, located: Located, dtype: torch.dtype, saved: Sequence[str]) -> tuple[Any, Quantised, list[str]]:
        model = load_causal(located, dtype)
        paths, left = layers(model, saved, self)
        return model, self.pack(model, paths), left


STORAGES: Mapping[str, Storage] = {one.name: one for one in (Int8(), Nf4())}
"""By the values of the setting; "none" is none of them."""


def check_quantise(name: str, *, compiles: bool = False) -> None:
    """Raises `ConfigError` where the base cannot be kept so beside other settings."""
    storage = STORAGES.get(name)
    if compiles and storage is not None and storage.whole:
        raise ConfigError(
            f"layers over {name} cannot be compiled: bitsandbytes unpacks them, outside of any graph",
            found=f"quantise={name!r} and compile=True",
            expected="one of them",
            fix="quantise int8, or leave compile out",
        )


def load_base(name: str, located: Located, dtype: torch.dtype, saved: Sequence[str] = ()) -> tuple[Any, str]:
    """A causal language model as the setting `quantise` wants it.

    Args:
        name: the setting.
        located: where the model is.
        dtype: of what stays plain, and of the layers' work.
        saved: modules that are trained in full.

    Returns:
        The model, and a sentence for the user, empty for "none".

    Raises:
        MissingExtraError: a package is not installed.
        ConfigError: there is no such model, it is quantised already, or nothing in it can be.
    """
    storage = STORAGES.get(name)
    if storage is None:
        return load_causal(located, dtype), ""
    storage.check()
    check_plain(located)
    model, done, left = storage.causal(located, dtype, saved)
    # The checkpoint's own type need not be the one in which the plain model would have been loaded.
    plain = sum(out * inn for out, inn in shapes(model, list(done.layers))) * dtype.itemsize
    return model, _told(model, storage, replace(done, before=plain), left)


def quantise_loaded(name: str, model: nn.Module, saved: Sequence[str] = ()) -> str:
    """Quantises a model that is in memory: a classifier, whose head its checkpoint need not have. As `load_base`."""
    storage = STORAGES.get(name)
    if storage is None:
        return ""
    storage.check()
    paths, left = layers(model, saved, storage)
    return _told(model, storage, storage.pack(model, paths), left)


def check_plain(located: Located) -> None:
    """Raises `ConfigError` for a model whose files are quantised."""
    from transformers import AutoConfig

    config = loaded(located, lambda: AutoConfig.from_pretrained(located.path))
    kept = config.to_dict().get("quantization_config")
    if kept is not None:
        raise ConfigError(
            "this model is quantised already",
            where=f"model: {located.path}",
            found=f"quantization_config: {kept.get('quant_method', kept)}",
            expected="a model of plain weights",
            fix="leave quantise out",
        )


def layers(model: nn.Module, saved: Sequence[str], storage: Storage) -> tuple[list[str], list[str]]:
    """The linear layers of a model to be quantised, and those that stay plain though nothing of them is trained.

    Raises:
        ConfigError: there is none of the former.
    """
    modules = Modules.of(model)
    full = saved_paths(modules, saved)
    chosen = [path for path in all_linear(modules) if not any(f"{path}.".startswith(f"{one}.") for one in full)]
    left = [path for path in chosen if not storage.takes(site_of(modules.by_path[path]))]
    chosen = [path for path in chosen if path not in set(left)]
    while chosen:
        try:
            select(model, these(chosen), ())
            return chosen, left
        except TargetError as error:
            where = str(error.where)
            if where not in chosen:
                raise
            chosen.remove(where)  # its weight is another layer's, too, or its forward is not its class's
            left.append(where)
    raise ConfigError(
        f"no layer of this model can be kept as {storage.name}",
        where="quantise",
        found=f"{type(model).__name__} with {some(left, 3)}" if left else type(model).__name__,
        expected="linear layers with weights of their own",
        fix="leave quantise out" if storage.name == "int8" else "quantise int8",
    )


def shapes(model: nn.Module, paths: Sequence[str]) -> list[tuple[int, int]]:
    """(out, in) of some layers."""
    found = (site_of(model.get_submodule(path)).shape for path in paths)
    return [(shape.out, shape.inn) for shape in found]


def sketch(model: nn.Module, paths: Sequence[str]) -> None:
    """Gives layers on the meta device int8 rows there: tensors of their shapes, for a plan."""
    for path in paths:
        site = site_of(model.get_submodule(path))
        out, inn = site.shape.out, site.shape.inn
        values = torch.empty(out, inn, dtype=torch.int8, device="meta")
        put(site, Rows(values, torch.empty(out, 1, dtype=torch.float32, device="meta"), 0.0, 0.0))


def these(paths: Sequence[str]) -> str:
    """A regular expression for these paths and no others."""
    return "|".join(map(re.escape, paths))


def _four_bits(module: nn.Module) -> nn.Module:
    """A layer of bitsandbytes with the weight and the bias of a plain one."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    out, inn = weight.shape
    options = {"compress_statistics": False, "quant_type": "nf4"}
    made: Any = Linear4bit(inn, out, bias=bias is not None, compute_dtype=weight.dtype, device="meta", **options)
    made.weight = Params4bit(weight.detach(), requires_grad=False, module=made, **options)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    # Else it rounds its scales the first time that it evaluates: a run that goes on would not be the one that stopped.
    made.support_avx512bf16_for_cpu = False
    made.to(weight.device)
    result: nn.Module = made.train(module.training)
    return result


def _folder(located: Located) -> Path:
    path = Path(located.path)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(loaded(located, lambda: snapshot_download(located.path, allow_patterns=FILES)))


def _told(model: nn.Module, storage: Storage, done: Quantised, left: Sequence[str]) -> str:
    tensors = [*model.parameters(), *model.buffers()]
    after = sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
    if storage.whole:  # its scales are no buffers
        after += done.after - sum(_stored_bytes(model.get_submodule(path)) for path in done.layers)
    before = after - done.after + done.before
    stay = f"; {len(left)} linear layers stay as they are ({some(left, 2)})" if left else ""
    return (
        f"base quantised to {storage.name}: {_megabytes(after)} instead of {_megabytes(before)}; "
        f"{len(done.layers)} layers, relative error {done.error:.1%}{stay}"
    )


def _stored_bytes(module: nn.Module) -> int:
    weight: Tensor | None = module._parameters["weight"]
    assert weight is not None
    return weight.untyped_storage().nbytes()


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.2f} MB"
