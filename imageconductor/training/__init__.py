"""Stage-wise training: the stages and their losses, the loop, checkpoints, distributed back ends."""
