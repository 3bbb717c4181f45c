"""What the library costs: step times, memory, files and whole runs, beside PEFT's and TRL's.

`python -m benchmarks --help` lists the commands. Each stores its raw measurements as JSON under `benchmarks/results`;
`report` turns those files into `docs/results/speed.md` and its pictures; `real`, `serving` and `vision-page` write the
other pages of results. Nothing in `src` imports this package.
"""
