"""Train the adaptive tokenizer of long video: a code for every token, and which tokens matter.

    arvideo tokenizer                                                                       (demo)
    deepspeed --module arvideo_ds tokenizer --deepspeed_config zero1 \\
        --recipe tokenizer_b_k600 data.shards=/data/k600-train evaluation.shards=/data/k600-val

Other launchers: arvideo pretrain --help. The same command resumes an interrupted run.
Then: arvideo evaluate_tokenizer RUN, and arvideo score_tokens for long videos.
"""

from __future__ import annotations

from arvideo_ds.config import TokenizerRecipe
from arvideo_ds.errors import command
from arvideo_ds.train.command_line import train, training_parser


@command
def main() -> int:
    parser = training_parser(__doc__, "tokenizer", "zero1")
    args = parser.parse_intermixed_args()
    return train(args, TokenizerRecipe, recipe=args.recipe or "tokenizer_demo")
