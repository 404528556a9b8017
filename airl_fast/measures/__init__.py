"""Measures on plain arrays, with their intervals: pass@k, reranking, localisation, correlation."""
