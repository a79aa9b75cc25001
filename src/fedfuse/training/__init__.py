"""Local training and evaluation: plain functions on modules and tensors."""

from fedfuse.training.evaluation import Evaluation as Evaluation
from fedfuse.training.evaluation import evaluate as evaluate
from fedfuse.training.evaluation import predict as predict
from fedfuse.training.sgd import LocalSGD as LocalSGD
from fedfuse.training.sgd import plain_loss as plain_loss
from fedfuse.training.sgd import step_rates as step_rates
from fedfuse.training.sgd import train as train
