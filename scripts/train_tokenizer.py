#!/usr/bin/env python3
"""Train the adaptive tokenizer of long video: a code for every token, and which tokens matter.

    python scripts/train_tokenizer.py                                                       (demo)
    deepspeed scripts/train_tokenizer.py --deepspeed_config ds_configs/zero1.json \\
        --recipe tokenizer_b_k600 data.shards=/data/k600-train evaluation.shards=/data/k600-val
    torchrun, srun and plain python start it too, as scripts/pretrain.py.

The same command goes on where an interrupted run stopped. After it: scripts/evaluate_tokenizer.py
RUN, and the scores of long videos from it. Exit codes: 0 finished; 2 wrong input; 75 interrupted
and saved, start it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.errors import command
from arvideo_ds.train.command_line import train, training_parser
from arvideo_ds.train.settle import Options

DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


@command
def main() -> int:
    args = training_parser(__doc__, "tokenizer", DEFAULT_JSON).parse_intermixed_args()
    options = Options(
        recipe=args.recipe or "tokenizer_demo",
        deepspeed_config=args.deepspeed_config,
        overrides=args.overrides,
        output=args.output,
    )
    return train(args, options, TokenizerRecipe)


if __name__ == "__main__":
    sys.exit(main())
