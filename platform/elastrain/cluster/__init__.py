"""Clusters: machines described once, checked before anything is spent, and runs that are sent to them."""
