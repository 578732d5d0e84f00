"""The torch side: what turns a checkpoint into files that need no torch."""
