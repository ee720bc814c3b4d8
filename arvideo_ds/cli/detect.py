"""Train a detector of actions (AVA) on an encoder: which of 80 actions happen in each box.

    deepspeed --module arvideo_ds detect --deepspeed_config zero1 \\
        --recipe detect_vit_b_ava --init-from runs/pretrain_vit_b_k400 \\
        data.shards=/data/ava-train detect.annotations=ava_train_v2.2.csv \\
        evaluation.shards=/data/ava-val evaluation.annotations=ava_val_v2.2.csv

Other launchers: arvideo pretrain --help. The same command resumes an interrupted run.
Then: arvideo evaluate_detection RUN. docs/detection.md describes the files of boxes.
"""

from __future__ import annotations

from arvideo_ds.errors import command
from arvideo_ds.train.command_line import train_on_encoder


@command
def main() -> int:
    return train_on_encoder(__doc__, "detect")
