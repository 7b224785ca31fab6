"""Sparsity: criteria, granularities, allocations and schedules, any with any; and what is sliced out for real."""
