"""Files that are whole or not there: manifests, checkpoints, what lies outside the pipeline."""
