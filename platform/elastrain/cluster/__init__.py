"""Clusters: a spec of machines, rendered for who lends them, checked before anything is spent, planned for a run."""
