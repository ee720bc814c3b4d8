"""Package of arvideo_ds; exact versions are pinned in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "arvideo_ds/__init__.py").read_text())[1]


class BuildWithConfigs(build_py):
    """Puts ds_configs/ into the package of a wheel, for `--deepspeed_config zero2`."""

    def run(self):
        super().run()
        if not self.editable_mode:  # such an install reads the folder of the checkout
            target = Path(self.build_lib) / "arvideo_ds" / "ds_configs"
            shutil.copytree(HERE / "ds_configs", target, dirs_exist_ok=True)


setup(
    name="arvideo_ds",
    version=VERSION,
    description="ARVideo pretraining of video encoders at scale, with DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["arvideo_ds", "arvideo_ds.*"]),
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["arvideo = arvideo_ds.cli:main"]},
    package_data={
        "arvideo_ds": [
            "recipes/*.yaml",
            "recipes/*/*.yaml",
            "evaluation/ava_actions.pbtxt",
            "py.typed",
        ]
    },
    install_requires=[
        "torch>=2.11",
        "torchvision",  # crops and resizes uint8 clips; timm needs it as well
        "deepspeed>=0.19",
        "timm>=1.0.20",
        "webdataset>=1.0",
        "einops",
        "pyyaml",
        "pydantic>=2.7",
        "numpy",
        # H.264 encoding and exact probing without an ffmpeg program on the machine; decodes where
        # torchcodec does not.
        "av>=14",
        # Decodes where the machine has FFmpeg's libraries.
        "torchcodec>=0.12",
        "pillow",  # images as videos of one frame; torchvision needs it as well
        "tqdm",
        # Shards behind URLs; torch needs it as well.
        "fsspec",
        "safetensors",
        # scripts/doctor.py compares versions; DeepSpeed needs it as well.
        "packaging",
        "matplotlib",
        # The last choice to decode with; wheels for Linux on x86_64 only.
        'decord>=0.6; platform_machine == "x86_64" and sys_platform == "linux"',
    ],
    extras_require={
        "wandb": ["wandb"],
        "tensorboard": ["tensorboard"],
        # Older versions keep nothing to resume a run by.
        "trackio": ["trackio>=0.43"],
        # Shards behind http:// and https://, s3:// and gs://.
        "http": ["aiohttp", "requests"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        # The adaptive tokenizer of long video: its quantiser, PSNR and SSIM of what it makes.
        "tokenizer": ["vector-quantize-pytorch>=1.32", "torchmetrics>=1.9"],
        # scripts/export.py: other programs' formats, and holding what was exported against them.
        "export": [
            "transformers",
            "onnx",
            "onnxscript",
            "onnxruntime",
        ],
        # scripts/extract_features.py --format parquet
        "parquet": ["pyarrow"],
        # make docs: the site, equations as MathML, and the test that runs docs/demo.ipynb.
        "docs": [
            "mkdocs>=1.6",
            "mkdocs-material>=9.5",
            "mkdocstrings-python",
            "latex2mathml",
            "nbclient",
            "ipykernel",
        ],
        "dev": [
            "aiohttp",
            "requests",
            # The S3 server of the tests.
            "s3fs",
            "moto[s3]",
            "flask",
            "flask-cors",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "import-linter",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
