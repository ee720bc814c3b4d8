"""Export a finished run for other programs, with a model card and a measured comparison.

    arvideo export runs/my_run --format huggingface --output exports/my_model
    arvideo export runs/my_run --format onnx --output exports/my_onnx --shards SHARDS

    arvideo export --model vit_b_k400.pth --labels k400.txt --format encoder --output exports/vit_b

Formats: encoder (safetensors, ours), huggingface (transformers' VideoMAE), onnx, timm (names).
Public models: a folder of transformers' VideoMAEForVideoClassification, or a fine-tuned .pth of
VideoMAE or VideoMAE V2. The export is loaded again and compared with the model before the folder
appears.
"""

from __future__ import annotations

import json
from pathlib import Path

from arvideo_ds.arguments import (
    CommandParser,
    add_public,
    add_run_or_model,
    add_weights,
    required_model,
)
from arvideo_ds.cli import log
from arvideo_ds.errors import command
from arvideo_ds.exports import FORMATS, UNSPECIFIED
from arvideo_ds.runs import run_folder
from arvideo_ds.shards.manifest import ShardSet


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    add_run_or_model(parser, "folder of a finished run, or a public classifier")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see above")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    add_weights(parser, run_folder.WEIGHTS)
    parser.add_argument("--shards", help="real clips to compare on; default: seeded random pixels")
    text = "of the weights, for the model card, such as cc-by-nc-4.0; default %(default)s"
    parser.add_argument("--license", default=UNSPECIFIED, metavar="ID", help=text)
    add_public(parser)
    args = parser.parse_args()
    path = required_model(args)
    from arvideo_ds.evaluation.public import PublicOptions
    from arvideo_ds.exports.export import clips_of, export, random_clips
    from arvideo_ds.exports.source import open_model

    public = PublicOptions(args.labels, args.override)
    source = open_model(path, weights=args.weights, public=public)
    if source.public is not None:
        log(str(source.public))
    recipe = source.recipe
    clips = clips_of(ShardSet(args.shards), recipe) if args.shards else random_clips(recipe)
    parity = export(source, args.format, args.output, clips, license_id=args.license)
    print(json.dumps(parity, indent=1))
    log(f"written: {args.output}; how to open it: {args.output / 'README.md'}")
