"""Quiet, and on this machine alone: trl reports its use to the hub unless it is told not to."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}

import datasets
import transformers

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()
