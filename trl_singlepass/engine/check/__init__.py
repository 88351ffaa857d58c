"""The measured check: a small tree runs as one row and as separate samples, and must give the same."""
