"""Workers that come and go: cells of Ray Train, the membership that joins them, and the run around both."""
