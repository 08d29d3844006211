"""Training: one loop (`loop.py`), its optimizer, schedule, checkpoints, metrics and report."""
