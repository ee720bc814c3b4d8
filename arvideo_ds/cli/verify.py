"""Check that shards are whole, unaltered, consistent and decodable.

    arvideo verify SHARDS
    arvideo verify SHARDS --decode all --workers 16

SHARDS is a folder or a URL, whose files are fetched anew. Every shard is read and hashed, and a
share of its videos (at least one) is decoded. Every problem is printed with its file and, if one
sample is affected, its key.
Exit code 1: not sound.
"""

from __future__ import annotations

from arvideo_ds.arguments import CommandParser, from_arguments, require_positive
from arvideo_ds.errors import EXIT_OK, UserError, command
from arvideo_ds.host import available_cores
from arvideo_ds.shards.verify import Verification, verify

EXIT_UNSOUND = 1


@command
def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("shards", help="folder of the shards, or its URL")
    text = "share of the videos; default 0.01"
    parser.add_argument(
        "--decode", type=share, default=0.01, dest="decode_share", metavar="SHARE|all", help=text
    )
    parser.add_number("workers", len(available_cores()), "processes")
    parser.add_number("seed", 0, "chooses the videos to decode")
    parser.add_number("timeout_s", 120.0, "per video")
    args = parser.parse_args()
    require_positive(args, "workers", "timeout_s")
    done = from_arguments(verify, args, folder=args.shards)
    for problem in done.problems:
        print(problem)
    print_summary(args.shards, done)
    return EXIT_UNSOUND if done.problems else EXIT_OK


def share(text: str) -> float:
    """Errors: `UserError` unless it is 'all' or a number above 0 and at most 1."""
    try:
        value = 1.0 if text == "all" else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise UserError(f"--decode {text} must be 'all' or a share above 0 and at most 1.")
    return value


def print_summary(folder: str, done: Verification) -> None:
    size_mib = done.bytes / 2**20
    count = len(done.problems)
    verdict = "sound" if not count else f"NOT SOUND, {count} problem{'s' * (count > 1)} (above)"
    print(
        f"{folder}: {verdict}\n"
        f"read: {done.num_shards:,} shards, {done.num_samples:,} samples, {size_mib:,.1f} MiB in "
        f"{done.read_s:.1f} s ({size_mib / done.read_s:,.0f} MiB/s)\n"
        f"decoded: {done.num_decoded:,} videos in {done.decode_s:.1f} s "
        f"({done.num_decoded / done.decode_s:,.1f} videos/s)"
    )
