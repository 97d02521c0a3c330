"""Gene sets on disk: read, harmonise, filter, split, store, pack and load. Never imports jax itself."""
