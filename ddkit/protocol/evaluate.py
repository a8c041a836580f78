"""`ddkit.evaluation.evaluate` under the import path that notebooks use."""

from ddkit.evaluation.evaluate import Evaluation as Evaluation
from ddkit.evaluation.evaluate import EvaluationSettings as EvaluationSettings
from ddkit.evaluation.evaluate import evaluate as evaluate
