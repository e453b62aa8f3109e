"""What to watch in a run besides its loss, and in finished runs: see docs/diagnostics.md.

During a run an engine asks `figures.Diagnostics` about the averaged model; drift, which needs the
workers' own models, is measured in replica.py. `connectivity` reads finished runs.
"""
