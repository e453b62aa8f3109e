"""Comparing methods: many runs from one config, in parallel, each once.

`compare` (driver.py) is what the command line and `decentral.compare` call; spec.py says what a
sweep is, processes.py and cluster.py run its points, pick.py chooses among them.
"""
