"""How large things will be: checkpoints, and memory per process. Pure arithmetic on shapes.

Checkpoint sizes are exact but for small change (a test compares them with what is written). Memory
is an estimate: what ZeRO shares out is known (Rajbhandari et al., "ZeRO", 2020, section 3),
activations are not (Korthikanti et al., "Reducing Activation Recomputation in Large Transformer
Models", 2022, give 34 bytes per token, hidden unit and layer in 16 bit, with fused attention).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

RECORD = 4300  # bytes of a tensor in a torch file beside its content: aligned to a block
STATE_3 = (
    5000  # the same per trained tensor in a ZeRO-3 rank's model states, whose tensors are empty
)
EACH_RANK = 65_000  # RNG, and what a file of torch's has beside tensors
ONCE = 60_000  # scheduler, trainer state, configuration, layout, manifest
MOMENTS = 2  # Adam's, per trained element
ACTIVATION_BYTES = 34
LIVE_3 = 2  # of ZeRO-3's largest modules: one at work, one on its way
BUCKET = 500_000_000  # elements of gradients that DeepSpeed 0.19.8 reduces at once, by default


@dataclass(frozen=True)
class Shapes:
    """What is known of a model without its weights.

    Attributes:
        total, trained: elements of all parameters, and of those that are trained.
        stored: elements that the weights file has (an adapter's, or all).
        tensors: trained tensors.
        largest: elements of the largest module that ZeRO-3 gathers at once.
        layers, hidden, vocabulary: of the transformer.
        element: bytes of one, as the model is loaded.
        companions: bytes of tokenizer files and the like.
        quantized, quantized_bytes: elements of 4 or 8 bits, and what they take in all.
    """

    total: int
    trained: int
    stored: int
    tensors: int
    largest: int
    layers: int
    hidden: int
    vocabulary: int
    element: int = 4
    companions: int = 0
    quantized: int = 0
    quantized_bytes: int = 0


@dataclass(frozen=True)
class Strategy:
    """How a run is shared out.

    Attributes:
        stage: ZeRO's; 0 for DDP or a single process.
        processes: in all.
        half: whether it computes in 16 bit.
        offload_optimizer, offload_parameters: kept in host memory.
        sequences: how many of them share out each row's tokens (not those of an evaluation).
    """

    stage: int
    processes: int
    half: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    sequences: int = 1

    @property
    def name(self) -> str:
        offloaded = self.offload_optimizer or self.offload_parameters
        return (f"zero{self.stage}" if self.stage else "ddp") + ("_offload" if offloaded else "")


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass works on: rows, tokens in each; recomputed or kept."""

    rows: int
    length: int
    checkpointing: bool


def element_bytes(shapes: Shapes, strategy: Strategy) -> int:
    """Of a parameter at work: DeepSpeed casts the model, autocast (DDP) leaves it as it is."""
    return 2 if strategy.half and strategy.stage else shapes.element


def checkpoint_bytes(shapes: Shapes, strategy: Strategy, weights: bool = True) -> int:
    """One checkpoint, all ranks together; `weights`: with a weights file (save_weights)."""
    size = shapes.stored * element_bytes(shapes, strategy) if weights or not strategy.stage else 0
    if strategy.stage:
        size += (4 + 4 * MOMENTS) * shapes.trained
        if strategy.stage == 3:
            size += STATE_3 * shapes.tensors * strategy.processes
    else:
        size += MOMENTS * shapes.element * shapes.trained
        size += (MOMENTS + 1) * RECORD * shapes.tensors
    return size + EACH_RANK * strategy.processes + ONCE + shapes.companions


def device_bytes(shapes: Shapes, strategy: Strategy, step: Step) -> int:
    """Memory of one process's device: parameters, gradients, optimizer, activations."""
    size, n = element_bytes(shapes, strategy), strategy.processes
    parameters = (shapes.total - shapes.quantized) * size + shapes.quantized_bytes
    gradients = shapes.trained * size
    optimizer = (4 * MOMENTS + (4 if strategy.stage else 0)) * shapes.trained
    if strategy.stage == 0:
        optimizer = MOMENTS * shapes.element * shapes.trained
        gradients *= 2 if n > 1 else 1  # and the buckets that they are reduced in
    if strategy.stage >= 1:
        optimizer //= n
    if strategy.stage >= 2:
        gradients //= n
    if strategy.stage == 3:
        parameters = parameters // n + LIVE_3 * shapes.largest * size
    if strategy.offload_optimizer:
        optimizer, gradients = 0, gradients if strategy.stage < 2 else 0
    if strategy.offload_parameters:
        parameters = LIVE_3 * shapes.largest * size
    # Host memory holds what is written of it; a GPU all of it, also where less is trained.
    bucket = min(shapes.trained, BUCKET) * size if strategy.stage else 0
    return parameters + gradients + optimizer + bucket + activation_bytes(shapes, strategy, step)


def host_bytes(shapes: Shapes, strategy: Strategy) -> int:
    """Host memory of one process: what is offloaded to it, and the snapshot of a save."""
    share = max(1, strategy.processes)
    size = (4 + 4 * MOMENTS) * shapes.trained // share
    if strategy.offload_optimizer:
        size += (4 + 4 * MOMENTS + 4) * shapes.trained // share
    if strategy.offload_parameters:
        size += shapes.total * element_bytes(shapes, strategy) // share
    return size


def activation_bytes(shapes: Shapes, strategy: Strategy, step: Step) -> int:
    """Of one micro-batch; the logits are in 32 bit, twice."""
    tokens, wide = step.rows * -(-step.length // strategy.sequences), 1 if strategy.half else 2
    layer = ACTIVATION_BYTES * wide * tokens * shapes.hidden
    if step.checkpointing:
        kept = 2 * wide * tokens * shapes.hidden * shapes.layers + layer
    else:
        kept = layer * shapes.layers
    return kept + 2 * 4 * tokens * shapes.vocabulary


def alternatives(strategy: Strategy) -> list[Strategy]:
    """The same processes under every accelerate config, the fastest first."""
    plain = replace(strategy, offload_optimizer=False, offload_parameters=False)
    whole = (0,) if strategy.sequences == 1 else ()  # only DeepSpeed's ZeRO shares sequences
    stages = [replace(plain, stage=stage) for stage in (*whole, 1, 2, 3)]
    return [*stages, replace(stages[-1], offload_optimizer=True, offload_parameters=True)]
