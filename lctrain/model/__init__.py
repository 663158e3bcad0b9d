"""Building the model: load, stretch its positions, swap its attention, choose what trains."""
