"""`python -m tests.peers`: train nanoGPT, from a clone of it, on lfs's tokens and by lfs's clock, to compare the two.

    git clone https://github.com/karpathy/nanoGPT
    python -m tests.peers steps gpt2_small.json --nanogpt nanoGPT --batch 32
    lfs train speedrun.json
    python -m tests.peers race speedrun.json --nanogpt nanoGPT --minutes 10
    lfs report RUN RUN --plot race.svg

`steps` times training steps of both in turn, in one process; its `peak_bytes` are those of a step beside weights and
optimizer, with all that a CUDA graph works in. `race` trains nanoGPT alone for so many minutes and leaves a run folder,
which `lfs report` compares with others; it needs no more of the config than the text, the tokenizer, the tokens of a
batch, the seed, and how it is evaluated.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run what ``arguments`` ask for and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {"steps": "tokens a second of both, in turn", "race": "nanoGPT's loss over time"}.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="config of the run to compare with, such as speedrun.json")
        command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a setting of it")
        command.add_argument("--nanogpt", type=Path, required=True, help="folder of the clone")
        command.add_argument("--layers", type=int, default=12)
        command.add_argument("--heads", type=int, default=12)
        command.add_argument("--width", type=int, default=768)
    commands.choices["steps"].add_argument("--batch", type=int, default=32, help="sequences in a step")
    commands.choices["steps"].add_argument("--seconds", type=float, default=20.0, help="time for both together")
    commands.choices["race"].add_argument("--minutes", type=float, default=10.0)
    commands.choices["race"].add_argument("--lr", type=float, default=6e-4)
    commands.choices["race"].add_argument("--out", type=Path, help="folder that receives the run's folder")
    options = parser.parse_args(arguments)

    from lfs_cli.config import TrainConfig, load_config
    from tests.peers import nanogpt

    config = load_config(TrainConfig, options.config, options.set)
    shape = nanogpt.Shape(
        config.model.vocab_size, config.model.context_length, options.layers, options.heads, options.width
    )
    if options.command == "steps":
        rows = nanogpt.time_steps(config, options.nanogpt, shape, batch=options.batch, seconds=options.seconds)
        for line in (rows[0], *(row.values() for row in rows)):
            print(*line, sep="\t")
    else:
        print(nanogpt.race(config, options.nanogpt, shape, minutes=options.minutes, lr=options.lr, out=options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
