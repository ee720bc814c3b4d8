#!/usr/bin/env python3
"""Train a detector of actions (AVA) on an encoder: which of 80 actions happen in each box.

    deepspeed scripts/detect.py --deepspeed_config ds_configs/zero1.json \\
        --recipe detect_vit_b_ava --init-from runs/pretrain_vit_b_k400 \\
        data.shards=/data/ava-train detect.annotations=ava_train_v2.2.csv \\
        evaluation.shards=/data/ava-val evaluation.annotations=ava_val_v2.2.csv
    torchrun, srun and plain python start it too, as scripts/pretrain.py.

The same command goes on where an interrupted run stopped. After it: scripts/evaluate_detection.py.
docs/detection.md has the files of boxes. Exit codes: 0 finished; 2 wrong input; 75 interrupted and
saved, start it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arvideo_ds.config import DetectRecipe
from arvideo_ds.errors import command
from arvideo_ds.train.command_line import train_on_encoder

DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


@command
def main() -> int:
    return train_on_encoder(__doc__, "detect", DEFAULT_JSON, DetectRecipe)


if __name__ == "__main__":
    sys.exit(main())
