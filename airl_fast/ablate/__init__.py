"""`airl-fast ablate`: a grid of training runs, one change at a time, on several seeds."""
