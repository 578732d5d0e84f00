"""How good maps are: metrics, data sets with ground truths, and records of the scores."""
