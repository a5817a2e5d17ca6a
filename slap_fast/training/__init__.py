"""Training: the step, the loop around it, the state of a run and the files it writes."""
