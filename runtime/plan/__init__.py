"""`mhc-compile plan RECIPE`: what a training run will take, computed from its configuration alone."""
