"""The options that several commands share. Every option may be spelled with dashes or with underscores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DATA = "Data"
MODEL = "Model"
METHOD = "Method"
TRAINING = "Training"
RUN = "Run"
ANSWERS = "Answers"


def _debug(context: typer.Context, value: bool) -> bool:
    if value:
        context.obj.debug = True
    return value


Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_debug, rich_help_panel=RUN)
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object to stdout; all text for people goes to stderr.", rich_help_panel=RUN
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR|NAME",
        help="A model directory or a hub name. Default: the embedded SmolLM2-135M-Instruct.",
        rich_help_panel=MODEL,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="DIR|NAME",
        help="The base model. Default: the one that the adapter's files name.",
        rich_help_panel=MODEL,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="TYPE",
        help="Of the base model: float32, bfloat16, float16, or auto (bfloat16 where the hardware has it).",
        rich_help_panel=MODEL,
    ),
]
Quantise = Annotated[
    str | None,
    typer.Option(
        "--quantise",
        metavar="BITS",
        help="Keep the base's linear layers as int8 (nothing else is needed) or nf4 (bitsandbytes). Default: none.",
        rich_help_panel=MODEL,
    ),
]
RunQuantise = Annotated[
    str | None,
    typer.Option(
        "--quantise",
        metavar="BITS",
        help="Keep the base's linear layers as int8, nf4 or none (plain). Default: as in the adapter's run.",
        rich_help_panel=MODEL,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="PATH|NAME",
        help="A file (jsonl, json, csv, tsv, parquet, txt, md), a directory of such files, or a hub name. "
        "Default: embedded questions on Python's standard library.",
        rich_help_panel=DATA,
    ),
]
DataSplit = Annotated[
    str | None,
    typer.Option("--data-split", metavar="NAME", help="Split of a hub data set: train, test.", rich_help_panel=DATA),
]
EvalData = Annotated[
    str | None,
    typer.Option("--eval-data", metavar="PATH|NAME", help="Held-out data.", rich_help_panel=DATA),
]
EvalSplit = Annotated[
    str | None,
    typer.Option(
        "--eval-split",
        metavar="SHARE|NUMBER",
        help="Instead: hold out a share or a number (200) of the records; 0 for none. Default: 0.1.",
        rich_help_panel=DATA,
    ),
]
EvalLimit = Annotated[
    int | None,
    typer.Option("--eval-limit", help="Evaluate on so many held-out records at most.", rich_help_panel=DATA),
]
Slice = Annotated[
    str | None,
    typer.Option(
        "--slice",
        metavar="COLUMN",
        help="Show the held-out loss for each value of a column. Default: one named domain, source, category, …",
        rich_help_panel=DATA,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="PATH|NAME",
        help="Data of another domain: measured before and after, never learnt from. (--source is --data.)",
        rich_help_panel=DATA,
    ),
]
General = Annotated[
    str | None,
    typer.Option(
        "--general",
        metavar="PATH|none",
        help="A general text, to measure what is forgotten. Default: an embedded one.",
        rich_help_panel=DATA,
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        metavar="ROLE=COLUMN",
        help="Where columns go by other names: --columns prompt=q --columns completion=a.",
        rich_help_panel=DATA,
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="causal-lm, classification, regression, or auto (what the records are).",
        rich_help_panel=DATA,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", help="Tokens of the longest sequence; longer ones are cut.", rich_help_panel=DATA),
]
MethodName = Annotated[
    str | None, typer.Option("--method", help="One of `lorafit methods`. Default: lora.", rich_help_panel=METHOD)
]
R = Annotated[int | None, typer.Option("--r", help="Rank. Default: the method's, 16.", rich_help_panel=METHOD)]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="The update is scaled by alpha / r. Default: 2r.", rich_help_panel=METHOD),
]
Dropout = Annotated[
    float | None, typer.Option("--dropout", help="On the adapter's input, in training.", rich_help_panel=METHOD)
]
BatchSize = Annotated[
    int | None,
    typer.Option("--per-device-train-batch-size", help="Records in a batch. Default: 8.", rich_help_panel=TRAINING),
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", help="Optimizer steps; wins over epochs.", rich_help_panel=TRAINING)
]
Shard = Annotated[
    bool | None,
    typer.Option(
        "--shard/--no-shard",
        help="Under a launcher: each process keeps a part of the model (FSDP2). Default: each keeps all of it (DDP).",
        rich_help_panel=RUN,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings from a YAML file; flags win.", rich_help_panel=RUN),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting by name, above the file and below the flags: --set rank_pattern.q_proj=8.",
        rich_help_panel=RUN,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Of the split, the initial values and the order of the data.", rich_help_panel=RUN),
]
OutputDir = Annotated[
    str | None,
    typer.Option(
        "--output-dir",
        metavar="DIR",
        help="Where the run lives. The same command goes on there after an interruption.",
        rich_help_panel=RUN,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", help="So many held-out questions are answered and shown.", rich_help_panel=ANSWERS),
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Length of the longest answer.", rich_help_panel=ANSWERS)
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        metavar="A,B,...",
        help="Names of a classifier's classes in the order of its head, where the adapter's folder does not tell.",
        rich_help_panel=MODEL,
    ),
]
