"""The workers: who is there, how they are, and what becomes of what they are asked."""
