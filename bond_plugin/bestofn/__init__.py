"""The mathematics of Best-of-N distillation. Imports torch and nothing of the host."""
