"""The whole way of a language model: train, eval, chat, merge, check, demo."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorafit as lf


def test_train_says_what_it_resolved_and_what_it_came_to(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    assert result.status == 0 and not result.err, result.err
    said = result.out.splitlines()
    assert "lora_r is called r here" in said
    assert any("lora (r 4, alpha 8, scale 2" in line and "14 Linear" in line for line in said)
    assert any(line.startswith("10 steps of 8 records, learning rate 0.01") for line in said)
    assert any(line.startswith("question:  what is") for line in said) and "reference: it is" in result.out
    assert any("10 steps in" in line and "tokens/s" in line and "peak memory" in line for line in said)
    assert f"adapter: {Path('trained/adapter')}" in said and f"try it:  lorafit chat {Path('trained/adapter')}" in said
    assert f"report:  {Path('trained/report.html')}" in said
    assert said[-1].startswith("held-out loss 5.") and "better by" in said[-1] and "nats per token" in said[-1]
    assert (folder / "report.html").stat().st_size > 100_000
    assert lf.__version__ in (folder / "records.jsonl").read_text()
    first = json.loads((folder / "records.jsonl").read_text().splitlines()[0])
    assert first["command"].startswith("lorafit train --model ")


def test_the_same_command_again_shows_the_finished_run(
    lorafit: Callable[..., Any], trained: tuple[Path, Any], command: list[str]
) -> None:
    result = lorafit(*command, "--output-dir", trained[0], "--json")
    value = result.json
    assert result.status == 0 and "finished already" in result.err
    assert value["status"] == "already done" and value["steps"] == 10 and len(value["samples"]) == 2
    assert value["eval_loss_after"] < value["eval_loss_before"] and Path(value["report"]).name == "report.html"


def test_a_config_file_gives_the_same_run_as_flags(
    lorafit: Callable[..., Any], llama: Path, sums: Path, tmp_path: Path, trained: tuple[Path, Any]
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"base_model: {llama}\ndataset: {sums}\neval_split: 8\nmax_steps: 10\nlora_r: 4\nlr: 1e-2\nsamples: 0\n"
        "save_steps: 5\noutput_dir: out\n"
    )
    result = lorafit("train", "--config", "run.yaml", "--json")
    assert result.status == 0, result.err
    for note in ("base_model is called model here", "dataset is called data here", "lr is called learning_rate here"):
        assert result.err.splitlines().count(note) == 1
    from safetensors.torch import load_file

    by_flags = load_file(trained[0] / "adapter" / "adapter_model.safetensors")
    by_file = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert by_flags.keys() == by_file.keys() and all(torch.equal(by_flags[key], by_file[key]) for key in by_file)


def test_every_training_argument_is_taken_by_its_own_name(
    lorafit: Callable[..., Any], command: list[str], tmp_path: Path
) -> None:
    words = "--max-steps 2 --no-bf16 --weight_decay 0.01 --lr-scheduler-type cosine --warmup-steps 1 --adam_beta2=0.95"
    result = lorafit(*command, "--output-dir", "out", *words.split(), "--lr_scheduler_kwargs", "{}")
    assert result.status == 0, result.err
    kept = json.loads((tmp_path / "out" / "settings.json").read_text())["training"]
    assert kept["bf16"] is False and kept["weight_decay"] == 0.01 and kept["adam_beta2"] == 0.95
    assert kept["max_steps"] == 2 and kept["lr_scheduler_kwargs"] == {}


def test_without_held_out_data_there_is_no_verdict(lorafit: Callable[..., Any], command: list[str]) -> None:
    result = lorafit(*command, "--output-dir", "out", "--eval-split", "0", "--max-steps", "1", "--samples", "0")
    assert result.status == 0 and result.out.splitlines()[-1] == "no held-out data, so no verdict"


def test_without_plotly_the_run_is_done_and_the_install_line_is_said(
    lorafit: Callable[..., Any], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.errors import MissingExtraError

    def missing(*_: Any) -> None:
        raise MissingExtraError("the report needs plotly", fix="pip install 'lorafit[report]'")

    monkeypatch.setattr("lorafit.report.write_report", missing)
    result = lorafit(*command, "--output-dir", "out", "--max-steps", "1", "--json")
    assert result.status == 0 and result.json["report"] is None
    assert "pip install 'lorafit[report]'" in result.err


def test_eval_repeats_the_runs_own_figures(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    folder, _ = trained
    told = json.loads((folder / "result.json").read_text())
    result = lorafit("eval", folder / "adapter", "--samples", "1", "--max-new-tokens", "4", "--json")
    value = result.json
    assert result.status == 0 and "on the held-out records of the run trained" in result.err
    base, adapter = value["scores"]["base"], value["scores"]["adapter"]
    assert base["loss"] == pytest.approx(told["eval_loss_before"], abs=1e-6)
    assert adapter["loss"] == pytest.approx(told["eval_loss_after"], abs=1e-6)
    assert base["accuracy"] is None and base["perplexity"] > adapter["perplexity"]
    assert value["adapter"] == str(folder / "adapter")
    assert value["samples"][0].keys() == {"prompt", "base", "adapter", "reference"}


def test_eval_on_other_data_and_of_the_base_alone(
    lorafit: Callable[..., Any], trained: tuple[Path, Any], llama: Path, sums: Path
) -> None:
    both = lorafit("eval", trained[0] / "adapter", "--data", sums, "--eval-limit", "20", "--json").json
    alone = lorafit("eval", "--base", "--model", llama, "--data", sums, "--eval-limit", "20", "--json").json
    assert alone["scores"]["base"] == both["scores"]["base"] and alone["scores"].keys() == {"base"}
    assert alone["adapter"] is None
    table = lorafit("eval", "--base", "--model", llama, "--data", sums).out.splitlines()
    assert table[-2].split() == ["loss", "perplexity", "tokens"] and table[-1].startswith("base ")


@pytest.mark.parametrize("limit", ["0", "-3"])
def test_eval_of_no_records_is_refused(lorafit: Callable[..., Any], llama: Path, sums: Path, limit: str) -> None:
    result = lorafit("eval", "--base", "--model", llama, "--data", sums, "--eval-limit", limit)
    assert result.status == 2 and "nothing to measure" in result.err and "--eval-limit 100" in result.err


def test_eval_of_records_without_a_learnt_token_is_refused(
    lorafit: Callable[..., Any], llama: Path, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.training.loss import Losses, SupervisedLoss

    nothing = Losses(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    monkeypatch.setattr(SupervisedLoss, "each", lambda *_: nothing)
    result = lorafit("eval", "--base", "--model", llama, "--data", sums)
    assert result.status == 1 and "nothing to measure" in result.err and "fix:" in result.err
    assert "nan" not in result.out


def test_eval_refuses_data_of_another_kind(lorafit: Callable[..., Any], trained: tuple[Path, Any], films: Path) -> None:
    result = lorafit("eval", trained[0] / "adapter", "--data", films)
    assert result.status == 1 and "not of the adapter's kind" in result.err


def test_chat_answers_once(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    adapter = trained[0] / "adapter"
    result = lorafit("chat", adapter, "--prompt", "what is 3 plus one?", "--max-new-tokens", "4")
    lines = result.out.splitlines()
    assert result.status == 0 and not result.err
    assert lines[0].startswith("base: ") and lines[1].startswith("adapter: ") and len(lines) == 2
    assert (
        lines[1]
        == lorafit("chat", adapter, "--prompt", "what is 3 plus one?", "--max-new-tokens", "4").out.splitlines()[1]
    )
    assert "(cut at 4 tokens)" in result.out


def test_chat_obeys_and_leaves_at_the_end_of_input(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    typed = "hello\n/base\nhow?\n/adapter\n/reset\n/nonsense\nso\n"
    result = lorafit("chat", trained[0] / "adapter", "--max-new-tokens", "3", "--temperature", "0.7", stdin=typed)
    assert result.status == 0 and not result.err
    assert result.out.count("base: ") == 2 and result.out.count("adapter: ") == 2
    assert "answering: base" in result.out and "forgotten" in result.out and result.out.count("/quit: leave") == 2


def test_chat_says_when_the_conversation_is_too_long(lorafit: Callable[..., Any], trained: tuple[Path, Any]) -> None:
    typed = f"{'one two three ' * 120}\nhi\n/quit\n"
    result = lorafit("chat", trained[0] / "adapter", "--max-new-tokens", "3", stdin=typed)
    assert result.status == 0
    assert "too long for the model" in result.out and "/reset" in result.out and "adapter: " in result.out


def test_chat_without_a_template_takes_every_question_alone(
    lorafit: Callable[..., Any], trained: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(trained[0] / "adapter", tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    result = lorafit("chat", "plain", "--max-new-tokens", "2", stdin="one?\ntwo?\n")
    assert result.status == 0 and "every question stands alone" in result.out
    assert result.out.count("adapter: ") == 2 and not result.err


def test_chat_remembers_each_side_apart(trained: tuple[Path, Any]) -> None:
    from lorafit.cli.adapters import describe, load
    from lorafit.cli.chat import Conversation

    loaded = load(describe(trained[0] / "adapter", None, None, lambda _: None), None)
    conversation = Conversation(loaded, "be brief", 0.0, 3, 0)
    for text in ("one?", "two?"):
        answers = {answer.name: answer.text for answer in conversation.ask(text, lambda: False)}
        assert answers.keys() == {"base", "adapter"}
    base, adapter = conversation.sides
    assert [turn.role for turn in base.turns] == ["user", "assistant"] * 2
    assert base.turns[0] == adapter.turns[0] and base.turns[-1] != adapter.turns[-1]
    assert list(conversation.ask("three?", lambda: True)) == []


def test_merge_writes_a_plain_model_that_agrees(
    lorafit: Callable[..., Any], trained: tuple[Path, Any], tmp_path: Path, llama: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = lorafit("merge", trained[0] / "adapter", "--output-dir", "out/merged", "--json")
    value = result.json
    assert result.status == 0 and value["difference"] <= value["tolerance"] < value["effect"]
    assert "max logit difference" in result.err.splitlines()[-1] and not value["untied"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert type(merged).__name__ == "LlamaForCausalLM" and type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is True
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "merged").chat_template is not None
    assert (tmp_path / "out" / "merged" / "generation_config.json").is_file()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]
    base = AutoModelForCausalLM.from_pretrained(llama)
    handle = lf.load(base, trained[0] / "adapter")
    ids = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)
    assert handle.merged is False


def test_merge_refuses_a_folder_in_use(lorafit: Callable[..., Any], trained: tuple[Path, Any], llama: Path) -> None:
    result = lorafit("merge", trained[0] / "adapter", "--output-dir", llama)
    assert result.status == 2 and "not empty" in result.err


def test_merge_unties_only_when_asked(lorafit: Callable[..., Any], command: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert lorafit(*command, "--output-dir", "run", "--targets", "embed_tokens,q_proj").status == 0
    refused = lorafit("merge", "run/adapter", "--output-dir", "merged")
    assert refused.status == 1 and "lm_head" in refused.err and "--untie" in refused.err
    assert not (tmp_path / "merged").exists()
    done = lorafit("merge", "run/adapter", "--output-dir", "merged", "--untie", "--json")
    assert done.status == 0 and done.json["untied"] is True
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def test_merge_leaves_nothing_behind_when_logits_disagree(
    lorafit: Callable[..., Any], trained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafit.handle import Handle

    monkeypatch.setattr(Handle, "merge_and_detach", lambda self, untie: self.detach())  # a merge that merges nothing
    result = lorafit("merge", trained[0] / "adapter", "--output-dir", "merged")
    assert result.status == 1 and "does not compute what base and adapter compute" in result.err
    assert list(tmp_path.iterdir()) == []


def test_check_renders_and_counts(lorafit: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what is {n % 9}?", "answer": f"it is {n}"} for n in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[4]) + "\n")
    arguments = ("check", "data.jsonl", "--model", llama, "--eval-data", "held.jsonl", "--samples", "1")
    result = lorafit(*arguments)
    assert result.status == 0 and not result.err
    assert "JSON Lines, 12 records in prompt/completion form (question → answer)" in result.out
    assert "[[it is 0<|im_end|>]]" in result.out and "<|im_start|>assistant\n[[" in result.out
    assert "repeated:   3 ask what an earlier record asks (data.jsonl:10" in result.out
    assert "leaks:      1 of the training questions" in result.out and "#####" in result.out
    assert result.out.splitlines()[-1] == "ok: 11 records to learn from"
    value = lorafit(*arguments, "--json").json
    assert value["ok"] is True and value["removed"] == 1 and value["repeated"] == 3
    assert sum(count for _, _, count in value["lengths"]) == 11
    assert "".join(piece["text"] for piece in value["samples"][0]["pieces"]).startswith("<|im_start|>user")


def test_check_takes_a_config_file_for_training(
    lorafit: Callable[..., Any], llama: Path, sums: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {llama}\ndata: {sums}\nlearning_rate: 1e-3\ncutoff_len: 99\n")
    result = lorafit("check", "--config", "run.yaml", "--samples", "0", "--set", "eval_split=30")
    assert result.status == 0 and "30 of 80 held out" in result.out and "cutoff_len is called max_length" in result.out


def test_demo_takes_the_next_free_folder_and_goes_on_with_an_interrupted_one(
    lorafit: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    demo = ("demo", "--max-steps", "2", "--set", f"model={llama}", "--set", "max_new_tokens=4", "--set", "eval_limit=6")
    first = lorafit(*demo)
    assert first.status == 0, first.err
    said = first.out.splitlines()
    assert said[-1] == f"report:  {Path('runs/demo/report.html')}" and said[-2].startswith("held-out loss ")
    assert first.out.count("reference: ") == 4
    second = lorafit(*demo, "--json")
    assert second.json["folder"] == str(Path("runs/demo-2")) and second.json["status"] == "done"
    for name in ("result.json", "adapter"):  # as if it had been stopped before its end
        path = tmp_path / "runs" / "demo" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    third = lorafit(*demo, "--json")
    assert third.json["folder"] == str(Path("runs/demo")) and "goes on from step 2" in third.err
    named = lorafit(*demo, "--json", "--output-dir", "mine", "--seed", "3")
    assert named.json["folder"] == "mine" and (tmp_path / "mine" / "adapter").is_dir()


def test_nothing_reaches_for_the_network(
    lorafit: Callable[..., Any], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert lorafit(*command, "--output-dir", "run", "--max-steps", "1").status == 0
    assert lorafit("eval", "run/adapter").status == 0
    assert lorafit("chat", "run/adapter", "--prompt", "x", "--max-new-tokens", "2").status == 0
    assert lorafit("merge", "run/adapter", "--output-dir", "merged").status == 0
    assert lorafit("check", command[4], "--model", command[2]).status == 0
    assert asked == []
