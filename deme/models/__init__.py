"""diffusers pipelines as they come: their files, networks and noise schedules."""
