"""What NVIDIA's cards reach at best, as their data sheets say: for `icnet bench roofline --card`.

Rates are those of dense products (no sparsity) in FLOP/s: FP32 as FP32 (no TF32), FP16 and INT8 on tensor cores, FP16
with its faster accumulation where a card has two. A figure for which no source was found is left out.
"""

from dataclasses import dataclass

# Of a card's bound: "Real workloads often hit 30–70% of peak", https://0to1advisor.com/AI_Inference_Chip_Sizing.html.
REALISTIC = 0.3, 0.7


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        rates: FLOP/s of "fp32", "fp16" and "int8", as far as they are known.
        bytes_per_s: of its memory.
        memory_bytes: its size.
        sources: where the figures are from.
    """

    rates: dict[str, float]
    bytes_per_s: float
    memory_bytes: float
    sources: tuple[str, ...]


def _card(fp32: float, fp16: float | None, int8: float | None, bandwidth: float, memory: float, *sources: str) -> Card:
    """Rates in TFLOP/s, bandwidth in GB/s, memory in GB."""
    rates = {"fp32": fp32, "fp16": fp16, "int8": int8}
    return Card({p: r * 1e12 for p, r in rates.items() if r}, bandwidth * 1e9, memory * 1e9, sources)


_HOPPER = "https://glennklockwood.com/garden/processors/h100", "https://gpu.blog/gpus/nvidia-h100-sxm"
_AMPERE = "https://glennklockwood.com/garden/processors/A100"  # of NVIDIA's A100 data sheet, 1758950-r4
CARDS = {
    "t4": _card(
        8.1, 65, 130, 320, 16,
        "https://heise.de/news/Nvidia-Tesla-P4-K-I-Beschleuniger-mit-8-TFlops-bei-75-Watt-Leistungsaufnahme-4164684.html",
        "https://sysrqmts.com/en/gpus/nvidia/tesla/t4",
    ),
    "l4": _card(
        30.3, 121, 242.5, 300, 24,  # the source's 242 and 485 are with sparsity
        "https://grokipedia.com/page/NVIDIA_L4_vs_L40S",
        "https://fpsbench.com/compare/gpu/nvidia-l4-vs-nvidia-tesla-m40",
    ),
    "a10": _card(
        31.2, 125, None, 600, 24,
        "https://sysrqmts.com/ru/gpus/compare/nvidia-a10-pcie-vs-nvidia-quadro-rtx-4000",
        "https://gist.github.com/kimbochen",
    ),
    "a100-sxm-40gb": _card(19.5, 312, 624, 1555, 40, _AMPERE),
    "a100-sxm-80gb": _card(19.5, 312, 624, 2039, 80, _AMPERE),
    "l40s": _card(
        91.6, 362, 733, 864, 48,
        "https://www.mullet.se/product.html?product_id=355414",
        "https://hmc-tech.com/gpu/nvidia-l40s-vs-nvidia-t40",
    ),
    "rtx-3090": _card(
        35.6, 142, None, 936, 24, "https://holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-3090-specifications.html"
    ),
    "rtx-4090": _card(
        82.6, 330.3, 660.6, 1008, 24,
        "https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-geforce-rtx-5050",
        "https://www.tomshardware.com/pc-components/gpus/"
        "nvidia-geforce-rtx-5090-versus-rtx-4090-how-does-the-new-halo-gpu-compare-with-its-predecessor",
    ),
    "rtx-5090": _card(
        104.8, 419.2, None, 1792, 32,  # the source's 838.4 is with sparsity
        "https://www.spheron.network/blog/nvidia-rtx-5090-specs/",
        "https://www.tomshardware.com/pc-components/gpus/"
        "nvidia-geforce-rtx-5090-versus-rtx-4090-how-does-the-new-halo-gpu-compare-with-its-predecessor",
    ),
    "h100-sxm": _card(67, 989.4, 1978.9, 3350, 80, *_HOPPER),
    "h200-sxm": _card(67, 989.4, 1978.9, 4800, 141, *_HOPPER, "https://lzwjava.github.io/nvidia-h200-gpu-specs-en"),
    "b200": _card(80, 2250, 4500, 8000, 192, "https://glennklockwood.com/garden/processors/B200"),
    "jetson-agx-orin-64gb": _card(
        5.3, None, 85, 200, 64,  # the source's 170 are with sparsity, of the GPU without the DLAs
        "http://mzph.cn/web/30785.shtml",  # of NVIDIA's technical brief on Jetson AGX Orin
        "https://www.svethardware.cz/nvidia-orin-spojeni-gpu-nove-generace-a-arm-hercules/50897",
    ),
}  # fmt: skip
