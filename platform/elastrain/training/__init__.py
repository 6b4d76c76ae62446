"""Training: tasks, updates, evaluation and checkpoints. torch, never Ray."""
