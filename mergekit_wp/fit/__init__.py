"""The fit: fusion weights learnt without labels (METHOD.md 6)."""
