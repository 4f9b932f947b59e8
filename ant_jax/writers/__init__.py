"""Where the numbers of a run go; :func:`ant_jax.callbacks.log_to` feeds them."""

from ant_jax.writers._csv import CSVWriter as CSVWriter
from ant_jax.writers._json_lines import JSONLinesWriter as JSONLinesWriter
from ant_jax.writers._mlflow import MLflowWriter as MLflowWriter
from ant_jax.writers._run_writer import write as write
from ant_jax.writers._tensorboard import TensorBoardWriter as TensorBoardWriter
from ant_jax.writers._values import binned as binned
from ant_jax.writers._wandb import WandbWriter as WandbWriter
from ant_jax.writers._writer import Start as Start, Writer as Writer
