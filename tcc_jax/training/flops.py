"""What a step costs in arithmetic, and what share of a device's peak it reaches."""

from __future__ import annotations

from tcc_jax.config import Config
from tcc_jax.model.decoder import padded_vocabulary_size

# Dense bfloat16 FLOP/s of one JAX device by `device_kind`, from the vendors' data sheets and
# https://docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm. A tpu7x chip is two devices.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Return the peak of a device in bfloat16 FLOP/s, or None where none is recorded (a CPU).

    Args:
        device_kind: as `jax.Device.device_kind` has it, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
    """
    if device_kind in PEAK_FLOPS:
        return PEAK_FLOPS[device_kind]
    words = device_kind.replace("-", " ").split()
    # GPU names carry the maker, the form and the memory around the model. More words first: "H100 PCIe" before "H100".
    matches = [name for name in PEAK_FLOPS if set(name.split()) <= set(words)]
    return PEAK_FLOPS[max(matches, key=lambda name: len(name.split()))] if matches else None


def flops_per_token(
    config: Config, vocabulary_size: int, keys_per_token: float | None = None, scored_per_token: float | None = None
) -> float:
    """Return the arithmetic of training, forward and backward, for one useful token.

    6 x matmul parameters + 12 L D x keys. Matmul parameters are those of the blocks, L (4 D^2 + 2 D F), and the tied
    head, V D with V padded, once. Where cut points alone are scored, the head and all of the last block but its keys
    and values (2 D^2), its share of the last term included, count for the scored positions alone; without
    `scored_per_token` for all that a row has places for, which is what is computed. Without `keys_per_token` a token
    attends to T / 2 keys, the plain causal count, which makes the last term 6 L D T. The embedding's lookup, norms and
    recomputed activations do not count (PaLM, Chowdhery et al. 2022, appendix B).

    MFU = useful tokens per second x this / (devices x peak of a device).

    Args:
        config: the run.
        vocabulary_size: V, before padding.
        keys_per_token: keys a token really attends to, in its own segment, on average.
        scored_per_token: scored positions for each useful token, on average; only cut points need it.
    """
    model, length = config.model, config.training.row_length
    hidden_width = model.hidden_width or 4 * model.width
    keys_and_values = 2 * model.width**2
    rest = keys_and_values + 2 * model.width * hidden_width
    head = padded_vocabulary_size(vocabulary_size) * model.width
    cut_points = config.objective.cut_points
    places = config.training.segments_per_row * cut_points / length
    share = (places if scored_per_token is None else scored_per_token) if cut_points else 1.0
    layers = model.num_layers - 1 + share
    matmul_parameters = model.num_layers * keys_and_values + layers * rest + share * head
    keys = length / 2 if keys_per_token is None else keys_per_token
    return 6 * matmul_parameters + 12 * layers * model.width * keys
