"""Fine-tune an encoder on labelled videos, from pretrained weights or from scratch.

    deepspeed --module arvideo_ds finetune --deepspeed_config zero1 \\
        --recipe finetune_vit_b_k400 --init-from runs/pretrain_vit_b_k400 \\
        data.shards=/data/k400-train evaluation.shards=/data/k400-val
    arvideo finetune --recipe finetune_own --init-from RUN \\
        data.shards=MINE/train evaluation.shards=MINE/test            your own labels

Other launchers: arvideo pretrain --help. The same command resumes an interrupted run.
Then: arvideo evaluate RUN.
"""

from __future__ import annotations

from arvideo_ds.errors import command
from arvideo_ds.train.command_line import train_on_encoder


@command
def main() -> int:
    return train_on_encoder(__doc__, "finetune")
