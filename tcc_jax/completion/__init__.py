"""Completion of gene sets: ranker, overlap statistics, baselines and reports."""
