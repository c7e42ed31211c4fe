"""Can the outcome of a training be known before it? Models of tables of finished runs.

``tables`` reads a table and checks its columns; ``models`` has the models and the baselines beside them; ``validation``
measures them on rows they have not seen; ``predictor`` is what comes out, with intervals, on disk and back.
"""

from raylora.predict.predictor import Predictor, load_predictor
from raylora.predict.tables import Known, known_from_table, read_table
from raylora.predict.validation import fit_predictor

__all__ = ["Known", "Predictor", "fit_predictor", "known_from_table", "load_predictor", "read_table"]
