"""Image Conductor: one image, a prompt and drawn trajectories become a video."""
