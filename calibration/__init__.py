"""Groups to INT8: explicit Q/DQ in the graph, and what it costs in accuracy."""
