#!/usr/bin/env python3
"""Fine-tune an encoder on labelled videos, from pretrained weights or from scratch.

    deepspeed scripts/finetune.py --deepspeed_config ds_configs/zero1.json \\
        --recipe finetune_vit_b_k400 --init-from runs/pretrain_vit_b_k400 \\
        data.shards=/data/k400-train evaluation.shards=/data/k400-val
    deepspeed scripts/finetune.py --recipe finetune_own --init-from RUN \\
        data.shards=MINE/train evaluation.shards=MINE/test            your own labels
    torchrun, srun and plain python start it too, as scripts/pretrain.py.

The same command goes on where an interrupted run stopped. After it: scripts/evaluate.py RUN.
Exit codes: 0 finished; 2 wrong input; 75 interrupted and saved, start it again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from arvideo_ds.config import FinetuneRecipe
from arvideo_ds.errors import command
from arvideo_ds.train.command_line import train_on_encoder

DEFAULT_JSON = Path(__file__).parent.parent / "ds_configs" / "zero1.json"


@command
def main() -> int:
    return train_on_encoder(__doc__, "finetune", DEFAULT_JSON, FinetuneRecipe)


if __name__ == "__main__":
    sys.exit(main())
