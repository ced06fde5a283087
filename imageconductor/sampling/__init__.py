"""From one image and drawn trajectories to a video."""
