"""Merge, split, cut down or stage shards. Video bytes pass through untouched.

    arvideo reshard A B --output MERGED
    arvideo reshard SHARDS --output FOLDER --split_share 0.9 train val
    arvideo reshard SHARDS --output FOLDER --split_share 0.9 train val --group_by actor
    arvideo reshard SHARDS --output SOME --labels archery bowling
    arvideo reshard SHARDS --output SOME --keys keys.txt
    arvideo reshard SHARDS --output FEW --max_samples 1000
    arvideo reshard SHARDS --output /local/disk/SHARDS --stage

Labels of several sources are united by name; the first source's keep their numbers. The same
sources and settings give the same bytes. An interrupted command resumes.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from arvideo_ds.arguments import CommandParser, require_positive
from arvideo_ds.cli import describe_shards
from arvideo_ds.errors import UserError, command
from arvideo_ds.shards import reshard
from arvideo_ds.shards.staging import stage

_SAMPLES_PER_SHARD, _SEED = 500, 0
_SHOWN = 5


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="shard folders")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_number("samples_per_shard", _SAMPLES_PER_SHARD, "videos")
    parser.add_number("seed", _SEED, "order and choice of the samples")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--split_share",
        nargs=3,
        metavar=("SHARE", "NAME_A", "NAME_B"),
        help="two folders below --output: that share of each label, and the remainder",
    )
    parser.add_argument(
        "--group_by",
        metavar="FACT|REGEX",
        help="--split_share: keep samples together that share the FACT of their JSON, or the text "
        "of the one group of REGEX, searched in source path, then key",
    )
    what.add_argument("--labels", nargs="+", metavar="LABEL", help="only these, numbered anew")
    what.add_argument("--keys", type=Path, metavar="FILE", help="only these samples, one a line")
    what.add_argument("--max_samples", type=int, help="so many, chosen at random")
    what.add_argument("--stage", action="store_true", help="copy one folder unchanged")
    parser.add_number("workers", 4, "--stage: files at a time")
    return parser.parse_args()


@command
def main() -> None:
    args = parse_arguments()
    require_positive(args, "samples_per_shard", "max_samples", "workers")
    if args.stage:
        copy_folder(args)
    else:
        write_parts(args)


def copy_folder(args: argparse.Namespace) -> None:
    if len(args.sources) > 1:
        raise UserError("--stage copies one folder; merge several first.")
    if (args.samples_per_shard, args.seed) != (_SAMPLES_PER_SHARD, _SEED):
        raise UserError("--stage copies shards unchanged: no --samples_per_shard, no --seed.")
    done = stage(args.sources[0], args.output, args.workers)
    print(
        f"{args.output}: {done.num_copied} files copied ({done.bytes_copied / 2**20:,.1f} MiB), "
        f"{done.num_kept} were up to date"
    )


def write_parts(args: argparse.Namespace) -> None:
    how, choose = choice(args)
    if args.group_by and not args.split_share:
        raise UserError("--group_by is for --split_share, which is not given.")
    pool = reshard.open_pool(args.sources, args.seed, group_by=args.group_by)
    parts = choose(pool)
    equal = (
        reshard.equal_on_both_sides(parts) if args.split_share else reshard.equal_videos(pool.items)
    )
    for note in (*reshard.notes(pool.sources), *equal):
        print(f"note: {note}", flush=True)
    for part in parts:
        manifest = reshard.write_part(pool, part, how=how, samples_per_shard=args.samples_per_shard)
        print(f"{part.folder}: {describe_shards(manifest)}{groups_in_words(part)}")


def groups_in_words(part: reshard.Part) -> str:
    """Number and names of the groups, so that a wrong pattern shows; nothing without groups."""
    names = part.groups
    if not names:
        return ""
    more = ", ..." * (len(names) > _SHOWN)
    return f", in {len(names):,} groups ({', '.join(names[:_SHOWN])}{more})"


def choice(args: argparse.Namespace) -> tuple[str, Callable[[reshard.Pool], list[reshard.Part]]]:
    """The requested parts: a description for the manifest, and a function of the samples.

    Errors: `UserError` for a mistake that needs no source to be seen.
    """
    output = args.output
    if args.split_share:
        share, names = split_share(*args.split_share)
        how = f"{float(share):g} as {names[0]}, the rest as {names[1]}"
        how += f", by group {args.group_by}" if args.group_by else ""
        return how, lambda pool: reshard.split(pool, share, output, names)
    if args.labels:
        how = f"{len(set(args.labels))} labels"
        return how, lambda pool: [reshard.with_labels(pool, args.labels, output)]
    if args.keys:
        keys = read_keys(args.keys)
        return f"{len(keys)} keys", lambda pool: [reshard.with_keys(pool, keys, output)]
    if args.max_samples:
        how = f"at most {args.max_samples} samples"
        return how, lambda pool: [reshard.first_samples(pool, args.max_samples, output)]
    return "all", lambda pool: [reshard.merged(pool, output)]


def split_share(text: str, *names: str) -> tuple[Fraction, tuple[str, str]]:
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 0 < share < 1:
        raise UserError(f"--split_share {text} must be a share between 0 and 1, such as 0.9.")
    for name in names:
        # They name folders, and tars in them.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise UserError(f"--split_share: '{name}' must be letters, digits, '_', '-' and '.'.")
    first, second = names
    if first == second:
        raise UserError(f"--split_share: '{first}' cannot name both parts.")
    return share, (first, second)


def read_keys(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --keys {path}: {error}.") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise UserError(f"--keys {path} names no key.")
    return keys
