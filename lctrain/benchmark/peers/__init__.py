"""What others would run: programs of their own, each started in a process of its own with its settings as JSON."""
