"""Training ICNet: the paper's way, and on groups made by cut and paste."""
