"""From words and files to settings: who wins, what values mean, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit.cli.exits import WrongUsageError
from lorafit.cli.openended import split
from lorafit.cli.settings import gather, resolved
from lorafit.cli.values import loose, pattern, scalar
from lorafit.errors import ConfigError
from lorafit.methods import METHODS, AdaLoRA, DoRA, LoRA, LoRADrop, LoRAPlus, build, fields_of
from lorafit.training.aliases import ALIASES, NEIGHBOURS
from lorafit.training.config import resolve


def test_values_stay_with_their_options_wherever_they_stand() -> None:
    declared, others = split(
        ["--bf16", "--r", "8", "--save_steps", "5", "--data=x", "--x", "a", "b", "--json", "stray"],
        {"--r": True, "--data": True, "--json": False},
    )
    assert declared == ["--r", "8", "--data=x", "--json", "stray"]
    assert others == ["--bf16", "--save_steps", "5", "--x", "a", "b"]


def test_a_value_may_look_like_an_option_behind_one_that_takes_it() -> None:
    assert split(["--prompt", "--r", "--y", "-1"], {"--prompt": True}) == (["--prompt", "--r"], ["--y", "-1"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bf16"], {"bf16": True}),
        (["--no-bf16"], {"bf16": False}),
        (["--bf16", "false"], {"bf16": False}),
        (["--save-steps", "5"], {"save_steps": "5"}),
        (["--max-grad-norm=-1"], {"max_grad_norm": "-1"}),
        (["--report_to", "tensorboard", "wandb"], {"report_to": ["tensorboard", "wandb"]}),
        (["--lr-scheduler-kwargs", '{"num_cycles": 2}'], {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        (["--run-name", "null"], {"run_name": None}),
        (["--lora_target", "q_proj,v_proj"], {"lora_target": ["q_proj", "v_proj"]}),
        (["--target-modules", "q_proj", "v_proj"], {"target_modules": ["q_proj", "v_proj"]}),
        (["--modules-to-save", "score"], {"modules_to_save": ["score"]}),
        (["--rank-pattern", "q_proj=8"], {"rank_pattern": {"q_proj": "8"}}),
    ],
)
def test_undeclared_options(words: list[str], expected: dict[str, Any]) -> None:
    assert loose(words, "here") == expected


def test_of_options_given_twice_the_last_counts_and_lists_add_up() -> None:
    assert loose(["--save-steps", "5", "--save_steps=6"], "here") == {"save_steps": "6"}
    words = ["--modules-to-save", "a", "--modules_to_save", "b", "--bf16", "--no-bf16"]
    assert loose(words, "here") == {"modules_to_save": ["a", "b"], "bf16": False}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("null", None),
        ("true", True),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    made = scalar(text, "here")
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    ("texts", "value"),
    [
        (["all-linear"], "all-linear"),
        (["q_proj"], ["q_proj"]),
        (["q_proj, v_proj", "mlp.up_proj"], ["q_proj", "v_proj", "mlp.up_proj"]),
        (["re:.*[qv]_proj{1,2}"], ".*[qv]_proj{1,2}"),
    ],
)
def test_patterns_for_modules(texts: list[str], value: Any) -> None:
    assert pattern(texts, "targets", "here") == value


@pytest.mark.parametrize(
    ("texts", "fix"),
    [
        ([".*q_proj"], "--targets 're:.*q_proj'"),
        (["all"], "--targets all-linear"),
        (["re:a", "b"], "re:"),
        (["q_proj,all-linear"], "all-linear"),
    ],
)
def test_patterns_that_could_mean_two_things_are_refused(texts: list[str], fix: str) -> None:
    with pytest.raises(ConfigError, match="not clear") as caught:
        pattern(texts, "targets", "here")
    assert fix in str(caught.value.fix)


def settings(tmp_path: Path, yaml: str = "", sets: tuple[str, ...] = (), extra: str = "", **flags: Any) -> Any:
    said: list[str] = []
    path = tmp_path / "run.yaml"
    path.write_text(yaml)
    layers = gather(config=path if yaml else None, sets=sets, flags=flags, extra=extra.split())
    made = resolved(layers, said.append)
    return made, said


def test_flags_beat_set_and_set_beats_the_file(tmp_path: Path) -> None:
    yaml = "r: 2\nalpha: 2\nlearning_rate: 1e-4\nsave_steps: 7\n"
    made, _ = settings(tmp_path, yaml, ("r=3", "learning_rate=1e-3"), "--save_steps 9", r=4)
    assert made.method_options == {"r": 4, "alpha": 2.0}
    assert made.training["learning_rate"] == 1e-3 and made.training["save_steps"] == 9.0


def test_neighbours_spellings_are_said_once_each(tmp_path: Path) -> None:
    yaml = "lora_r: 4\nlora_alpha: 8\ncutoff_len: 99\nmicro_batch_size: 2\n"
    made, said = settings(tmp_path, yaml, ("num_epochs=2",), "--lora_dropout 0.1")
    assert made.method_options == {"r": 4, "alpha": 8.0, "dropout": 0.1} and made.max_length == 99
    assert made.training["per_device_train_batch_size"] == 2 and made.training["num_train_epochs"] == 2.0
    assert len(said) == len(set(said)) == 6 and "lora_r is called r here" in said


def test_values_of_neighbours_are_translated(tmp_path: Path) -> None:
    assert settings(tmp_path, "init_lora_weights: true\n")[0].method_options == {"init": "default"}
    assert settings(tmp_path, sets=("init_lora_weights=pissa",))[0].method_options == {"init": "pissa"}
    made, said = settings(tmp_path, "method: LoRA_Plus\n", ("loraplus_lr_ratio=16",))
    assert made.method == "lora-plus" and made.method_options == {"ratio": 16.0}
    assert said == ["loraplus_lr_ratio is called ratio here"]
    assert settings(tmp_path, extra="--use_rslora")[0].method_options == {"rslora": True}


def test_the_method_inside_has_types_and_spellings_too(tmp_path: Path) -> None:
    made, said = settings(
        tmp_path, "method: dora\n", ("inner.method=LoRA", "inner.lora_r='8'", "inner.init_lora_weights=true")
    )
    assert made.method_options == {"inner": {"method": "lora", "r": 8, "init": "default"}}
    assert said == ["lora_r is called r here", "init_lora_weights is called init here"]
    made, _ = settings(tmp_path, "method: lora-plus\ninner: {method: lora-drop, keep: [a, b], r: '4'}\n")
    inner = build(made.method, made.method_options).inner
    assert inner == LoRADrop(LoRA(r=4), keep=("a", "b"))
    made, _ = settings(
        tmp_path, "method: lora-plus\ninner: {method: dora, inner: {method: adalora, init_r: '9', lora_alpha: '4'}}\n"
    )
    assert build(made.method, made.method_options) == LoRAPlus(inner=DoRA(AdaLoRA(init_r=9, alpha=4.0)))


@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        (
            "lora-plus",
            {"inner": {"method": "dora", "inner": "adalora", "init_r": 6, "target_r": 4}},
            LoRAPlus(inner=DoRA(AdaLoRA(init_r=6, target_r=4))),
        ),
        ("DoRA", {"inner": {"method": "LoRA", "r": 8}, "alpha": 4.0}, DoRA(LoRA(r=8, alpha=4.0))),
        ("lora_drop", {"keep": ["a"]}, LoRADrop(keep=("a",))),
    ],
    ids=str,
)
def test_methods_inside_of_methods(name: str, options: dict[str, Any], method: Any) -> None:
    assert build(name, options) == method


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": {"method": "lora", "r": 8}, "r": 4}, ["given twice", "r=4 and inner.r=8"]),
        ({"inner": {"r": 4}}, ["method is missing", "inner: {method: lora, ...}"]),
        ({"inner": {"method": "lora", "init_r": 4}}, ["lora has no such setting", "dora: inner", "'init_r'"]),
        ({"inner": {"method": "vera", "dinit": 4}}, ["vera has no such setting", "d_init"]),
        ({"inner": {"method": "adalor"}}, ["unknown method", "write adalora"]),
    ],
    ids=str,
)
def test_what_the_method_inside_does_not_take(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build("dora", options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("name", ["warmup", "final"])
@pytest.mark.parametrize("text", ["1.0", "10.0", "1e1", "true", "false"])
def test_text_is_steps_only_if_it_is_a_whole_number(tmp_path: Path, name: str, text: str) -> None:
    for sets in (("method=adalora", f"{name}={text}"), ("method=dora", "inner.method=adalora", f"inner.{name}={text}")):
        with pytest.raises(WrongUsageError, match=name):
            settings(tmp_path, sets=sets)
    with pytest.raises(WrongUsageError, match="start"):
        settings(tmp_path, sets=("method=delta-lora", f"start={text}"))
    with pytest.raises(WrongUsageError, match=name):
        settings(tmp_path, f"method: adalora\n{name}: {text}\n")


@pytest.mark.parametrize(("text", "value"), [("10", 10), ("0.25", 0.25), ("0", 0), (".1", 0.1)])
def test_steps_and_fractions(tmp_path: Path, text: str, value: float) -> None:
    made, _ = settings(tmp_path, sets=("method=adalora", f"warmup={text}"))
    assert made.method_options == {"warmup": value} and type(made.method_options["warmup"]) is type(value)


@pytest.mark.parametrize(
    ("given", "words", "never"),
    [
        ({"method": "adalora", "r": 4}, ["init_r and target_r"], ["lr"]),
        ({"method": "adalora", "lora_r": 4}, ["init_r and target_r"], ["lora_"]),
        ({"method": "dora", "inner": "adalora", "rank": 4}, ["init_r and target_r"], []),
        ({"method": "intrinsic", "r": 4}, ["write d:"], ["lr"]),
        ({"method": "vera", "lora_alpha": 4}, ["VeRA has no alpha"], ["lora_alpha"]),
        ({"method": "adalora", "use_rslora": True}, ["remove 'rslora'"], ["use_"]),
        ({"use_dora": True}, ["--method dora"], ["use_rslora"]),
        ({"use_galore": True}, ["remove 'use_galore'"], ["use_rslora", "use_c"]),
        ({"inner": "dora"}, ["--method dora", "lora-plus"], []),
        ({"method": "adalora", "tinit": 1}, ["write warmup"], []),
        ({"method": "adalora", "tfinal": 1}, ["write final"], []),
        ({"method": "adalora", "deltaT": 1}, ["write interval"], []),
        ({"method": "adalora", "orth_reg_weight": 1}, ["write orthogonality", "half"], []),
        ({"method": "adalora", "total_step": 1}, ["leave it out"], []),
        ({"tinit": 1}, ["remove 'tinit'"], ["warmup:"]),
        ({"loraplus_lr_ratio": 16}, ["--method lora-plus"], []),
        ({"method": "adalora", "lora_rnk": 4}, ["remove 'lora_rnk'"], ["lora_rank"]),
        ({"lora_alhpa": 4}, ["write 'lora_alpha'"], []),
        ({"method": "dora", "inner": {"method": "lora", "init_r": 4}}, ["inner: init_r", "one of adalora"], []),
        ({"method": "dora", "inner": {"method": "lora", "lora_r": 4, "r": 4}}, ["under two names", "inner"], []),
        ({"method": "lora-pluss"}, ["write lora-plus"], []),
        ({"method": "??"}, ["write lora"], []),
    ],
    ids=str,
)
def test_the_fix_of_an_unknown_setting_is_none_that_is_unknown_too(
    given: dict[str, Any], words: list[str], never: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve([("here", given)])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    suggested = f"{caught.value.fix} {caught.value.near}".replace(f"remove '{next(reversed(given))}'", "")
    assert not any(word in suggested for word in never), str(caught.value)


def test_advice_is_only_for_what_is_no_alias() -> None:
    assert not NEIGHBOURS.keys() & ALIASES.keys()
    fields = {field for kind in METHODS.values() for field in fields_of(kind)}
    assert {field for advice in NEIGHBOURS.values() for field, _ in advice if field} <= fields


def test_dotted_settings_add_to_the_files_mapping(tmp_path: Path) -> None:
    made, _ = settings(
        tmp_path,
        "rank_pattern: {k_proj: 2}\n",
        ("rank_pattern.q_proj=8", "rank_pattern.layers.0.v_proj=1", "lr_scheduler_kwargs.num_cycles=2"),
        lr_scheduler_type="cosine_with_restarts",
    )
    assert made.rank_pattern == {"k_proj": 2, "q_proj": 8, "layers.0.v_proj": 1}
    assert made.training["lr_scheduler_kwargs"] == {"num_cycles": 2}


def test_numbers_and_shares_of_held_out_records(tmp_path: Path) -> None:
    for text, value in (("200", 200), ("0.1", 0.1), ("0", 0)):
        made, _ = settings(tmp_path, eval_split=text)
        assert made.eval_split == value and type(made.eval_split) is type(value)


def test_files_have_pythons_patterns(tmp_path: Path) -> None:
    assert settings(tmp_path, "targets: [q_proj]\n")[0].targets == ["q_proj"]
    assert settings(tmp_path, "lora_target_modules: '.*q_proj'\n")[0].targets == ".*q_proj"
    assert settings(tmp_path, "targets: 're:.*q_proj'\n")[0].targets == ".*q_proj"


@pytest.mark.parametrize(
    ("yaml", "where", "words"),
    [
        ("r: 4\nlearnig_rate: 3\n", ":2: learnig_rate", ["unknown setting", "learning_rate"]),
        ("r: 4\n\nlora_r: 5\n", ":3", ["given twice", "in line 1"]),
        ("rank_pattern:\n  q: 4\n  q: 5\n", ":3", ["given twice"]),
        ("r: [3\nb: 4\n", ":2", ["not YAML"]),
        ("- a\n", ":1", ["no settings", "sequence"]),
        ("# nothing\n", "run.yaml", ["no settings"]),
        ("r: 4\nalpha: x\n", ":2: alpha", ["wrong type"]),
        ("r: 4\nmax_length: x\n", ":2: max_length", ["cannot have"]),
        ("method: lroa\n", ":1: method", ["unknown method", "lora"]),
        ("do_train: true\n", ":1: do_train", ["not yours"]),
    ],
)
def test_errors_of_a_file_name_its_line(tmp_path: Path, yaml: str, where: str, words: list[str]) -> None:
    with pytest.raises(WrongUsageError) as caught:
        settings(tmp_path, yaml)
    assert where in str(caught.value.error.where) and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    "sets",
    [("r",), ("=3",), ("rank_pattern.=3",), ("r=3", "r=4"), ("rank_pattern={q: 3}", "rank_pattern={v: 3}"), ("r.x=3",)],
)
def test_set_is_refused_where_it_is_not_clear(tmp_path: Path, sets: tuple[str, ...]) -> None:
    with pytest.raises(WrongUsageError, match=r"--set"):
        settings(tmp_path, "r: 4\n", sets)


def test_brackets_must_hold(tmp_path: Path) -> None:
    with pytest.raises(WrongUsageError, match="brackets"):
        settings(tmp_path, extra="--optim-args [a")


def test_training_arguments_that_do_not_go_together_are_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(WrongUsageError, match="lineer"):
        settings(tmp_path, lr_scheduler_type="lineer")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--learnig-rate", "3"], ["unknown setting", "learning_rate"]),
        (["train", "--r", "x"], ["--r", "integer"]),
        (["train", "--r", "0"], ["the rank is out of range"]),
        (["train", "--r", "4", "--lora_r", "3"], ["under two names"]),
        (["train", "--method", "lroa"], ["unknown method", "lora"]),
        (["train", "--task", "poetry"], ["causal-lm"]),
        (["train", "stray"], ["stray"]),
        (["train", "--data"], ["--data"]),
        (["train", "--config", "nope.yaml"], ["cannot be read"]),
        (["train", "--columns", "q"], ["KEY=VALUE"]),
        (["train", "--data_seed", "3"], ["not yours"]),
        (["trian"], ["trian", "train"]),
        (["eval"], ["neither an adapter nor --base"]),
        (["eval", "x", "--base"], ["an adapter and --base"]),
        (["eval", "x", "--dtype", "int8"], ["no such type"]),
        (["merge", "x"], ["--output-dir"]),
        (["chat", "x", "--temprature", "1"], ["--temperature"]),
    ],
    ids=lambda value: " ".join(value) if "train" in value else None,
)
def test_wrong_usage_is_status_two(lorafit: Callable[..., Any], arguments: list[str], words: list[str]) -> None:
    result = lorafit(*arguments)
    assert result.status == 2
    assert result.err.startswith("error: ") or "\nerror: " in result.err
    assert all(word in result.err for word in words), result.err
    assert "Traceback" not in result.err and "fix:" in result.err


def test_debug_shows_the_traceback(lorafit: Callable[..., Any]) -> None:
    for arguments in (["train", "--learnig-rate", "3", "--debug"], ["--debug", "eval"]):
        result = lorafit(*arguments)
        assert result.status == 2 and "Traceback" in result.err and "ConfigError" in result.err
