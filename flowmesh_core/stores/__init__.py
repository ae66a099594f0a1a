"""Where results and artifacts go: one driver per ``spec.output.destination.type``."""
