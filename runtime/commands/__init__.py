"""The commands of the runtime: `icnet predict` and `icnet bank`."""
