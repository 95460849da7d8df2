"""Synthetic traces: a model of how requests use experts, fitted to a recorded trace, and traces of any size from it.

`statistics.py` measures a trace, `model.py` draws from the model, and `fit.py` fits it so that what is drawn measures
like what was recorded.
"""

from eldr.synthetic.fit import fit_traffic
from eldr.synthetic.model import NOTE, Geometry, SyntheticError, TrafficModel, draw_trace, is_synthetic
from eldr.synthetic.statistics import Statistic, measure

__all__ = [
    "NOTE",
    "Geometry",
    "Statistic",
    "SyntheticError",
    "TrafficModel",
    "draw_trace",
    "fit_traffic",
    "is_synthetic",
    "measure",
]
