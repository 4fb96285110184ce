"""The search for merging coefficients: objectives, and ways to find their least."""
