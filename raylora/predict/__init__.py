"""Predict a training's outcome before it is trained: regression on tables of finished runs.

``tables`` checks a table's columns; ``models`` has the candidate models and the baselines; ``validation`` measures them
by cross-validation; ``predictor`` is the fitted result, with conformal intervals, and its file; ``ranking`` orders the
datasets of a chunk by it; ``figures`` draws its calibration.
"""
