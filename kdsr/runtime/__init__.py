"""What models stand on: errors, checkpoints, devices, precision."""
