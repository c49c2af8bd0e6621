"""How networks are trained here, in notebooks and experiments alike: on any device, captured as a CUDA graph on a GPU.

`step` is one training step and its settings, `loop` trains with it, resumes, evaluates; `batches` draws the images.
`networks` has the networks of both papers by name.
"""

from training.batches import Batches, Normalise, evaluation
from training.loop import VIEWS, OutOfTime, evaluate, fit, renew_statistics, stepwise, view
from training.step import Training, TrainingStep

__all__ = ["Batches", "Normalise", "OutOfTime", "Training", "TrainingStep", "evaluate", "evaluation", "fit"]
__all__ += ["VIEWS", "renew_statistics", "stepwise", "view"]
