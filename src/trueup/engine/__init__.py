"""The learner, the sampler and the mesh: everything that knows of micro-batches, slots and ranks."""
