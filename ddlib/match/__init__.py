"""The mathematics that methods match with: gradients, trajectories, clusters."""
