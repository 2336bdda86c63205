"""Model FLOPs utilization: what part of a device's peak a training makes use of. Pure."""

from __future__ import annotations

# Dense matrix FLOP/s in bf16 or fp16, without sparsity, as the makers' data sheets have them. Of
# several names that are in a device's own the longest counts.
PEAKS = {
    "A100": 312e12,
    "A40": 149.7e12,
    "B200": 2250e12,
    "H100": 989.4e12,
    "H100 NVL": 835.5e12,
    "H100 PCIe": 756e12,
    "H200": 989.4e12,
    "H200 NVL": 835.5e12,
    "L4": 121e12,
    "L40S": 362e12,
    "MI300X": 1307.4e12,
}


def peak_of(device: str) -> float | None:
    """FLOP/s of a device of this name, in bf16 or fp16; None: not known."""
    words = device.replace("-", " ").split()

    def has(name: str) -> bool:
        wanted = name.split()
        return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))

    known = [name for name in PEAKS if has(name)]
    return PEAKS[max(known, key=len)] if known else None


def mfu(parameters: int, trained: int, tokens_per_second: float, peak: float) -> float:
    """The share of the peak, of all devices together, that the model's own operations are.

    A token costs two operations for each parameter in the forward pass, two for the gradients of
    activations, and two for each trained parameter's own gradient. Attention is left out, and so
    is what gradient checkpointing computes once more.

    Args:
        parameters, trained: how many there are.
        tokens_per_second: on all devices.
        peak: of all devices together.
    """
    return (4 * parameters + 2 * trained) * tokens_per_second / peak
