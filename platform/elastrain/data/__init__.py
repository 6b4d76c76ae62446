"""Datasets, the plan over them, and the pipeline that feeds it."""
