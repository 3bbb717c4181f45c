r"""Make labelled sentiment data out of the ratings that came with VADER, for measurements on real data.

    python scripts/make_sentiment.py data/sentiment --records 2000

Fetches the source package of vaderSentiment 0.5 (MIT) with pip, and writes `movie.jsonl`, `amazon.jsonl`, `nyt.jsonl`
and `tweets.jsonl`: sentences, each rated by at least 20 people from -4 to 4 (Hutto and Gilbert 2014, VADER: a
parsimonious rule-based model for sentiment analysis of social media text, ICWSM). With `--form classes`

    {"text": "Effective but too tepid biopic", "label": "negative", "id": "movie/3", "review": "movie/3"}

with `--form answers` the same as a question that a language model answers:

    {"prompt": "Is this positive or negative?\n\nEffective but too tepid biopic", "completion": "negative", ...}

and with `--form ratings` the mean of its ratings itself, for a regression; then all sentences are kept, whatever their
rating:

    {"text": "Effective but too tepid biopic", "label": -1.25, "id": "movie/3", "review": "movie/3"}

A rating of less than `--clear` either way is nobody's clear opinion, and left out; so is a text that occurs twice.
`review` names the review that a sentence is from, so that a split can keep reviews whole (`--group review`); the movie
sentences carry none. The sentences quote third parties: they are fetched, never shipped. The same command writes the
same bytes.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "vaderSentiment==0.5"
ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
SETS = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
QUESTION = "Is this positive or negative?\n\n"


@dataclass(frozen=True)
class Rated:
    """One sentence, where it is from, and the mean of its ratings."""

    id: str
    review: str
    rating: float
    text: str


def fetch(folder: Path) -> tarfile.TarFile:
    """The ratings, out of the source package: pip fetches it, nothing of it is installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", PACKAGE]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    (package,) = folder.glob("*.zip")
    with zipfile.ZipFile(package) as opened:
        name = next(one for one in opened.namelist() if one.endswith(ARCHIVE))
        return tarfile.open(fileobj=io.BytesIO(opened.read(name)))


def rated(archive: tarfile.TarFile, name: str) -> Iterator[Rated]:
    """The sentences of one set, in the order of the file."""
    member = next(one for one in archive.getmembers() if one.name.endswith(f"{SETS[name]}_GroundTruth.txt"))
    opened = archive.extractfile(member)
    assert opened is not None
    for line in opened.read().decode("utf-8").splitlines():
        key, rating, text = line.split("\t", 2)
        review = key.rpartition("_")[0] or key
        yield Rated(f"{name}/{key}", f"{name}/{review}", float(rating), " ".join(html.unescape(text).split()))


def chosen(sentences: list[Rated], clear: float, seed: int) -> list[Rated]:
    """Those whose rating is at least `clear` either way, without texts that occur twice, shuffled."""
    often = Counter(one.text for one in sentences)
    kept = [one for one in sentences if abs(one.rating) >= clear and often[one.text] == 1 and one.text]
    random.Random(seed).shuffle(kept)
    return kept


def record(one: Rated, form: str) -> dict[str, str | float]:
    """A sentence as a record of the form."""
    label = "positive" if one.rating > 0 else "negative"
    place = {"id": one.id, "review": one.review}
    if form == "answers":
        return {"prompt": QUESTION + one.text, "completion": label, **place}
    return {"text": one.text, "label": one.rating if form == "ratings" else label, **place}


def write(path: Path, sentences: list[Rated], form: str) -> None:
    """A file of records, and a word on what is in it."""
    lines = [json.dumps(record(one, form), ensure_ascii=False) for one in sentences]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(sentences):,} sentences, {sum(one.rating > 0 for one in sentences):,} positive")


def main() -> None:
    """Writes the files, and says what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--records", type=int, default=0, help="of each set at most; 0 is all of them")
    parser.add_argument("--test", type=int, default=0, help="so many more of each set, in a file of their own")
    parser.add_argument("--form", choices=("classes", "answers", "ratings"), default="classes")
    parser.add_argument("--clear", type=float, help="the least rating either way; 0.5, and of ratings 0")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    options = parser.parse_args()
    clear = (0.0 if options.form == "ratings" else 0.5) if options.clear is None else options.clear
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        archive = fetch(Path(folder))
    for name in SETS:
        kept = chosen(list(rated(archive, name)), clear, options.seed)
        test, train = kept[: options.test], kept[options.test :]
        write(options.folder / f"{name}.jsonl", train[: options.records or None], options.form)
        if test:
            write(options.folder / f"{name}-test.jsonl", test, options.form)


if __name__ == "__main__":
    main()
