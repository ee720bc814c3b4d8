"""The command `arvideo`: a module of this room for each of its commands, parser and call.

The top layer: nothing imports it. A module imports torch only inside of `main`, so that `--help`
and wrong input are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable

from arvideo_ds import __version__
from arvideo_ds.errors import EXIT_OK, UserError, command

# Command (and module of this room) -> what it does.
GROUPS: dict[str, dict[str, str]] = {
    "videos to shards": {
        "shards": "turn videos into WebDataset shards with a manifest",
        "index": "use WebDataset tars of somebody else, without a copy",
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
        "protocols": "compare the recipes with published numbers",
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
    """Run the command that the first argument names; the exit code."""
    words = sys.argv[1:]
    # DeepSpeed's launcher puts its own option before ours.
    own = [words.pop(0)] if words and words[0].startswith("--local_rank=") else []
    name = words.pop(0) if words else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return EXIT_OK
    if name == "--version":
        print(__version__)
        return EXIT_OK
    run = find(name)
    sys.argv = [f"arvideo {name}", *own, *words]
    return run()


def find(name: str) -> Callable[[], int]:
    """The function of a command; `-` and `_` are alike. Errors: `UserError` for an unknown one."""
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
