"""Completion of gene sets by a trained decoder: ranker, sampler, mixture, and the overlap that tests them."""
