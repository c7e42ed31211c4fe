"""Can the outcome of a training be known before it? Models of tables of finished runs.

``tables`` checks a table's columns; ``models`` has the models and the baselines beside them; ``validation`` measures
them on rows they have not seen; ``predictor`` is what comes out, with intervals, on disk and back; ``figures`` draws.
"""
