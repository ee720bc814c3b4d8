"""Packages that not everybody needs: absent, they are named with the extra that brings them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from arvideo_ds.config.tokenizer import TokenizerSettings
from arvideo_ds.errors import UserError
from arvideo_ds.long_video.tokenizer import Tokenizer
from arvideo_ds.shards import store as store_module
from tests.conftest import command_environment

OPTIONAL = (
    "vector_quantize_pytorch torchmetrics wandb tensorboard trackio transformers onnx pyarrow "
    "s3fs gcsfs"
)
PROGRAM = f"""
import sys
for name in "{OPTIONAL}".split():
    sys.modules[name] = None
import arvideo_ds.cli.finetune, arvideo_ds.long_video.training, arvideo_ds.train.run
"""


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://bucket/shards", "s3fs", "s3"),
        ("gs://bucket/shards", "gcsfs", "gcs"),
        ("http://host/shards", "aiohttp", "http"),
    ],
)
def test_a_url_whose_package_is_missing_names_the_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    # An earlier test may have used the protocol.
    used = importlib.import_module("fsspec.registry")._registry
    monkeypatch.delitem(used, url.partition(":")[0], raising=False)
    store_module._file_system.cache_clear()
    with pytest.raises(UserError) as caught:
        store_module.open_store(url)
    assert url in str(caught.value) and f"pip install 'arvideo_ds[{extra}]'" in str(caught.value)


def test_the_tokenizer_without_its_packages_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with torch.device("meta"), pytest.raises(UserError, match=r"'arvideo_ds\[tokenizer\]'"):
        Tokenizer((2, 8, 8), TokenizerSettings())


@pytest.mark.slow
def test_training_is_imported_without_any_of_them() -> None:
    environment = command_environment()
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, timeout=300)
