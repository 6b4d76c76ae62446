"""Clusters: machines described once, and runs that are sent to them."""
