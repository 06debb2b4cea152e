"""From a config to a report: named models and datasets, the training loop, the stages of a run."""
