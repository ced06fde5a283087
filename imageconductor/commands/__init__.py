"""What `imageconductor NAME` runs: a module each, with `main(argv)` that gives the exit code."""
