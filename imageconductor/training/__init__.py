"""Stage-wise training: what each stage learns (stages), how (loop), and what survives a crash (checkpointing)."""
