"""What is compared: methods of the household and references, each with the settings of its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from lorafit.errors import ConfigError, nearest
from lorafit.experiments.parts import Parts
from lorafit.experiments.trial import Kind, Notify
from lorafit.training.aliases import ALIASES
from lorafit.training.config import Settings, resolve
from lorafit.training.spelling import Layer
from lorafit.training.tasks import NUMBERS

REFERENCES = ("base", "full", "probe")
SAVE_STEPS = {Kind.ADAPTER: 0.25, Kind.FULL: 0.5, Kind.BASE: 0.5, Kind.PROBE: 0.5}
"""How often a trial is saved, as a share of its steps, where the user says nothing: all weights take their time."""
OWN: Mapping[str, str] = {
    "method": "--methods a,b",
    "output_dir": "--output-dir",
}
ALIKE = frozenset(
    {"model", "data", "data_split", "eval_data", "eval_data_split", "eval_split", "eval_limit", "columns", "group"}
    | {"slice", "task", "pooling", "max_length", "seed", "keep_best", "early_stopping", "eval_strategy", "eval_steps"}
    | {"max_steps", "num_train_epochs", "gradient_accumulation_steps"}
    | {"per_device_train_batch_size", "per_device_eval_batch_size"}
)
"""Settings that all candidates have in common: a method with others would be measured by another measure."""
NO_PART = frozenset({"samples", "max_new_tokens", "general", "target"})
"""Settings of `lorafit train` that add to what a run tells, and nothing to what is compared."""


@final
@dataclass(frozen=True)
class Candidate:
    """One of those that are compared.

    Attributes:
        name: a method's, or a reference's.
        kind: what is trained.
        settings: of its runs; the seed, the steps and the rate are put in later.
    """

    name: str
    kind: Kind
    settings: Settings

    @property
    def fixed(self) -> float | None:
        """The rate that the user chose for it; None where it is to be searched."""
        found = self.settings.training.get("learning_rate")
        return None if found is None else float(found)

    def run(self, parts: Parts, *, seed: int, rate: float | None, steps: int | None) -> Settings:
        """The settings of one of its runs."""
        given = self.settings.training
        training = {"save_steps": SAVE_STEPS[self.kind], "save_total_limit": 1, **self._chosen()}
        if rate is not None:
            training["learning_rate"] = rate
        if steps is not None:
            training["max_steps"] = steps
        return self.settings.model_copy(
            update={
                "data": parts.train,
                "data_split": None,
                "eval_data": parts.validation,
                "eval_data_split": None,
                "eval_split": None,
                "eval_limit": None,
                "group": None,
                "seed": seed,
                "samples": 0,
                # Guessed of all records: a part of them could look otherwise.
                "task": NUMBERS if parts.numbers else self.settings.task,
                "general": "none",  # what is forgotten is no part of the comparison, and takes as long as the steps
                "target": None,
                "training": {**given, **training},
            }
        )

    def _chosen(self) -> dict[str, Any]:
        """What the user says on saving: what differs from what everybody gets."""
        from lorafit.training.config import DEFAULT_TRAINING

        names = ("save_steps", "save_total_limit")
        given = self.settings.training
        return {name: given[name] for name in names if given.get(name) != DEFAULT_TRAINING[name]}


def candidates(
    layers: Sequence[Layer], methods: Sequence[str], references: Sequence[str], say: Callable[[str], None]
) -> list[Candidate]:
    """Methods in their order, then references, with settings shared as far as a method has them.

    Args:
        layers: as `resolve` takes them; besides, a method's name with a mapping holds settings of that method alone.
        methods: names.
        references: "base", "full", "probe".
        say: is told what a method is not given, and neighbours' spellings.

    Raises:
        ConfigError: an unknown method, reference or setting, or one that a comparison decides by itself.
    """
    from lorafit.methods import METHODS, accepts, method_class

    names = list(dict.fromkeys(method_class(name, "--methods").name for name in methods))
    _check_references(references)
    shared, own = _parted(layers, METHODS)
    for stranger in sorted(set(own) - set(names)):
        raise ConfigError(
            "settings of a method that is not compared",
            where=stranger,
            expected=f"one of {', '.join(names)}",
            fix=f"add {stranger} to --methods, or remove them",
        )
    _check_alike(own)
    told = {_canonical(key) for layers in (shared, *own.values()) for _, values in layers for key in values}
    unused = sorted(told & NO_PART)
    if unused:
        say(f"{', '.join(unused)}: no part of a comparison, left out")
    every = {option for name in METHODS for option in accepts(name)}
    made: list[Candidate] = []
    for name in names:
        accepted = accepts(name)
        given = [(origin, _of(values, every - set(accepted))) for origin, values in shared]
        _tell_left_out(name, shared, every - set(accepted), say)
        settings = resolve([*given, *own.get(name, ()), ("--methods", {"method": name})], say if not made else _quiet)
        made.append(Candidate(name, Kind.ADAPTER, settings))
    plain = [(origin, _of(values, every)) for origin, values in shared]
    for name in references:
        made.append(Candidate(name, Kind(name), resolve(plain, _quiet)))
    if not made or not names:
        raise ConfigError("there is nothing to compare", where="--methods", fix="--methods lora,dora")
    for candidate in made:
        _check(candidate)
    return made


def _quiet(line: str) -> None:
    """What was said once is not said again."""


def _check_references(references: Sequence[str]) -> None:
    for name in references:
        if name not in REFERENCES:
            raise ConfigError(
                "no such reference",
                where="--reference",
                found=repr(name),
                expected=", ".join(REFERENCES),
                near=nearest(name, REFERENCES),
                fix="--reference base,full",
            )


def _check_alike(own: Mapping[str, Sequence[Layer]]) -> None:
    for origin, values in (layer for layers in own.values() for layer in layers):
        for key in values:
            if _canonical(key) in ALIKE:
                raise ConfigError(
                    f"{_canonical(key)} is the same for all that is compared",
                    where=f"{origin}.{key}",
                    found=repr(values[key]),
                    expected="one value, not under a method's name",
                    fix=f"give {key} without the method, or leave it out",
                )


def _parted(layers: Sequence[Layer], methods: Mapping[str, Any]) -> tuple[list[Layer], dict[str, list[Layer]]]:
    """Settings of all, and those of single methods."""
    shared: list[Layer] = []
    own: dict[str, list[Layer]] = {}
    for origin, values in layers:
        left: dict[str, Any] = {}
        for key, value in values.items():
            name = str(key).replace("_", "-").lower()
            if name in methods and isinstance(value, Mapping):
                own.setdefault(name, []).append((f"{origin}: {key}", value))
                continue
            canonical = ALIASES.get(str(key).replace("-", "_"), str(key).replace("-", "_"))
            if canonical in OWN:
                raise ConfigError(
                    f"a comparison decides {canonical} by itself",
                    where=f"{origin}: {key}",
                    found=repr(value),
                    expected=OWN[canonical],
                    fix=f"remove {key}",
                )
            left[key] = value
        shared.append((origin, left))
    return shared, own


def _of(values: Mapping[str, Any], without: set[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if _canonical(key) not in without}


def _canonical(key: str) -> str:
    name = str(key).replace("-", "_")
    return ALIASES.get(name, name)


def _tell_left_out(name: str, shared: Sequence[Layer], strange: set[str], say: Notify) -> None:
    left = [str(key) for _, values in shared for key in values if _canonical(key) in strange]
    if left:
        say(f"{name} has no {', '.join(sorted(set(left)))}: it runs without")


def _check(candidate: Candidate) -> None:
    settings = candidate.settings
    if candidate.kind in (Kind.FULL, Kind.PROBE) and settings.quantise != "none":
        raise ConfigError(
            "the weights of a quantised base cannot be trained",
            where="--reference",
            found=f"{candidate.name}, and quantise={settings.quantise}",
            fix="--reference base, or leave quantise out",
        )
    if settings.early_stopping:
        raise ConfigError(
            "candidates of a comparison have the same number of steps",
            where="early_stopping",
            found="true",
            fix="leave early_stopping out: the adapter with the lowest validation loss is kept anyway",
        )
    if settings.training.get("eval_strategy") == "no":
        raise ConfigError(
            "rates are chosen by the validation part",
            where="eval_strategy",
            found="no",
            fix="leave eval_strategy out",
        )


def no_head() -> ConfigError:
    """The error for a model of which no head can be trained alone."""
    return ConfigError(
        "a language model has no head that could be trained alone",
        where="--reference",
        found="probe",
        expected="records with labels: a classifier or a regression",
        fix="--reference base,full",
    )


def check_probe(made: Sequence[Candidate], *, labelled: bool) -> None:
    """Raises `ConfigError` where a head is to be trained alone and there is none: for records without labels."""
    if not labelled and any(one.kind is Kind.PROBE for one in made):
        raise no_head()


def with_heads(made: Sequence[Candidate], say: Notify, *, labelled: bool) -> list[Candidate]:
    """The candidates with one rate for what is trained in full beside an adapter, such as a new head.

    Methods want rates that are hundreds of times apart. A head wants the same beside each, and what is compared are
    adapters.

    Raises:
        ConfigError: there is no such model.
    """
    first = made[0].settings
    if first.full_learning_rate is not None or not (labelled or first.modules_to_save):
        return list(made)
    rate = _width_rate(first, say)
    say(f"what is trained in full beside an adapter learns at {rate:.2g} in every run; --full-learning-rate sets it")
    return [replace(one, settings=one.settings.model_copy(update={"full_learning_rate": rate})) for one in made]


def _config(settings: Settings, say: Notify) -> Any:
    """The model's configuration."""
    from transformers import AutoConfig

    from lorafit.training.models import loaded, locate

    located = locate(settings.model, say)
    return loaded(located, lambda: AutoConfig.from_pretrained(located.path))


