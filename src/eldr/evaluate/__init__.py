"""The evaluation: runs every experiment of docs/evaluation on recorded traces and keeps the results as rows."""
