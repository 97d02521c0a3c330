"""What a run is besides its arithmetic: a directory, checkpoints, exports, processes that join and stop."""
