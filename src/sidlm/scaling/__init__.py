"""Scaling laws: grids of training runs, fits of their losses, forecasts and plans.

`grid`, `cell` and `runner` train; everything else reads numbers and needs neither torch nor a model.
"""
