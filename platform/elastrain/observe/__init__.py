"""What a run did and is doing: where its seconds went, its lines per step, the progress line and the report."""
