"""The training loop: state, sharding, optimizer, step, checkpoints and metrics."""
