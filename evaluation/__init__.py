"""The accuracy of maps: metrics, data sets with ground truths, and records of the scores."""
