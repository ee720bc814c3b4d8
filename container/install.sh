#!/bin/sh
# The steps of Dockerfile and arvideo_ds.def, which differ only in how they start.
# Run in the folder with setup.py: install.sh system | packages | code
set -eu
export DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
case "$1" in
system)
    # FFmpeg's libraries for torchcodec; a compiler and Python's headers for torch.compile.
    apt-get update -q
    apt-get install -y -q --no-install-recommends \
        ca-certificates ffmpeg g++ python3 python3-dev python3-venv
    rm -rf /var/lib/apt/lists/*
    python3 -m venv /opt/venv
    ;;
packages)
    # Everything but the code, so that a change of the code keeps this layer.
    /opt/venv/bin/pip install -q --use-pep517 -c constraints.txt '.[wandb,export,tokenizer,http,s3,gcs,parquet]'
    ;;
code)
    /opt/venv/bin/pip install -q --no-deps --force-reinstall .
    # Fails the build where FFmpeg and torchcodec do not fit.
    /opt/venv/bin/python -c 'from torchcodec.decoders import VideoDecoder'
    /opt/venv/bin/arvideo --version
    ;;
*)
    echo "usage: $0 system | packages | code" >&2
    exit 2
    ;;
esac
