"""What `eval` does: mask sets, complete them by each method, measure, report."""
