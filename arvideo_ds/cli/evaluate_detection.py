"""Frame mAP of a detector that `arvideo detect` trained, by AVA's official rules, and a picture.

    arvideo evaluate_detection runs/detect_vit_b_ava
    arvideo evaluate_detection RUN --csv found.csv evaluation.shards=VAL \\
        evaluation.annotations=ava_val_v2.2.csv evaluation.detections=VAL_PERSONS.csv

Writes RUN/detection.json (both mAPs, average precision of each action, skipped keyframes) and
RUN/detections.png; --csv writes rows for the official script get_ava_performance.py.
"""

from __future__ import annotations

from pathlib import Path

from arvideo_ds.arguments import CommandParser, add_overrides
from arvideo_ds.config import DetectRecipe, load_recipe
from arvideo_ds.errors import UserError, command
from arvideo_ds.files.atomic import write_json
from arvideo_ds.runs import run_folder

REPORT, PICTURE = "detection.json", "detections.png"


@command
def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of `arvideo detect`")
    parser.add_argument("--weights", type=Path, help="a file; default: the run's best, else last")
    parser.add_argument("--csv", type=Path, help="file of all detections, official format")
    parser.add_number("pictures", 6, "keyframes in the picture")
    add_overrides(parser)
    args = parser.parse_intermixed_args()
    run_folder.read_recipe(args.run, DetectRecipe)
    recipe = load_recipe(str(args.run / run_folder.RECIPE), args.overrides, DetectRecipe)
    if recipe.evaluation.shards is None:
        raise UserError("evaluation.shards is missing: give the shards of the test keyframes.")
    weights = args.weights or args.run / run_folder.WEIGHTS[run_folder.choose_weights(args.run)]
    from arvideo_ds.evaluation.detection import as_json, evaluate_run, write_official_csv
    from arvideo_ds.evaluation.detection_pictures import draw_detections, pick_keyframes

    judge, found, report = evaluate_run(recipe, weights)
    facts = {"weights": str(weights), **as_json(judge, report)}
    write_json(args.run / REPORT, facts)
    pictured = pick_keyframes(judge, found, args.pictures)
    draw_detections(pictured, judge.actions).savefig(args.run / PICTURE, dpi=110)
    if args.csv is not None:
        write_official_csv(args.csv, found, judge.actions)
    for note in report.notes():
        print(f"note: {note}")
    capped, uncapped = (f"{100 * mean:.2f} %" for mean in report.means().values())
    print(
        f"frame mAP {capped} with the 50 best rows of a keyframe (ActivityNet), {uncapped} with "
        f"all; {report.classes} actions with ground truth, boxes: {facts['boxes_of']}"
    )
    print(f"written: {args.run / REPORT}, {PICTURE}")
