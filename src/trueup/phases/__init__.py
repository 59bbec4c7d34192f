"""The phases of RLHF, a file each. A phase imports neither another phase nor a backend.

Every phase module has `WHAT` (one line for the person who watches), `VERSION` (bumped by hand when its results
change), a frozen config, and `run_phase(config, run, mesh) -> results`.
"""
