"""Runs in MLflow: the store that keeps them, the observer that logs a fit, and the import of runs made elsewhere."""

from __future__ import annotations

from layerlab.runs.tracking.artifacts import download as download
from layerlab.runs.tracking.artifacts import download_some as download_some
from layerlab.runs.tracking.database import PATIENCE as PATIENCE
from layerlab.runs.tracking.outbox import Outbox as Outbox
from layerlab.runs.tracking.outbox import ended as ended
from layerlab.runs.tracking.outbox import send_unsent as send_unsent
from layerlab.runs.tracking.outbox import unsent_files as unsent_files
from layerlab.runs.tracking.store import CLAIM as CLAIM
from layerlab.runs.tracking.store import LONGEST_TAG as LONGEST_TAG
from layerlab.runs.tracking.store import NOTEBOOK as NOTEBOOK
from layerlab.runs.tracking.store import ORIGIN as ORIGIN
from layerlab.runs.tracking.store import artifact_folder as artifact_folder
from layerlab.runs.tracking.store import claim_metrics as claim_metrics
from layerlab.runs.tracking.store import claim_rows as claim_rows
from layerlab.runs.tracking.store import claim_tags as claim_tags
from layerlab.runs.tracking.store import client as client
from layerlab.runs.tracking.store import common_tags as common_tags
from layerlab.runs.tracking.store import end_open_runs as end_open_runs
from layerlab.runs.tracking.store import experiment_id as experiment_id
from layerlab.runs.tracking.store import find_notebook_run as find_notebook_run
from layerlab.runs.tracking.store import found_experiment as found_experiment
from layerlab.runs.tracking.store import log_file as log_file
from layerlab.runs.tracking.store import log_metrics as log_metrics
from layerlab.runs.tracking.store import log_params as log_params
from layerlab.runs.tracking.store import log_tags as log_tags
from layerlab.runs.tracking.store import notebook_runs as notebook_runs
from layerlab.runs.tracking.store import parameter_tag as parameter_tag
from layerlab.runs.tracking.store import run_parameters as run_parameters
from layerlab.runs.tracking.store import run_url as run_url
from layerlab.runs.tracking.store import start_run as start_run
from layerlab.runs.tracking.store import tracking_uri as tracking_uri
from layerlab.runs.tracking.tracker import Tracker as Tracker
from layerlab.runs.tracking.tracker import track as track
