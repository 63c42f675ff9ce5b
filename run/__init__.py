"""What surrounds the training: a run's folder, checkpoints, log, meters, signals, flags."""
