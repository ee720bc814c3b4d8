"""GPUs by name: memory, dense peak and bandwidth, from their makers' data sheets.

Peaks are of matrix products in bf16 with fp32 sums and without sparsity. Where a data sheet gives
only the rate with sparsity, the peak is half of that. A plugin may register more.
"""

from __future__ import annotations

from dataclasses import dataclass

from arvideo_ds.registry import Registry

# Of the peak, that a plan assumes to be achieved over a whole step.
UTILIZATION = 0.4


@dataclass(frozen=True)
class Gpu:
    """devices: names by which CUDA knows it, without "NVIDIA ". bandwidth_gb_s: of its memory."""

    memory_gib: float
    peak_tflops: float
    bandwidth_gb_s: float
    devices: tuple[str, ...]


GPUS: Registry[Gpu] = Registry(
    "GPU",
    {
        # NVIDIA H200 Tensor Core GPU, data sheet: 141 GB, 1,979 TFLOPS sparse, 4.8 TB/s.
        "h200": Gpu(141, 989.5, 4800, ("H200",)),
        # NVIDIA H100 Tensor Core GPU, data sheet. SXM: 80 GB, 1,979 sparse, 3.35 TB/s; PCIe:
        # 80 GB, 1,513 sparse, 2 TB/s; NVL: 94 GB, 1,671 sparse, 3.9 TB/s.
        "h100": Gpu(80, 989.5, 3350, ("H100 80GB HBM3",)),
        "h100-pcie": Gpu(80, 756.5, 2000, ("H100 PCIe",)),
        "h100-nvl": Gpu(94, 835.5, 3900, ("H100 NVL",)),
        # NVIDIA A100 Tensor Core GPU, data sheet: 312 dense; 40 GB: 1,555 GB/s, 80 GB SXM: 2,039.
        "a100": Gpu(80, 312, 2039, ("A100-SXM4-80GB", "A100 80GB PCIe")),
        "a100-40": Gpu(40, 312, 1555, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
        # NVIDIA L40S, data sheet: 48 GB, 362.05 dense, 864 GB/s.
        "l40s": Gpu(48, 362.05, 864, ("L40S",)),
        # NVIDIA L4, data sheet: 24 GB, 242 sparse, 300 GB/s.
        "l4": Gpu(24, 121, 300, ("L4",)),
        # NVIDIA A40, data sheet: 48 GB, 149.7 dense, 696 GB/s.
        "a40": Gpu(48, 149.7, 696, ("A40",)),
        # NVIDIA A10, data sheet: 24 GB, 125 dense, 600 GB/s.
        "a10": Gpu(24, 125, 600, ("A10",)),
        # NVIDIA Ada GPU architecture, white paper, appendix A: 24 GB, 165.2 dense, 1,008 GB/s.
        "4090": Gpu(24, 165.2, 1008, ("GeForce RTX 4090",)),
        # NVIDIA Ampere GA102 GPU architecture, white paper, appendix A. RTX 3090: 24 GB, 71 dense,
        # 936 GB/s; RTX A6000: 48 GB, 154.8 dense, 768 GB/s.
        "3090": Gpu(24, 71, 936, ("GeForce RTX 3090",)),
        "a6000": Gpu(48, 154.8, 768, ("RTX A6000",)),
    },
)


def peak_of(device: str, precision: str) -> float | None:
    """Peak TFLOP/s of the device that CUDA calls so, if known; in half precision only."""
    if precision == "fp32":
        return None
    name = device.removeprefix("NVIDIA ")
    return next((gpu.peak_tflops for gpu in GPUS.values() if name in gpu.devices), None)
