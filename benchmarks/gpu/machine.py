"""What a figure belongs to: date, card, driver, versions; and what the card can do at most."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

LIBRARIES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "peft")
# Dense bf16 TFLOP/s (data sheets give twice that, with sparsity): NVIDIA H100 Tensor Core GPU data
# sheet (SXM 1,979, PCIe 1,513, NVL 1,671), H200 (SXM 1,979, NVL 1,671), A100 (312, dense).
PEAKS = (
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.5),
    ("H100", 989.4),
    ("A100", 312.0),
)


def peak_tflops(card: str) -> float | None:
    """Dense bf16 TFLOP/s by the data sheet; None: the card is not in the list."""
    return next((peak for name, peak in PEAKS if name.lower() in card.lower()), None)


def flops_per_token(matrices: int, layers: int, hidden: int, length: int) -> float:
    """Of a forward and a backward pass: 6 for each weight that is multiplied with, and for
    attention 12 x layers x hidden x length (Chowdhery et al., "PaLM", 2022, appendix B: a causal
    mask is not counted as half).

    Args:
        matrices: parameters without the input embedding, of which rows are looked up.
    """
    return 6.0 * matrices + 12.0 * layers * hidden * length


def card() -> str | None:
    """The GPU's name; None: there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def facts() -> dict[str, str]:
    """Of this machine, in the order in which the table tells them."""
    now = datetime.datetime.now(datetime.UTC)
    found = {"date": f"{now:%Y-%m-%d %H:%M} UTC", "card": card() or "none (CPU)"}
    driver = _driver()
    if driver is not None:
        found["driver"] = driver
    found["Python"] = platform.python_version()
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def lacks(*packages: str) -> str | None:
    """Why what needs these packages is left out; None: they are there."""
    missing = [name for name in packages if find_spec(name) is None]
    return f"skipped: {', '.join(missing)} is not installed" if missing else None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # a machine without one
    return told.stdout.split("\n")[0].strip() or None