def _width_rate(settings: Settings, say: Notify) -> float:
    """LoRA's default rate for the model."""
    from lorafit.training.models import default_rate

    return default_rate(_config(settings, say).get_text_config().hidden_size)


def default_rates(made: Sequence[Candidate], say: Notify, *, labelled: bool) -> dict[str, float]:
    """The rate that each search begins with: what `lorafit train` would take.

    Only the shapes of the model are looked at: its weights are not loaded.

    Raises:
        ConfigError: there is no such model.
        TargetError: no such layers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from lorafit.experiments.trained import Everything, Probe
    from lorafit.methods import build
    from lorafit.plan import Modules, choose, saved_paths
    from lorafit.training.models import classifier_shape, default_rate, locate
    from lorafit.training.planning_shades import shades
    from lorafit.training.pooling import pooling_of

    first = made[0].settings
    config = _config(first, say)
    width = default_rate(config.get_text_config().hidden_size)
    pooling = pooling_of(locate(first.model, say).path, first.pooling).kind if labelled else None
    with torch.device("meta"):
        if labelled:  # how many classes there are plays no part
            model = classifier_shape(config, ("no", "yes"), 0, pooling)
        else:
            model = AutoModelForCausalLM.from_config(config)
    shades(model)
    modules = Modules.of(model)
    rates = {}
    for one in made:
        if one.kind is Kind.FULL:
            rates[one.name] = width * Everything.times
        elif one.kind is Kind.PROBE:
            rates[one.name] = width * Probe.times
        elif one.kind is Kind.ADAPTER:
            settings = one.settings
            saved = saved_paths(modules, settings.modules_to_save)
            paths = choose(model, modules, settings.targets, settings.exclude, saved)
            shapes = [site.shape for site in modules.sites(paths)]
            rates[one.name] = width * build(settings.method, settings.method_options).rate(shapes)
    return rates
