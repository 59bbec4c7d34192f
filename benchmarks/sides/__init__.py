"""The two sides of a comparison, each run in its own environment: `with_trueup` and `with_trl`, from one `setting`."""
