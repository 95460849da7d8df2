"""The evaluation: every experiment of docs/evaluation, run on recorded traces and kept as plain rows of numbers."""
