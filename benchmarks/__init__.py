"""Latency, throughput and accuracy, measured side by side."""
