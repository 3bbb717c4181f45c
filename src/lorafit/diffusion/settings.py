"""The settings of a DreamBooth run: one schema, strict, with the spellings of diffusers' scripts accepted and named.

A setting is written flat, wherever it comes from (flags, ``--set``, a YAML file, Python): `resolve` sorts the names
into the schema's own and the method's fields, and refuses every other. Importing this does not import diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from lorafit.errors import ConfigError
from lorafit.training.aliases import ALIASES as TRAINING_ALIASES
from lorafit.training.aliases import NEIGHBOURS
from lorafit.training.spelling import Advice, Layer, Merged, Spelling, schema_error

METHOD_ALIASES = frozenset({"alpha", "dropout", "init", "r", "ratio", "rslora", "targets", "exclude"})
"""Names that `lorafit train` has other spellings for, and that mean the same here."""

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{key: value for key, value in TRAINING_ALIASES.items() if value in METHOD_ALIASES},
        "base_model": "pipeline",
        "class_data_dir": "class_images",
        "center_crop": "crop",
        "checkpointing_steps": "save_every",
        "checkpoints_total_limit": "save_total_limit",
        "instance_data_dir": "instance_images",
        "lr": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "lr_warmup_steps": "warmup_steps",
        "max_train_steps": "max_steps",
        "mixed_precision": "dtype",
        "model": "pipeline",
        "model_name_or_path": "pipeline",
        "num_validation_images": "sample_count",
        "out_dir": "output_dir",
        "per_device_train_batch_size": "batch_size",
        "pretrained_model_name_or_path": "pipeline",
        "random_flip": "flip",
        "sample_prompt": "sample_prompts",
        "snr_gamma": "min_snr",
        "text_encoder_lr": "text_encoder_learning_rate",
        "train_batch_size": "batch_size",
        "validation_prompt": "sample_prompts",
    }
)
"""Spelling of diffusers' scripts, PEFT and others → name here."""

VALUES: Mapping[tuple[str, object], object] = MappingProxyType(
    {
        ("center_crop", True): "centre",
        ("center_crop", False): "random",
        ("init_lora_weights", True): "default",
        ("mixed_precision", "bf16"): "bfloat16",
        ("mixed_precision", "fp16"): "float16",
        ("mixed_precision", "no"): "float32",
        ("mixed_precision", False): "float32",
    }
)
"""A neighbour's spelling and value → the value here."""

METHOD_ADVICE: Advice = MappingProxyType(
    {key: value for key, value in NEIGHBOURS.items() if key not in ("load_in_8bit", "quantization_bit")}
)
"""What is something else here; the weights of a pipeline are not quantised."""

SPELLING = Spelling(ALIASES, VALUES, METHOD_ADVICE)
"""How other tools spell what is a setting here."""


def _several(prompts: Any) -> Any:
    return [prompts] if isinstance(prompts, str) else prompts


def _worded(prompt: str) -> str:
    if not prompt.strip():
        raise PydanticCustomError("no_words", "a prompt that has words")
    return prompt


Prompt = Annotated[str, AfterValidator(_worded)]


