"""The command `arvideo`: each command is a module of this room, its parser and its call.

The top layer: nothing imports it. `main` of a module imports torch after it has checked the
arguments, so that `--help` and wrong input are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from arvideo_ds import __version__
from arvideo_ds.errors import EXIT_MANY_REJECTS, EXIT_OK, UserError, command

if TYPE_CHECKING:
    from arvideo_ds.shards.manifest import Manifest
    from arvideo_ds.shards.writer import ShardReport

# Pages that a command of a checkout writes, and its exit code where one is not current.
DOCS = Path(__file__).parents[2] / "docs"
EXIT_STALE = 1

if not sys.stderr.isatty():
    # A log file keeps every line of a progress bar. tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_MININTERVAL", "60")

# Command (and module of this room) -> what it does.
GROUPS: dict[str, dict[str, str]] = {
    "videos to shards": {
        "shards": "turn videos into WebDataset shards with a manifest",
        "index": "use existing WebDataset tars, without a copy",
        "inspect": "show what shards contain: a table, histograms, a contact sheet",
        "verify": "check that shards are whole, unaltered and decodable",
        "reshard": "merge, split, filter or stage shards",
        "score_tokens": "score every token of shards, for pretraining on long video",
        "demo": "make the videos and shards of the demo",
    },
    "train": {
        "pretrain": "pretrain a video encoder",
        "finetune": "fine-tune an encoder on labelled videos",
        "tokenizer": "train the adaptive tokenizer of long video",
        "detect": "train a detector of actions in boxes (AVA)",
        "ablate": "run a grid of recipes with several seeds",
        "soup": "average the weights of fine-tuned runs",
    },
    "evaluate": {
        "probe": "probe the frozen encoder of a pretraining run",
        "evaluate": "test a fine-tuned run",
        "evaluate_detection": "frame mAP of a detection run",
        "evaluate_tokenizer": "reconstruction and codes of a tokenizer",
        "attention": "rank of the attention maps, layer by layer",
        "report": "draw a pretraining run: loss, probes, predictions",
    },
    "use": {
        "predict": "label videos with a fine-tuned run",
        "features": "features of videos of any length",
        "export": "export a run for transformers, ONNX or timm",
    },
    "plan and measure": {
        "doctor": "check whether a machine is fit to train on",
        "plan": "choose ZeRO stage and micro-batch, predict time and memory",
        "benchmark": "measure what a training step costs",
        "benchmark_loader": "measure how fast clips come out of shards",
        "benchmark_ingest": "measure what making shards costs",
        "protocols": "compare the recipes with published numbers",
        "settings": "explain the settings of recipes: type, default, meaning",
        "costs": "write the README's table of predicted costs",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
USAGE = """usage: arvideo COMMAND ...        (arvideo COMMAND --help: its options)

Pretrain video encoders with ARVideo and its baselines. On several GPUs or hosts:
  deepspeed --module arvideo_ds pretrain ...
  torchrun --nproc_per_node 8 -m arvideo_ds pretrain ...
  srun --ntasks-per-node 8 arvideo pretrain ...
"""


@command
def main() -> int:
    """Run the command named by the first argument; return the exit code."""
    words = sys.argv[1:]
    # DeepSpeed's launcher puts its own option before ours.
    rank = [words.pop(0)] if words and words[0].startswith("--local_rank=") else []
    name = words.pop(0) if words else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return EXIT_OK
    if name == "--version":
        print(__version__)
        return EXIT_OK
    run = find(name)
    sys.argv = [f"arvideo {name}", *rank, *words]
    return run()


def find(name: str) -> Callable[[], int]:
    """The function of a command; `-` equals `_`. Errors: `UserError` for an unknown command."""
    module = name.replace("-", "_")
    if module not in COMMANDS:
        near = difflib.get_close_matches(module, COMMANDS, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(f"there is no command '{name}'.{hint} `arvideo --help` lists all.")
    run: Callable[[], int] = importlib.import_module(f"{__name__}.{module}").main
    return run


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [USAGE.rstrip()]
    for title, group in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:{width}}  {text}" for name, text in group.items())]
    return "\n".join(lines)


def keep_page(path: Path, text: str, *, check: bool, by: str) -> int:
    """Write a page of the checkout, or only compare it; the exit code, 1 where it is stale. by: the
    command that writes it."""
    if not check:
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")
    elif not path.is_file() or path.read_text(encoding="utf-8") != text:
        log(f"{path} is stale; run: {by}")
        return EXIT_STALE
    return EXIT_OK


def log(text: str) -> None:
    """Print to standard error, at once."""
    print(text, file=sys.stderr, flush=True)


def describe_shards(manifest: Manifest, files: str = "shards", kept: str = "") -> str:
    """Counts of a shard set, for the last line of a command."""
    size_mib = sum(shard.bytes for shard in manifest.shards) / 2**20
    labels = f"{len(manifest.labels)} labels" if manifest.labels else "no labels"
    return (
        f"{manifest.num_samples:,} videos in {len(manifest.shards):,} {files}{kept}, "
        f"{size_mib:,.1f} MiB, {labels}"
    )


def end_with_rejects(folder: Path, report: ShardReport, max_share: float, files: str) -> int:
    """Print counts and rejects of a shard set; the exit code."""
    kept = f", {report.shards_kept} of them from an earlier run" if report.shards_kept else ""
    print(f"{folder}: {describe_shards(report.manifest, files, kept)}")
    report.print_rejects(folder)
    return EXIT_MANY_REJECTS if report.rejected_share > max_share else EXIT_OK
