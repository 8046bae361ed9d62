"""Measure what is left. Each stage runs on the source model too, so that every number has its baseline."""
