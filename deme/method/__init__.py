"""The paper: timesteps, losses, projections, task vectors, sampling, as functions of tensors."""
