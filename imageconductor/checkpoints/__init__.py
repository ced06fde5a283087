"""Files in and out: published checkpoints, model folders from parts, community weights, model cards."""
