"""The formats of `lorafit export`, one function each: writes, reads what it wrote, and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.cli.adapters import Description
    from lorafit.cli.screen import Screen
    from lorafit.exporting.flat import Checked
    from lorafit.exporting.origin import Origin


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    adapter: Path
    output: Path
    name: str
    merged: bool
    untie: bool
    r: int | None
    component: str | None
    model: str | None
    dtype: str | None
    labels: str | None
    screen: Screen

    def described(self) -> Description:
        """The adapter and its base model."""
        from lorafit.cli.adapters import describe

        return describe(self.adapter, self.model, self.labels, self.screen.say)


@dataclass(frozen=True)
class Done:
    """What came of it.

    Attributes:
        difference: how far the file is from the adapter.
        tolerance: how far it may be.
        what: in which numbers.
        facts: further fields of the JSON result.
    """

    difference: float
    tolerance: float
    what: str
    facts: Mapping[str, Any]


# Whole models


def _hf(job: Job) -> Done:
    from lorafit.cli.merge import show, stored_dtype, write

    described = job.described()
    kind = job.dtype or stored_dtype(described)
    job.screen.say(f"{described.located.name} in {kind}, with {job.adapter}")
    loaded, probe, plain, adapted, untied = _merged(job, described, kind)
    use = _loading(described, loaded.tokenizer.pad_token_id)
    card = _card(job, described, f"{job.name}: a merged model", f"```python\n{use}\n```")
    found = write(loaded, described, job.output, probe, plain, adapted, keep=True, card=card)
    show(found, job.screen)
    return Done(found.difference, found.tolerance, "logit", {"dtype": kind, "untied": untied, "effect": found.effect})


def _loading(described: Description, pad: int) -> str:
    """How a merged model is loaded, in Python."""
    if described.pooling is not None:
        return (
            "import torch\n"
            "from lorafit.training.models import Located, load_classifier\n"
            "\n"
            "# Its head reads the pooled states of the encoder, for which transformers has no class.\n"
            'located = Located("this/folder", "this/folder")\n'
            f"labels = {list(described.labels)!r}\n"
            f"model, _ = load_classifier(located, torch.float32, labels, {pad}, pooling={described.pooling!r})"
        )
    if described.headed:
        kind, rest = "AutoModelForSequenceClassification", ""
    else:
        kind, rest = "AutoModel", "  # or the class that the base is loaded with"
    return f'from transformers import {kind}\nmodel = {kind}.from_pretrained("this/folder"){rest}'


def _merged(job: Job, described: Description, kind: str) -> tuple[Any, Any, Any, Any, bool]:
    """The model with the adapter in its weights; tokens, and the logits for them before and with the adapter."""
    from lorafit.cli.adapters import PLAIN, load, run_storage
    from lorafit.cli.merge import fold, in_labels
    from lorafit.cli.probing import logits_of, probe_for

    if run_storage(job.adapter) != PLAIN:
        job.screen.say(f"it was trained over a base in {run_storage(job.adapter)}, and is merged into the plain one")
    loaded = load(described, kind)
    probe = probe_for(loaded.model)
    assert loaded.handle is not None
    with loaded.handle.disabled():
        plain = logits_of(loaded.model, probe)
    adapted = logits_of(loaded.model, probe)
    untied = fold(loaded, job.untie)
    if untied:
        job.screen.say("the weights are no longer tied")
    plain, adapted = in_labels(loaded, described, plain, adapted, job.screen.say)
    return loaded, probe, plain, adapted, untied


def _gguf(job: Job) -> Done:
    return _gguf_model(job) if job.merged else _gguf_adapter(job)


def _gguf_model(job: Job) -> Done:
    import torch

    from lorafit.cli.adapters import CAUSAL
    from lorafit.cli.merge import TOLERANCE, comparison, show, stored_dtype
    from lorafit.cli.probing import logits_of
    from lorafit.errors import CheckpointError
    from lorafit.exporting import gguf_model
    from lorafit.exporting.folder import fresh
    from lorafit.exporting.gguf_tokenizer import vocabulary
    from lorafit.training.models import Located
    from lorafit.training.models import loaded as opened

    described = job.described()
    if described.task_type != CAUSAL:
        raise CheckpointError("a classifier has no place in a GGUF file of llama's type", fix="--to hf")
    kind = job.dtype or stored_dtype(described)
    config = _config(described)
    gguf_model.check_config(config)
    job.screen.say(f"{described.located.name} in {kind}, with {job.adapter}")
    loaded, probe, plain, adapted, untied = _merged(job, described, "float32")
    config = loaded.model.config
    words = vocabulary(loaded.tokenizer, config.vocab_size, _gguf_source(described))
    job.screen.say(words.said)
    if config.to_dict().get("sliding_window") is not None:
        job.screen.say("llama.cpp's type llama has no sliding window: the model sees all of a long text there")
    tensors = {key: value for key, value in loaded.model.state_dict().items() if isinstance(value, torch.Tensor)}
    card = _card(job, described, f"{job.name}: a merged model, GGUF", f"```bash\nllama-cli -m {gguf_model.FILE}\n```")
    with fresh(job.output) as folder:
        (folder / "README.md").write_text(card, encoding="utf-8")
        other = gguf_model.write(tensors, folder, config=config, vocabulary=words, dtype=kind, name=job.name)
    if other:
        job.screen.say(
            f"float16 instead of {kind}, since their rows are no whole blocks: {len(other)} tensors, {other[0]}"
        )
    checked = gguf_model.check(tensors, job.output, config=config, dtype=kind if not other else "q8_0")
    job.screen.say(f"weights read back: at most {checked.difference:.2g} of a tensor's largest one away")
    if not checked.good:
        return Done(checked.difference, checked.tolerance, "weight", {"dtype": kind})
    from transformers import AutoModelForCausalLM

    place = Located(str(job.output), job.name)
    with redirect_stderr(StringIO()):  # its progress bar has no switch
        again = opened(
            place,
            lambda: AutoModelForCausalLM.from_pretrained(job.output, gguf_file=gguf_model.FILE, dtype=torch.float32),
        )
    logits = logits_of(again.to(probe["input_ids"].device).eval(), probe)
    found = comparison(logits, plain, adapted, TOLERANCE.get(kind, TOLERANCE["bfloat16"]))
    show(found, job.screen)
    facts = {"dtype": kind, "untied": untied, "effect": found.effect, "weights": checked.difference}
    return Done(found.difference, found.tolerance, "logit", facts)


def _config(described: Description) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(described.located.path)


def _gguf_source(described: Description) -> Path | None:
    """The GGUF file that the base came from: that of the embedded model."""
    from lorafit.errors import MissingExtraError
    from lorafit.training.embedded import find_source
    from lorafit.training.models import EMBEDDED_NAME

    if described.located.name != EMBEDDED_NAME:
        return None
    try:
        return find_source()
    except MissingExtraError:  # the model is in the cache, and its package is gone
        return None


# Adapters


def _gguf_adapter(job: Job) -> Done:
    from lorafit.exporting import gguf_adapter
    from lorafit.exporting.flat import flat, refuse_dora
    from lorafit.exporting.folder import fresh

    described, kind = job.described(), job.dtype or "float32"
    refuse_dora(job.adapter, job.r, "a GGUF adapter")
    config = _config(described)
    use = f"```bash\nllama-cli -m BASE.gguf --lora {gguf_adapter.FILE}\n```"
    card = _card(job, described, f"{job.name}: a LoRA adapter, GGUF", use)
    with flat(job.adapter, _base(job, described), job.r) as own:
        with fresh(job.output) as folder:
            (folder / "README.md").write_text(card, encoding="utf-8")
            count = gguf_adapter.write(own, folder, config=config, dtype=kind, name=job.name)
        checked = gguf_adapter.check(own, job.output, config=config, dtype=kind)
    file = job.output / gguf_adapter.FILE
    job.screen.say(
        f"{count:,} tensors adapted; with the base in GGUF: llama-cli -m BASE.gguf --lora {file}", whole=True
    )
    return _done(checked, {"dtype": kind, "tensors": count})


def _vllm(job: Job) -> Done:
    from lorafit import store
    from lorafit.exporting import vllm
    from lorafit.exporting.flat import flat, is_plain, refuse_dora
    from lorafit.exporting.folder import fresh

    kind = job.dtype or "float32"
    refuse_dora(job.adapter, job.r, "vLLM")
    described = None if is_plain(job.adapter) else job.described()
    base = job.model or store.read(job.adapter).config.get("base_model_name_or_path") or "BASE"
    card = _card(
        job, described, f"{job.name}: plain LoRA for vLLM", "The rank that vLLM has to allow is `r` of its config."
    )
    with flat(job.adapter, None if described is None else _base(job, described), job.r) as own:
        with fresh(job.output) as folder:
            rank = vllm.write(own, folder, dtype=kind, card=card)
        checks = {"lorafit": vllm.check(own, job.output, kind)}
        by_peft = vllm.check_by_peft(own, job.output, kind)
    if by_peft is not None:
        checks["peft"] = by_peft
    told = ", ".join(f"{who} {each.difference:.2g}" for who, each in checks.items())
    job.screen.say(f"rank {rank} at every layer, scale 1; ΔW read back, largest difference: {told}")
    if by_peft is None:
        job.screen.say("peft is not installed: it was not compared with what that reads")
    line = vllm.serve_line(str(base), job.name, job.output, rank)
    job.screen.say(line, whole=True)
    worst = max(checks.values(), key=lambda each: each.difference)
    return _done(worst, {"dtype": kind, "r": rank, "serve": line})


def _diffusers(job: Job) -> Done:
    import tempfile

    from lorafit.exporting import diffusers
    from lorafit.exporting.folder import fresh

    kind = job.dtype or "float32"
    with tempfile.TemporaryDirectory() as place:
        plain = diffusers.opened(job.adapter, Path(place))
    component = job.component or diffusers.component_of(list(plain.pairs))
    job.screen.say(f"the adapter of a pipeline's {component}: {len(plain.pairs):,} layers")
    use = '```python\npipeline.load_lora_weights("this/folder")\n```'
    card = _card(job, None, f"{job.name}: a LoRA adapter for diffusers ({component})", use)
    with fresh(job.output) as folder:
        diffusers.write(plain, folder, component=component, dtype=kind)
        (folder / "README.md").write_text(card, encoding="utf-8")
    checked = diffusers.check(plain, job.output, component=component, dtype=kind)
    return _done(checked, {"dtype": kind, "component": component})


def _done(checked: Checked, facts: Mapping[str, Any]) -> Done:
    return Done(checked.difference, checked.tolerance, checked.what, facts)


def _base(job: Job, described: Description) -> Any:
    """The base model, where the adapter's file does not say by itself what it changes; else None."""
    from lorafit.cli.adapters import load
    from lorafit.exporting.flat import is_plain

    if is_plain(job.adapter):
        return None
    job.screen.say("its file does not say by itself what it changes: the base is loaded, too")
    return load(replace(described, adapter=None), "float32").model


def _card(job: Job, described: Description | None, title: str, use: str) -> str:
    from lorafit.card import export_card
    from lorafit.exporting.origin import origin

    place = None if described is None else described.located.path
    found: Origin = origin(job.adapter, None if described is None else described.located.name, place)
    unknown = [name for name, value in found.facts.items() if value == "unknown"]
    if unknown:
        job.screen.say(f"unknown, and the card says so: {', '.join(unknown)}")
    return export_card(
        title=title,
        base=found.base,
        licence=found.base_licence,
        tags=("lora", "lorafit"),
        facts=found.facts,
        settings=found.settings,
        scores=found.scores,
        use=use,
    )


BASE = ("--model", "--labels")
FORMATS: Mapping[str, tuple[Callable[[Job], Done], tuple[str, ...]]] = {
    "hf": (_hf, ("--untie", *BASE)),
    "vllm": (_vllm, ("--r", *BASE)),
    "gguf": (_gguf, ("--merged", "--r", "--untie", *BASE)),
    "diffusers": (_diffusers, ("--component",)),
}
"""Format → what writes it, and the options that it has beside those of all."""
