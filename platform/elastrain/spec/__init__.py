"""What the user asks for: typed, frozen specs, read from YAML or made in Python."""
