"""Build the model: load it, stretch its positions, replace its attention, choose what trains."""