class Settings(BaseModel):
    """Everything that a DreamBooth run depends on.

    Attributes:
        pipeline: a directory that `save_pretrained` wrote, or a hub name.
        instance_images: the folder of the subject's pictures.
        instance_prompt: what they show ("a photo of sks dog"); a picture with a .txt file beside it has that instead.
        class_images: the folder of pictures of the class; missing ones are drawn into it. None is `class/` of the run.
        class_prompt: what the class is called ("a photo of a dog"); None trains without prior preservation.
        keep_prompts: what else is to stay as it is, beside the class: every other class picture shows one of these,
            in turn.
        num_class_images: so many pictures of the class are used, those of `keep_prompts` among them.
        prior_loss_weight: the weight λ of their loss.
        eval_images: pictures of the subject that are not trained on, for the held-out loss; None: the training
            pictures under noises that training never draws.
        method: a name of `lorafit.METHODS`.
        method_options: the fields of the method: r, alpha, dropout, …
        targets: "attention", "convolutions", "all-linear", suffixes of names, or a regular expression; None is what the
            pipeline's family adapts, its attention projections.
        exclude, rank_pattern, alpha_pattern: as for `lorafit.attach`, in the denoiser.
        train_text_encoder: whether the text encoders get adapters of their own.
        resolution: pixels of a picture's side in training.
        crop: "centre", or "random": `views` crops of each picture, drawn once.
        views: so many crops of each picture, where they are random.
        flip: whether each picture is shown mirrored, too.
        max_steps: optimizer steps.
        learning_rate: None is 1e-4 times what the method asks for.
        text_encoder_learning_rate: None is a tenth of `learning_rate`.
        batch_size: the subject's pictures in a batch; as many of the class come to them.
        gradient_accumulation_steps: batches in a step.
        lr_scheduler_type, warmup_steps: as `transformers.get_scheduler` has them.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        min_snr: γ of min-SNR weighting (arXiv:2303.09556); None weighs all times alike.
        sample_prompts: what is drawn during training; none: the instance's prompt, and that of the class.
        sample_every: steps between sheets of samples; 0 draws them before and after alone.
        sample_count: pictures of each prompt, by the seeds 0, 1, 2, …
        sample_steps, guidance: of the sampler, for samples and class pictures.
        evaluate_every: steps between measurements of the held-out loss; 0 measures before and after alone.
        evaluation_draws: pairs of noise and time for each held-out picture.
        save_every: steps between checkpoints; 0 saves at the end alone, and on Ctrl-C.
        save_total_limit: so many checkpoints are kept.
        gradient_checkpointing: whether activations are computed again in the backward pass.
        output_dir: where the run lives; the same command goes on there.
        seed: of crops, order, noise, initial values and dropout.
        dtype: of the pipeline; "auto" is bfloat16 where a GPU has it, else float32. Adapters are float32.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipeline: str
    instance_images: str
    instance_prompt: Prompt
    class_images: str | None = None
    class_prompt: Prompt | None = None
    keep_prompts: Annotated[list[Prompt], BeforeValidator(_several)] = Field(default_factory=list)
    num_class_images: int = Field(default=100, ge=1)
    prior_loss_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    eval_images: str | None = None
    method: str = "lora"
    method_options: dict[str, Any] = Field(default_factory=dict)
    targets: str | list[str] | None = None
    exclude: str | list[str] = Field(default_factory=list)
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    train_text_encoder: bool = False
    resolution: int = Field(default=512, ge=8)
    crop: Literal["centre", "random"] = "centre"
    views: int = Field(default=8, ge=1)
    flip: bool = False
    max_steps: int = Field(default=400, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    text_encoder_learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=1, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    min_snr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    sample_prompts: Annotated[list[Prompt], BeforeValidator(_several)] = Field(default_factory=list)
    sample_every: int = Field(default=100, ge=0)
    sample_count: int = Field(default=4, ge=0)
    sample_steps: int = Field(default=25, ge=1)
    guidance: float = Field(default=7.5, ge=0, allow_inf_nan=False)
    evaluate_every: int = Field(default=50, ge=0)
    evaluation_draws: int = Field(default=8, ge=1)
    save_every: int = Field(default=100, ge=0)
    save_total_limit: int = Field(default=2, ge=1)
    gradient_checkpointing: bool = False
    output_dir: str = ""
    seed: int = Field(default=42, ge=0, lt=2**63)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def folder(self) -> Path:
        """The run's folder: `output_dir`, or one named after the subject's folder and the method."""
        if self.output_dir:
            return Path(self.output_dir)
        subject = re.sub(r"[^\w.-]+", "-", Path(self.instance_images).resolve().name) or "subject"
        return Path("runs") / f"{subject}-{self.method}"

    @property
    def prior_folder(self) -> Path:
        """The folder of the class pictures."""
        return self.folder / "class" if self.class_images is None else Path(self.class_images)

    @property
    def prompts(self) -> list[str]:
        """What is drawn during training."""
        if self.sample_prompts:
            return list(dict.fromkeys(self.sample_prompts))
        return [each for each in (self.instance_prompt, self.class_prompt) if each is not None]


def own_fields() -> list[str]:
    """The names that the schema itself has for single settings."""
    return [name for name in Settings.model_fields if name != "method_options"]


def resolve(layers: Iterable[Layer], notify: Callable[[str], None] = lambda _: None) -> Settings:
    """One set of settings from several sources; later ones win.

    Args:
        layers: (origin, flat settings), weakest first.
        notify: is told once for each setting that came under a neighbour's name.

    Raises:
        ConfigError: an unknown setting (with near names), two spellings of one in the same source, a value of the wrong
            type or out of range, or settings that do not go together.
    """
    from lorafit.methods import build, method_class

    merged = SPELLING.merged(layers, notify)
    name, origin = merged.get("method", ("lora", "the default"))
    canonical = method_class(name, f"{origin}: method").name
    merged["method"] = (canonical, origin)
    own, options = _sorted(merged, canonical)
    try:
        settings = Settings(**own, method_options=options)
    except ValidationError as error:
        raise schema_error(error, merged) from None
    build(canonical, options)
    _check(settings)
    return settings


def _sorted(merged: Merged, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
    from lorafit.methods import INNER, accepts

    known = set(own_fields())
    types = accepts(method, merged.get(INNER, (None, ""))[0])
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, (value, origin) in merged.items():
        if name in known:
            own[name] = value
        elif name in types:
            options[name] = SPELLING.option(method, name, value, types[name], origin)
        else:
            expected = f"a setting of lorafit dreambooth or of {method}"
            raise SPELLING.unknown(name, origin, method, {*known, *types}, expected)
    return own, options


def _check(settings: Settings) -> None:
    """Raises `ConfigError` for settings that do not go together."""
    if settings.class_images is not None and settings.class_prompt is None:
        raise ConfigError(
            "there are pictures of a class, and no prompt for them",
            where="class_prompt",
            found="nothing",
            expected="what the pictures of the class show",
            fix='--class-prompt "a photo of a dog"',
        )
    if settings.keep_prompts and settings.class_prompt is None:
        raise ConfigError(
            "there are prompts to keep, and none for the class",
            where="class_prompt",
            found="nothing",
            expected="what the subject is one of, which is kept first",
            fix='--class-prompt "a photo of a dog"',
        )
    for name in ("num_class_images", "prior_loss_weight"):
        if name in settings.model_fields_set and settings.class_prompt is None:
            raise ConfigError(
                f"{name} means nothing without a class",
                where=name,
                found=getattr(settings, name),
                expected="class_prompt with it",
                fix=f'--class-prompt "a photo of a dog", or leave {name} out',
            )
    if "views" in settings.model_fields_set and settings.crop == "centre":
        raise ConfigError(
            "there is one view of a picture that is cut at its centre",
            where="views",
            found=settings.views,
            expected="crop=random with it",
            fix="--crop random, or leave views out",
        )
    if settings.text_encoder_learning_rate is not None and not settings.train_text_encoder:
        raise ConfigError(
            "the text encoder has a learning rate, and is not trained",
            where="text_encoder_learning_rate",
            found=settings.text_encoder_learning_rate,
            expected="train_text_encoder with it",
            fix="--train-text-encoder, or leave the rate out",
        )
    if settings.warmup_steps and settings.lr_scheduler_type == "constant":
        raise ConfigError(
            "a constant schedule does not warm up",
            where="warmup_steps",
            found=settings.warmup_steps,
            expected="another lr_scheduler_type",
            fix="--set lr_scheduler_type=constant_with_warmup",
        )
